"""PEFT's adapters inside a K-Adapter: which weights are theirs, and how theirs are loaded."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone_kadapter import is_opaque
from .compat_kadapter import has_peft_adapter, without_load_report
from .format_kadapter import PEFT_CONFIG, KAdapterConfigError, KAdapterLoadError
from .replacing_kadapter import write_json
from .sources_kadapter import hub_arguments


logger = logging.get_logger(__name__)


# The child that is, or leads to, the wrapped module in PEFT's `BaseTunerLayer`, `ModulesToSaveWrapper` and
# `TrainableTokensWrapper`.
_WRAPPED = ("base_layer", "original_module", "token_adapter")
# Initialisations of LoRA that subtract the new adapter from the weights that it is added to.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def _wrappers(model: nn.Module) -> dict[str, tuple[nn.Module, str | None]]:
    """PEFT's wrappers in a model by name, each with the name in `_WRAPPED` of its child; None if the kind is not known."""
    tuners, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is None or other is None:  # a pass over all modules takes milliseconds
        return {}
    found: dict[str, tuple[nn.Module, str | None]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (tuners.BaseTunerLayer, other.AuxiliaryTrainingWrapper)):
            children = dict(module.named_children())
            found[name] = module, next((child for child in _WRAPPED if child in children), None)
        elif type(module).__module__.startswith("peft.") and _plain_name(name, found) is not None:
            found[name] = module, None
    return found


def _plain_name(name: str, wrappers: Mapping[str, tuple[nn.Module, str | None]]) -> str | None:
    """The name that a module or tensor has without PEFT; None if it is one of PEFT's own."""
    plain, path = [], ""
    for part in name.split("."):
        wrapper = wrappers.get(path)
        path = f"{path}.{part}" if path else part
        if wrapper is None:
            plain.append(part)
        elif part != wrapper[1]:
            return None
    return ".".join(plain)


def plain_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """A model's state dict, or the one that is passed, with the names and tensors it has without PEFT."""
    state_dict = model.state_dict() if state_dict is None else state_dict
    wrappers = _wrappers(model)
    if not wrappers:
        return dict(state_dict)
    plain = {_plain_name(name, wrappers): tensor for name, tensor in state_dict.items()}
    return {name: tensor for name, tensor in plain.items() if name is not None}


def peft_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that PEFT added to a model, and those that it has replaced by others."""
    wrappers = _wrappers(model)
    if not wrappers:
        return set()
    replaced = tuple(
        f"{name}.{child}."
        for name, (module, child) in wrappers.items()
        if child == "original_module" and _adapters_in(module)
    )
    return {
        parameter
        for name, parameter in model.named_parameters()
        if _plain_name(name, wrappers) is None or name.startswith(replaced)
    }


def _adapters_in(wrapper: nn.Module) -> set[str]:
    """The names of the PEFT adapters that a wrapper holds weights of; none are left after a deletion."""
    return set(wrapper._get_available_adapters())


def is_wrapped_by_peft(model: nn.Module) -> bool:
    """Whether `peft.get_peft_model` or `inject_adapter_in_model` has changed a model, and so decides what trains in it."""
    # PEFT leaves peft_config there after `unload`.
    return hasattr(model, "peft_config") and not has_peft_adapter(model) and bool(_wrappers(model))


def check_trains_what_runs(model: nn.Module) -> None:
    """
    Refuses `modules_to_save` with a name that fits both a module and one inside it, such as "lm_head" for RoBERTa: PEFT
    gives the outer module a second inner one, which trains and is saved, but not used.
    """
    wrappers = _wrappers(model)
    for name in wrappers:
        if _plain_name(name, wrappers) is None:
            raise KAdapterConfigError(
                f"modules_to_save names '{name}' and what it is a part of: what would train is not what runs. Name one of "
                f"them, by its whole name: modules_to_save=['{name}']."
            )


def virtual_tokens() -> int:
    """
    The number of tokens that one of PEFT's prompt methods has put before the inputs of the current call. Only the call
    stack tells; `torch.compile` hides it, there it is 0.
    """
    peft = sys.modules.get("peft")
    frame = None if peft is None or torch.compiler.is_compiling() else sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if isinstance(caller, peft.PeftModel) and caller.active_peft_config.is_prompt_learning:
            return caller.active_peft_config.num_virtual_tokens
        frame = frame.f_back
    return 0


def check_peft_is_saved(model: Any) -> None:
    """Raises `KAdapterConfigError` if a save would leave out or double weights that PEFT has put into the model."""
    known = set(model.peft_config) if has_peft_adapter(model) else set()
    check_trains_what_runs(model)
    for name, (module, child) in _wrappers(model).items():
        if child is None:
            raise KAdapterConfigError(
                f"'{name}' is PEFT's {type(module).__name__}, which a K-Adapter can't be saved with."
            )
        if getattr(module, "merged", False):
            raise KAdapterConfigError(
                f"a PEFT adapter is merged into '{name}', and would be saved a second time. Call PEFT's unmerge_adapter "
                "first, or save what merge_and_unload returns."
            )
        unknown = sorted(_adapters_in(module) - known)
        if unknown:
            raise KAdapterConfigError(
                f"save_pretrained would leave out the weights of the PEFT adapter '{unknown[0]}' in '{name}'. To save both in "
                "one folder, use add_adapter of the K-Adapter, not of its backbone, and not get_peft_model. The model that "
                "get_peft_model returned saves its own weights, in another folder; the model that merge_and_unload returns "
                "contains them."
            )
    left_out = sorted(known - set(model.active_adapters())) if known else []
    if left_out:
        logger.warning(
            f"of the PEFT adapters only the active one is saved, without {left_out}. To save another, call "
            "set_adapter(name), and save_pretrained to another folder."
        )


def warn_of_peft_in(model: nn.Module, part: str) -> None:
    """Warns that the file of a part alone does not hold what PEFT has put into it."""
    inside = [
        name for name, (module, _) in _wrappers(model).items() if name.startswith(f"{part}.") and _adapters_in(module)
    ]
    if inside:
        logger.warning(
            f"'{part}' is saved without what PEFT has put into '{inside[0]}' (and {len(inside) - 1} more). save_pretrained "
            "of the whole model saves both."
        )


def save_peft_adapter(model: Any, folder: Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
    """Saves the active PEFT adapter of a model, if it has any, into the folder of the K-Adapter."""
    if not has_peft_adapter(model):
        return
    state_dict = model.state_dict() if state_dict is None else state_dict
    wrappers = _wrappers(model)
    # transformers refuses tensors that share memory, or leaves some of them out.
    own = {name: tensor.clone() for name, tensor in state_dict.items() if _plain_name(name, wrappers) is None}
    PreTrainedModel.save_pretrained(model, folder, state_dict={**state_dict, **own})
    config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    if str(config.get("init_lora_weights")).startswith(_CHANGES_BASE) and not is_opaque(model.backbone):
        # The weights that it has changed are saved as they are now; loading must not change them again.
        config |= {"init_lora_weights": True, "corda_config": None, "loftq_config": {}, "lora_ga_config": None}
        write_json(folder / PEFT_CONFIG, config)


def check_restores_peft(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuses a state dict from before PEFT changed the model: the PEFT adapter would silently keep its weights."""
    if not _wrappers(model):
        return
    own = model.state_dict()
    moved = [name for name in plain_state_dict(model, own) if name in state_dict and name not in own]
    if moved:
        raise KAdapterLoadError(
            f"'{moved[0]}' (and {len(moved) - 1} more) can't be loaded into a model with a PEFT adapter, whose weights "
            "would not be restored. To resume training from a checkpoint, wrap the model with peft.get_peft_model and "
            "pass that to Trainer; to continue from the checkpoint's weights, load it with from_pretrained."
        )


