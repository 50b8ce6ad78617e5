"""Fusions of the backbone's last hidden state with the outputs of the active adapters, and `register_fusion`."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import initialization as init

from .format_kadapter import KAdapterConfigError, nearest


FUSIONS: dict[str, type["KnowledgeFusion"]] = {}
# The total weight of the adapters in a new fusion: small, so that it starts close to the backbone, but not 0, so that every
# adapter reaches the head from the first step. See the measurements in docs/fusions.md.
START = 0.1


def register_fusion(kind: str) -> Callable[[type["KnowledgeFusion"]], type["KnowledgeFusion"]]:
    """Class decorator: makes a fusion available as `config.fusion = kind`."""

    def register(fusion_class: type["KnowledgeFusion"]) -> type["KnowledgeFusion"]:
        fusion_class.kind = kind
        FUSIONS[kind] = fusion_class
        return fusion_class

    return register


def check_fusion(kind: str, values: Mapping[str, Any]) -> None:
    """Raises `KAdapterConfigError` if there is no fusion of this kind, or if it doesn't take these values."""
    if kind not in FUSIONS:
        raise KAdapterConfigError(
            f"fusion must be one of {sorted(FUSIONS)}, or one of your own whose module was imported before; not "
            f"{kind!r}{nearest(str(kind), FUSIONS) or '.'}"
        )
    known = inspect.signature(FUSIONS[kind].__init__).parameters.keys() - {"self", "width"}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise KAdapterConfigError(
            f"fusion_config: the fusion '{kind}' has no {unknown}{nearest(unknown[0], known) or '.'}"
        )


