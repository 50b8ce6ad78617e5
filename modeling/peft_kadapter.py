"""PEFT's adapters inside a K-Adapter: which weights are theirs, and how theirs are loaded."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .compat_kadapter import without_load_report
from .format_kadapter import KAdapterLoadError
from .sources_kadapter import hub_arguments


logger = logging.get_logger(__name__)


def _peft_layers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """PEFT's wrappers in a model by name, each with its attribute for the wrapped module (PEFT from 0.18)."""
    layers: dict[str, tuple[nn.Module, str]] = {}
    if "peft" not in sys.modules:  # a pass over all modules takes milliseconds
        return layers
    for name, module in model.named_modules():
        if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer"):
            layers[name] = (module, "base_layer")
        elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            layers[name] = (module, "original_module")
    return layers


def peft_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that PEFT added to a model."""
    return {
        parameter
        for module, kept in _peft_layers(model).values()
        for name, parameter in module.named_parameters()
        if not name.startswith(f"{kept}.")
    }


def check_says_of_peft(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """
    Refuses weights that were saved before PEFT changed the model: the PEFT adapter's would silently stay as they are.

    Raises:
        KAdapterLoadError: the state dict has names that a PEFT adapter has moved.
    """
    if not _peft_layers(model):
        return
    own = model.state_dict()
    moved = [name for name in plain_state_dict(model, own) if name in state_dict and name not in own]
    if moved:
        raise KAdapterLoadError(
            f"'{moved[0]}' (and {len(moved) - 1} more) can't be loaded into a model with a PEFT adapter, whose weights "
            "would not be restored. To resume training from a checkpoint, wrap the model with peft.get_peft_model and "
            "pass that to Trainer; to continue from the checkpoint's weights, load it with from_pretrained."
        )


def plain_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """A model's state dict, or the one that is passed, with the names and tensors it has without PEFT."""
    state_dict = model.state_dict() if state_dict is None else state_dict
    layers = _peft_layers(model)
    if not layers:
        return dict(state_dict)
    plain = {}
    for name, tensor in state_dict.items():
        parts = name.split(".")
        wrapper = next((w for end in range(1, len(parts)) if (w := ".".join(parts[:end])) in layers), None)
        if wrapper is None:
            plain[name] = tensor
        elif name.startswith(f"{wrapper}.{layers[wrapper][1]}."):
            plain[name.replace(f".{layers[wrapper][1]}.", ".", 1)] = tensor
    return plain


def load_peft_adapter(model: Any, load: Callable[..., Any], source: Any, name: str | None, **kwargs) -> Any:
    """
    Loads a PEFT adapter with `load`, transformers' own method, and then sets its weights again with PEFT's function: the
    method of transformers 5.5 leaves them new in a model with a submodule called `adapters`.

    Raises:
        KAdapterLoadError: the source holds a tensor that has no place in the model.
    """
    with without_load_report():
        result = load(source, name, **kwargs)
    from peft import load_peft_weights, set_peft_model_state_dict

    name = name or "default"
    weights = kwargs.get("adapter_state_dict")
    if weights is None:
        weights = load_peft_weights(source, "cpu", **peft_hub_kwargs(kwargs | (kwargs.get("adapter_kwargs") or {})))
    weights = {key.removeprefix("base_model.model."): tensor for key, tensor in weights.items()}
    expected = model.get_adapter_state_dict(name).keys()
    if weights.keys() - expected:
        raise KAdapterLoadError(
            f"'{source}' holds a PEFT adapter for another model: this one has no tensor '{min(weights.keys() - expected)}'."
        )
    if expected - weights.keys():
        logger.warning(
            f"'{source}' has no weights for {sorted(expected - weights.keys())}: they are new and untrained."
        )
    set_peft_model_state_dict(model, weights, name)
    return result


def peft_hub_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The Hub's arguments that PEFT takes too."""
    return hub_arguments(kwargs, ("force_download", "proxies"))