def load_peft_adapter(model: Any, load: Callable[..., Any], source: Any, name: str | None, **kwargs) -> Any:
    """
    Loads a PEFT adapter with `load`, transformers' own method, and then sets its weights with PEFT's function, as
    transformers 5.5 leaves them new in a model with a submodule called `adapters`.
    """
    with without_load_report():
        result = load(source, name, **kwargs)
    peft = sys.modules["peft"]  # an import statement would make PEFT a requirement of every saved model
    name = name or "default"
    weights = kwargs.get("adapter_state_dict")
    label = "adapter_state_dict" if weights is not None else f"'{source}'"
    if weights is None:
        hub_kwargs = peft_hub_kwargs(kwargs | (kwargs.get("adapter_kwargs") or {}))
        weights = peft.load_peft_weights(source, "cpu", **hub_kwargs)
    own = model.get_adapter_state_dict(name)
    weights = {_without_adapter_name(key, name, own): tensor for key, tensor in weights.items()}
    if weights.keys() - own.keys():
        raise KAdapterLoadError(
            f"{label} holds a PEFT adapter for another model: this one has no tensor '{min(weights.keys() - own.keys())}'."
        )
    # Tensors that share memory may be stored once.
    given = {own[key].data_ptr(): weights[key] for key in weights}
    missing = sorted(own.keys() - weights.keys())
    weights |= {key: given.get(own[key].data_ptr(), own[key]) for key in missing}
    new = [key for key in missing if own[key].data_ptr() not in given]
    if new:
        logger.warning(f"{label} has no weights for {new}: they are new and untrained.")
    peft.set_peft_model_state_dict(model, weights, name)
    return result


def _without_adapter_name(key: str, name: str, known: Mapping[str, Any]) -> str:
    """The key of a tensor in PEFT's files; in a model's state dict, it contains the adapter's name too."""
    key = key.removeprefix("base_model.model.").replace(f".modules_to_save.{name}.", ".")
    parts = key.split(".")
    places = [place for place, part in enumerate(parts) if part == name and key not in known]
    shorter = (".".join(parts[:place] + parts[place + 1 :]) for place in reversed(places))
    return next((candidate for candidate in shorter if candidate in known), key)


def peft_hub_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The Hub's arguments that PEFT takes too."""
    return hub_arguments(kwargs, ("force_download", "proxies"))