def _check_value(kind: str, name: str, value: Any, fits: bool, wanted: str) -> None:
    if not fits:
        raise KAdapterConfigError(f"fusion_config: {name} of the fusion '{kind}' must be {wanted}, not {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def to_layer(states: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """States in the dtype and on the device of a layer, unless it is quantised or offloaded, and converts them itself."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return states
    return states.to(weight.dtype) if weight.is_meta else states.to(device=weight.device, dtype=weight.dtype)


def direction(states: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """States of norm 1, for layers that compute weights, which must not depend on the norm of a backbone's states."""
    return nn.functional.normalize(to_layer(states, layer), dim=-1)


class KnowledgeFusion(nn.Module):
    """
    Base class of fusions; `width` is that of the backbone's states. Further arguments of a subclass's `__init__` are its
    configuration, which `KAdapterConfig.fusion_config` sets. Keep weights per adapter, under its name, so that adding,
    removing or activating an adapter does not change those of the others.
    """

    kind: ClassVar[str]
    # Whether the file of the class is copied to repositories.
    travels: ClassVar[bool] = False

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    @classmethod
    def register_for_auto_class(cls) -> None:
        """
        From now on, every repository that is saved with this fusion gets the file that defines it, so that it can be loaded
        with `trust_remote_code=True` where that file is not. The method of a model's class does the same for the model.
        """
        cls.travels = True

    def add(self, name: str) -> None:
        """Adds the weights for an adapter; `init_adapter` initialises them."""

    def remove(self, name: str) -> None:
        """Removes the weights of an adapter."""

    def init_adapter(self, name: str) -> None:
        """Initialises the weights of an adapter, so that a new K-Adapter starts near its backbone."""

    def init_shared(self) -> None:
        """Initialises the weights that belong to no adapter."""

    def used_parameters(self, active: Sequence[str]) -> list[nn.Parameter]:
        """The parameters that the forward pass uses with these active adapters, and that can be trained."""
        return list(self.parameters())

    def fuse(self, backbone_state: torch.Tensor, adapter_states: dict[str, torch.Tensor]) -> torch.Tensor:
        """As `forward`, for at least one adapter."""
        raise NotImplementedError

    def weights(
        self, backbone_state: torch.Tensor, adapter_states: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor] | None:
        """The weight of each adapter at each position, `(…)`, which `output_fusion_weights` returns; None if it has none."""
        return None

    def forward(self, backbone_state: torch.Tensor, adapter_states: dict[str, torch.Tensor]) -> torch.Tensor:
        """Fuses `(…, width)` states with the adapters' outputs of the same shape, by name."""
        return self.fuse(backbone_state, adapter_states) if adapter_states else backbone_state


class Scale(nn.Module):
    """Multiplies by a learnt number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states * self.weight


@register_fusion("add")
class AddFusion(KnowledgeFusion):
    """
    `H + Σ y_k`, without weights; or `H + Σ s_k y_k`, with a learnt number for each adapter.

    Source: `fusion_mode="add"` of the original's `examples/run_finetune_*_adapter.py`; the numbers are an addition.

    Args:
        scale (`float`, *optional*): the value that the numbers start from. Without it, there are none.
    """

    def __init__(self, width: int, scale: float | None = None):
        super().__init__(width)
        _check_value("add", "scale", scale, scale is None or _is_number(scale), "a finite number")
        self.scale = scale
        self.scales = nn.ModuleDict()

    def add(self, name: str) -> None:
        if self.scale is not None:
            self.scales[name] = Scale()

    def remove(self, name: str) -> None:
        if self.scale is not None:
            del self.scales[name]

    def init_adapter(self, name: str) -> None:
        if self.scale is not None:
            init.constant_(self.scales[name].weight, self.scale)

    def used_parameters(self, active: Sequence[str]) -> list[nn.Parameter]:
        return [parameter for name in active if name in self.scales for parameter in self.scales[name].parameters()]

    def fuse(self, backbone_state: torch.Tensor, adapter_states: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.scale is not None:
            adapter_states = {name: self.scales[name](state) for name, state in adapter_states.items()}
        return sum(adapter_states.values(), start=backbone_state)

    def weights(
        self, backbone_state: torch.Tensor, adapter_states: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor] | None:
        if self.scale is None:
            return None
        return {name: self.scales[name](torch.ones_like(state[..., 0])) for name, state in adapter_states.items()}


@register_fusion("concat")
class ConcatFusion(KnowledgeFusion):
    """
    `f_k = W_k [H; y_k] + b_k` for each active adapter; with one the result is `f_1`, with several `Σ M_k f_k + b`.

    Source: the paper's section 3.2; `RobertaModelwithAdapter` in the original's `examples/run_finetune_*_adapter.py`, whose
    matrix over all `f_k` is kept here as one block `M_k` per adapter.

    Args:
        start (`float`): `f_k` starts as `H + start · y_k`. The original's start is random.
    """

    def __init__(self, width: int, start: float = START):
        super().__init__(width)
        _check_value("concat", "start", start, _is_number(start), "a finite number")
        self.start = start
        self.states = nn.ModuleDict()
        self.mix = nn.ModuleDict()
        self.bias = nn.Parameter(torch.zeros(width))

    def add(self, name: str) -> None:
        self.states[name] = nn.Linear(2 * self.width, self.width)
        self.mix[name] = nn.Linear(self.width, self.width, bias=False)

    def remove(self, name: str) -> None:
        del self.states[name], self.mix[name]

    def init_adapter(self, name: str, noise: float = 2e-4) -> None:
        """Initialises `W_k` as the class describes, plus noise of this standard deviation, and `M_k` as half the identity."""
        state, mix = self.states[name], self.mix[name]
        weight = torch.zeros_like(state.weight).fill_diagonal_(1)
        weight[:, self.width :].fill_diagonal_(self.start)
        if noise:
            weight += torch.randn_like(weight) * noise
        init.copy_(state.weight, weight)
        init.zeros_(state.bias)
        init.copy_(mix.weight, torch.zeros_like(mix.weight).fill_diagonal_(0.5))

    def init_shared(self) -> None:
        init.zeros_(self.bias)

    def used_parameters(self, active: Sequence[str]) -> list[nn.Parameter]:
        modules = [self.states[name] for name in active]
        if len(active) > 1:
            modules += [self.mix[name] for name in active]
        shared = [self.bias] if len(active) > 1 else []
        return [parameter for module in modules for parameter in module.parameters()] + shared

    def fuse(self, backbone_state: torch.Tensor, adapter_states: dict[str, torch.Tensor]) -> torch.Tensor:
        fused = {}
        for name, state in adapter_states.items():
            layer = self.states[name]
            fused[name] = layer(torch.cat([to_layer(backbone_state, layer), to_layer(state, layer)], dim=-1))
        if len(fused) == 1:
            return next(iter(fused.values()))
        return sum((self.mix[name](state) for name, state in fused.items()), start=self.bias)


@register_fusion("gate")
class GateFusion(KnowledgeFusion):
    """
    `H + Σ g_k y_k`, where the gate `g_k` is one number per adapter and position, computed from the directions of `H` and `y_k`.

    Args:
        activation (`str`): `"sigmoid"`: each gate is open or closed by itself. `"softmax"`: the gates compete, and add up to
            less than 1; the rest is for no adapter. With one adapter, both are the same.
        top_k (`int`, *optional*): at each position, only the `top_k` largest gates are open, as in mixtures of adapters (Wang
            et al., AdaMix, EMNLP 2022). At least as many adapters must be active.
        start (`float`): the initial sum of the gates, for any number of adapters.
    """

    def __init__(
        self,
        width: int,
        activation: Literal["sigmoid", "softmax"] = "sigmoid",
        top_k: int | None = None,
        start: float = START,
    ):
        super().__init__(width)
        _check_value("gate", "activation", activation, activation in ("sigmoid", "softmax"), "'sigmoid' or 'softmax'")
        _check_value("gate", "top_k", top_k, top_k is None or _is_count(top_k), "an int of at least 1")
        _check_value("gate", "start", start, _is_number(start) and 0 < start < 1, "between 0 and 1")
        self.activation, self.top_k, self.start = activation, top_k, start
        self.gates = nn.ModuleDict()

    def add(self, name: str) -> None:
        self.gates[name] = nn.Linear(2 * self.width, 1)

    def remove(self, name: str) -> None:
        del self.gates[name]

    def init_adapter(self, name: str) -> None:
        init.zeros_(self.gates[name].weight)
        init.constant_(self.gates[name].bias, math.log(self.start / (1 - self.start)))

    def used_parameters(self, active: Sequence[str]) -> list[nn.Parameter]:
        return [parameter for name in active for parameter in self.gates[name].parameters()]

    def fuse(self, backbone_state: torch.Tensor, adapter_states: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = self.weights(backbone_state, adapter_states)
        return sum((weights[name][..., None] * state for name, state in adapter_states.items()), start=backbone_state)

    def weights(
        self, backbone_state: torch.Tensor, adapter_states: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        count = len(adapter_states)
        if self.top_k is not None and count < self.top_k:
            raise KAdapterConfigError(
                f"the fusion 'gate' with top_k={self.top_k} chooses among at least {self.top_k} adapters, and only "
                f"{list(adapter_states)} are active: activate more, or lower top_k in fusion_config."
            )
        scores = torch.cat(
            [self._score(name, backbone_state, state) for name, state in adapter_states.items()], dim=-1
        )
        if self.top_k is not None and count > self.top_k:
            chosen = torch.zeros_like(scores).scatter(-1, scores.topk(self.top_k).indices, 1.0)
            scores, count = scores.masked_fill(chosen == 0, -torch.inf), self.top_k
        scores = scores - math.log(count)
        if self.activation == "softmax":
            gates = nn.functional.pad(scores, (1, 0)).softmax(-1)[..., 1:]
        else:
            gates = scores.sigmoid()
        return dict(zip(adapter_states, gates.unbind(-1), strict=True))

    def _score(self, name: str, backbone_state: torch.Tensor, adapter_state: torch.Tensor) -> torch.Tensor:
        gate = self.gates[name]
        return gate(torch.cat([direction(backbone_state, gate), direction(adapter_state, gate)], dim=-1))


@register_fusion("attention")
class AttentionFusion(KnowledgeFusion):
    """
    Attention at each position over the backbone's own state and the adapters' outputs: the query is computed from the
    direction of `H`, the keys from the directions of `H, y_1, …`, and the values from these states, with which they are
    initially identical. The result is the weighted sum of the values. The last number of a key is a bias of its score.

    Source: AdapterFusion (Pfeiffer et al., EACL 2021, section 3.2), which shares the matrices for keys and values among its
    adapters. Here each adapter has its own.

    Args:
        key_size (`int`, defaults to 64): the width of queries and keys.
        start (`float`): the initial sum of the adapters' weights, for any number of adapters.
    """

    def __init__(self, width: int, key_size: int = 64, start: float = START):
        super().__init__(width)
        _check_value("attention", "key_size", key_size, _is_count(key_size), "an int of at least 1")
        _check_value("attention", "start", start, _is_number(start) and 0 < start < 1, "between 0 and 1")
        self.key_size, self.start = key_size, start
        self.to_query = nn.Linear(width, key_size)
        self.backbone_key, self.backbone_value = nn.Linear(width, key_size + 1), nn.Linear(width, width)
        self.keys, self.values = nn.ModuleDict(), nn.ModuleDict()

    def add(self, name: str) -> None:
        self.keys[name] = nn.Linear(self.width, self.key_size + 1)
        self.values[name] = nn.Linear(self.width, self.width)

    def remove(self, name: str) -> None:
        del self.keys[name], self.values[name]

    def init_shared(self) -> None:
        init.normal_(self.to_query.weight)
        init.zeros_(self.to_query.bias)
        self._init_source(self.backbone_key, self.backbone_value, score=0.0)

    def init_adapter(self, name: str) -> None:
        self._init_source(self.keys[name], self.values[name], score=math.log(self.start / (1 - self.start)))

    def _init_source(self, key: nn.Linear, value: nn.Linear, score: float) -> None:
        init.zeros_(key.weight)
        init.copy_(key.bias, torch.zeros_like(key.bias).index_fill(0, torch.tensor([self.key_size]), score))
        init.copy_(value.weight, torch.zeros_like(value.weight).fill_diagonal_(1))
        init.zeros_(value.bias)

    def used_parameters(self, active: Sequence[str]) -> list[nn.Parameter]:
        shared = (self.to_query, self.backbone_key, self.backbone_value) if active else ()
        own = (modules[name] for modules in (self.keys, self.values) for name in active)
        return [parameter for module in (*shared, *own) for parameter in module.parameters()]

    def fuse(self, backbone_state: torch.Tensor, adapter_states: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = self.weights(backbone_state, adapter_states)
        rest = 1 - sum(weights.values())
        fused = rest[..., None] * self.backbone_value(to_layer(backbone_state, self.backbone_value))
        for name, state in adapter_states.items():
            fused = fused + weights[name][..., None] * self.values[name](to_layer(state, self.values[name]))
        return fused

    def weights(
        self, backbone_state: torch.Tensor, adapter_states: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        query = self.to_query(direction(backbone_state, self.to_query)) * self.key_size**-0.5
        own = self._score(query, self.backbone_key, backbone_state)
        scores = [self._score(query, self.keys[name], state) for name, state in adapter_states.items()]
        scores = [own, *(score - math.log(len(scores)) for score in scores)]
        weights = torch.stack(scores, dim=-1).softmax(-1).unbind(-1)
        return dict(zip(adapter_states, weights[1:], strict=True))

    def _score(self, query: torch.Tensor, layer: nn.Module, state: torch.Tensor) -> torch.Tensor:
        key = layer(direction(state, layer))
        return (query * key[..., :-1]).sum(-1) + key[..., -1]
