"""Averages of knowledge adapters: `average_knowledge_adapters` of every model."""

import copy
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from .configuration_kadapter import KnowledgeAdapterConfig
from .format_kadapter import KAdapterConfigError, fingerprint, part_of
from .peft_kadapter import plain_state_dict


# What the output of an adapter depends on besides its weights.
SHAPE = ("backbone_layers", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
SHAPE += ("hidden_act", "layer_norm_eps", "attend_to_padding")


def averaged(model: Any, weights: Any) -> tuple[KnowledgeAdapterConfig, dict[str, torch.Tensor]]:
    """The configuration and the tensors of the weighted mean of a model's adapters, which is computed in float32."""
    _check_weights(weights)
    model._checked_names(weights)
    state = plain_state_dict(model)
    model.origins.update_adapters(model, state)
    configs = {name: model.config.knowledge_adapters[name] for name in weights}
    _check_comparable(configs)
    tensors = {name: part_of(state, f"adapters.{name}") for name in weights}
    mean: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        for key, tensor in tensors[name].items():
            key = key.removeprefix(f"adapters.{name}.")
            mean[key] = mean.get(key, 0) + weight * tensor.float()
    config = copy.deepcopy(next(iter(configs.values())))
    config.provenance = {
        "average_of": {name: float(weight) for name, weight in weights.items()},
        "fingerprints": {name: fingerprint(adapter.values()) for name, adapter in tensors.items()},
        "sources": {name: adapter.provenance for name, adapter in configs.items()},
    }
    return config, mean


def _check_weights(weights: Any) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise KAdapterConfigError(
            f"weights must be a dict from names of knowledge adapters to numbers, not {weights!r}."
        )
    for name, weight in weights.items():
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise KAdapterConfigError(f"the weight of '{name}' must be a finite number, not {weight!r}.")
    total = math.fsum(weights.values())
    if abs(total - 1) > 1e-6:
        raise KAdapterConfigError(f"the weights of an average must add up to 1, not {total:g}.")


def _check_comparable(configs: Mapping[str, KnowledgeAdapterConfig]) -> None:
    (first, wanted), *others = configs.items()
    for name, config in others:
        for field in SHAPE:
            here, there = getattr(config, field), getattr(wanted, field)
            if here != there:
                raise KAdapterConfigError(
                    f"only adapters of one shape can be averaged, and '{name}' has {field} {here}, '{first}' {there}."
                )
        if config.backbone_fingerprint != wanted.backbone_fingerprint:
            raise KAdapterConfigError(
                f"only adapters of one backbone can be averaged, and '{name}' was trained on '{config.backbone_name_or_path}' "
                f"with fingerprint {config.backbone_fingerprint}, '{first}' on '{wanted.backbone_name_or_path}' with "
                f"{wanted.backbone_fingerprint}."
            )
        here, there = _seeds(config.provenance), _seeds(wanted.provenance)
        if here and there and here != there:
            raise KAdapterConfigError(
                f"only adapters that started from the same weights can be averaged, and '{name}' was trained with seed "
                f"{', '.join(sorted(here))}, '{first}' with {', '.join(sorted(there))}."
            )


def _seeds(provenance: Any) -> set[str]:
    """The recorded seeds of an adapter: its own or, for an average, those of the adapters it was made from."""
    if not isinstance(provenance, Mapping):
        return set()
    own = {str(provenance["seed"])} if provenance.get("seed") is not None else set()
    sources = provenance.get("sources")
    return own.union(*map(_seeds, sources.values())) if isinstance(sources, Mapping) else own
