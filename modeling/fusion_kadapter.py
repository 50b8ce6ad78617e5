"""Fusions of the backbone's last hidden state with the outputs of the active adapters, and `register_fusion`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init

from .format_kadapter import KAdapterConfigError


FUSIONS: dict[str, type["KnowledgeFusion"]] = {}


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
        raise KAdapterConfigError(f"fusion must be one of {sorted(FUSIONS)}, not {kind!r}.")
    parameters = inspect.signature(FUSIONS[kind].__init__).parameters
    unknown = sorted(values.keys() - parameters.keys())
    if unknown:
        raise KAdapterConfigError(f"fusion_config: the fusion '{kind}' has no {unknown}.")


def to_layer(states: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """States in the dtype and on the device of a layer, unless it is quantised or offloaded, and converts them itself."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return states
    return states.to(weight.dtype) if weight.is_meta else states.to(device=weight.device, dtype=weight.dtype)


class KnowledgeFusion(nn.Module):
    """
    Base class of fusions; `width` is that of the backbone's states. Further arguments of a subclass's `__init__` are its
    configuration, which `KAdapterConfig.fusion_config` sets. Keep weights per adapter, under its name, so that adding,
    removing or activating an adapter does not change those of the others.
    """

    kind: ClassVar[str]

    def __init__(self, width: int):
        super().__init__()
        self.width = width

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

    def forward(self, backbone_state: torch.Tensor, adapter_states: dict[str, torch.Tensor]) -> torch.Tensor:
        """Fuses `(…, width)` states with the adapters' outputs of the same shape, by name."""
        return self.fuse(backbone_state, adapter_states) if adapter_states else backbone_state


@register_fusion("add")
class AddFusion(KnowledgeFusion):
    """`H + Σ y_k`, without weights. Source: `fusion_mode="add"` of the original's `examples/run_finetune_*_adapter.py`."""

    def fuse(self, backbone_state: torch.Tensor, adapter_states: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(adapter_states.values(), start=backbone_state)


@register_fusion("concat")
class ConcatFusion(KnowledgeFusion):
    """
    `f_k = W_k [H; y_k] + b_k` for each active adapter; with one the result is `f_1`, with several `Σ M_k f_k + b`.

    Source: the paper's section 3.2; `RobertaModelwithAdapter` in the original's `examples/run_finetune_*_adapter.py`, whose
    matrix over all `f_k` is kept here as one block `M_k` per adapter.
    """

    def __init__(self, width: int):
        super().__init__(width)
        self.states = nn.ModuleDict()
        self.mix = nn.ModuleDict()
        self.bias = nn.Parameter(torch.zeros(width))

    def add(self, name: str) -> None:
        self.states[name] = nn.Linear(2 * self.width, self.width)
        self.mix[name] = nn.Linear(self.width, self.width, bias=False)

    def remove(self, name: str) -> None:
        del self.states[name], self.mix[name]

    def init_adapter(self, name: str, noise: float = 2e-4) -> None:
        """Passes the backbone's state on, with noise of this standard deviation."""
        state, mix = self.states[name], self.mix[name]
        weight = torch.zeros_like(state.weight).fill_diagonal_(1)
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
