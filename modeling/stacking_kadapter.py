"""Knowledge adapters of one shape that run as one, with stacked weights."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from .adapters_kadapter import KnowledgeAdapter
from .averaging_kadapter import SHAPE
from .compat_kadapter import attn_implementation_of


# Where this is faster (docs/performance.md): on a GPU, a small adapter takes longer to start its kernels than to run them.
DEVICES = ("cuda",)
FEWEST_ADAPTERS = 4
MOST_VALUES = 2**20  # in a hidden state or the attention weights of an adapter


def run_adapters(
    adapters: Mapping[str, Any],
    states: Any,
    attention_mask: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """
    The outputs of adapters by name; the arguments are those of `KnowledgeAdapter.forward`. Where it is faster, adapters of one
    shape run together, with the same result up to rounding.
    """
    # A mask of another shape is passed on as it is, in the form that the adapters' own attention takes.
    together = len(adapters) >= FEWEST_ADAPTERS and (attention_mask is None or attention_mask.dim() == 2)
    groups: dict[Any, list[str]] = {}
    for name, adapter in adapters.items():
        shape = _shape(adapter, states) if together else None
        groups.setdefault(shape or name, []).append(name)
    outputs: dict[str, torch.Tensor] = {}
    for names in groups.values():
        group = [adapters[name] for name in names]
        if len(group) < FEWEST_ADAPTERS:
            found: Sequence[torch.Tensor] = [adapter(states, attention_mask, positions) for adapter in group]
        else:
            found = _run_stacked(group, states, attention_mask, positions)
        outputs |= zip(names, found, strict=True)
    return {name: outputs[name] for name in adapters}


def _shape(adapter: KnowledgeAdapter, states: Any) -> tuple[Any, ...] | None:
    """What adapters that run together have in common; None for an adapter that has to run alone."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    weight = next(adapter.parameters(), None)  # None in the copies that DataParallel makes
    config = adapter.config
    batch, length, _ = states[config.backbone_layers[0]].shape
    heads = config.num_attention_heads if config.num_hidden_layers else 0
    if (
        weight is None
        or weight.device.type not in DEVICES
        or batch * length * max(config.hidden_size, heads * length) > MOST_VALUES
        or attn_implementation_of(adapter.attention) not in ("eager", "sdpa")
        or not all(map(_is_plain, adapter.modules()))
    ):
        return None
    fields = (str(getattr(config, field)) for field in SHAPE)
    names = (name for name, _ in adapter.named_parameters())  # weights that are tied are missing
    modes = ((module.training, getattr(module, "p", None)) for module in adapter.modules())  # of dropout
    trains = any(parameter.requires_grad for parameter in adapter.parameters())
    return (*fields, *names, *modes, weight.dtype, weight.device, trains)


def _is_plain(module: torch.nn.Module) -> bool:
    """
    Whether nothing but its class decides what a module computes: no hooks, parametrizations, PEFT, FSDP or gradient
    checkpointing.
    """
    known = all(type(parameter) is torch.nn.Parameter for parameter in module.parameters(recurse=False))
    known = known and type(module).__module__.startswith(
        ("torch.nn.modules.", "transformers.activations", str(__package__))
    )
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    changed = any(hooks) or "forward" in vars(module)
    return known and not changed and not (module.training and getattr(module, "gradient_checkpointing", False))


def _run_stacked(
    adapters: Sequence[KnowledgeAdapter], states: Any, attention_mask: torch.Tensor | None, positions: Any
) -> Sequence[torch.Tensor]:
    first = adapters[0]
    names = [name for name, _ in first.named_parameters()]
    weights = zip(*(adapter.parameters() for adapter in adapters), strict=True)
    stacked = {name: torch.stack(of_all) for name, of_all in zip(names, weights, strict=True)}
    # The weights of this copy are replaced while it runs, and other threads may use the adapter itself.
    shared = {id(one): one for one in (*first.parameters(), first.config)}
    # vmap has no rule for SDPA with a mask on a GPU.
    empty = copy.deepcopy(first, shared | {id(first.attention): PreTrainedConfig(attn_implementation="eager")})

    def run(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(empty, weights, (states, attention_mask, positions))

    outputs = torch.vmap(run, randomness="different")(stacked)
    return [outputs[number] for number in range(len(adapters))]  # views of `unbind` can't be changed in place
