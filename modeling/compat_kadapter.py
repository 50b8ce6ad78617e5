"""
Every use of undocumented features of other libraries, and what breaks without it.

Unless noted, an entry applies to all supported versions: transformers 5.5 to 5.24, PEFT from 0.18, accelerate from 1.3.
Attributes that every transformers model defines (`_init_weights`, `_tied_weights_keys`, …) are in the model classes.
"""

import contextlib
import copy
import logging as std_logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization as init
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, logging


logger = logging.get_logger(__name__)


def dtypes_to_str(self: PreTrainedConfig, fields: dict[str, Any]) -> None:
    """
    Replaces `PreTrainedConfig.dict_dtype_to_str`, which takes anything called dtype for a torch.dtype: a configuration
    with an unknown field `{"dtype": …}` that is no dtype could not be saved.
    """
    if isinstance(fields.get("dtype"), torch.dtype):
        fields["dtype"] = str(fields["dtype"]).removeprefix("torch.")
    for value in fields.values():
        if isinstance(value, dict):
            dtypes_to_str(self, value)


def drop_colliding(cls: type, kwargs: dict[str, Any]) -> None:
    """
    Drops unknown fields that would overwrite a method or read-only property of a configuration class, as transformers
    sets any unknown field as an attribute.
    """
    kwargs.pop("model_type", None)  # transformers 5.5 passes this attribute of the class
    for key in list(kwargs):
        attribute = getattr(cls, key, None) if hasattr(cls, key) else None
        settable = attribute is None or (isinstance(attribute, property) and attribute.fset is not None)
        if not settable:
            logger.warning(f"{cls.__name__}: the unknown field '{key}' is dropped.")
            del kwargs[key]


def attn_implementation_of(config: PreTrainedConfig) -> str | None:
    """Without it, a backbone would be loaded with the default attention."""
    return config._attn_implementation


# Replaces NaN and infinities, which JSON lacks, as transformers does in config.json; and the inverse.
encode_floats = PreTrainedConfig._encode_special_floats
decode_floats = PreTrainedConfig._decode_special_floats


def take_auto_arguments(kwargs: dict[str, Any]) -> Any:
    """
    Removes what the Auto classes and pipelines add to the arguments of `from_pretrained`: it would reach the backbone's
    constructor. Returns the source of the PEFT adapter, if `AutoModel` has found one.
    """
    for name in ("_from_auto", "_from_pipeline", "_commit_hash", "adapter_name", "code_revision"):
        kwargs.pop(name, None)
    return (kwargs.pop("adapter_kwargs", None) or {}).get("_adapter_model_path")


def is_remote_code(module: str) -> bool:
    """
    Whether a module was loaded from a repository, with `trust_remote_code`. If it registered its classes with the Auto
    classes, these would no longer look at auto_map.
    """
    return module.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


class SeveralClasses(tuple):
    """
    Several model classes for one Auto class, which takes the one that config.json's `architectures` names, else the first.
    Pipelines of transformers 5.5 read the `__name__` of each registered entry.
    """

    @property
    def __name__(self) -> str:
        return self[0].__name__


# Held while models are built and loaded: transformers replaces functions of torch meanwhile, and if two threads did so at
# the same time, the replacements would stay in place.
LOADING = threading.RLock()


@contextlib.contextmanager
def _filtered(targets: Iterable[std_logging.Filterer], keep: Callable[..., bool]) -> Iterator[None]:
    for target in targets:
        target.addFilter(keep)
    try:
        yield
    finally:
        for target in targets:
            target.removeFilter(keep)


@contextlib.contextmanager
def without_initialization() -> Iterator[None]:
    """As transformers' `no_init_weights`, but thread-safe."""
    with LOADING, init.no_init_weights():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """
    Silences transformers' progress bars and this thread's log, for loads that the user did not ask for. `LOADING` is held
    because one switch controls the bars of all threads.
    """
    thread = threading.get_ident()
    handlers = [*logging.get_logger().handlers, *std_logging.getLogger().handlers]

    def keep(record: std_logging.LogRecord) -> bool:
        return record.thread != thread or not record.name.startswith("transformers.")

    with LOADING, _filtered(handlers, keep):
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if bars:
                logging.enable_progress_bar()


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """
    Silences transformers' table of unexpected and missing keys. Nearly every backbone would print one, as most
    repositories hold a pooler or a language-model head; the keys that matter are checked by this package.
    """
    names = ("transformers.modeling_utils", "transformers.integrations.peft")
    logs = [logging.get_logger(name) for name in names]
    with _filtered(logs, lambda record: "LOAD REPORT" not in record.getMessage()):
        yield


def mark_initialized(model: nn.Module) -> None:
    """
    Keeps `post_init` from initialising the weights of a loaded model. A model on the meta device has no weights yet:
    `init_weights` makes them later.
    """
    if not all(parameter.is_meta for parameter in model.parameters()):
        for module in model.modules():
            module._is_hf_initialized = True


def new_model(model_class: type[PreTrainedModel], config: PreTrainedConfig, **kwargs) -> PreTrainedModel:
    """A new model, as by `AutoModel.from_config`, which does not accept arguments of the class (`add_pooling_layer`)."""
    return model_class._from_config(config, **kwargs)


def records_hidden_states(model_class: type) -> bool:
    """For models whose `forward` has no `output_hidden_states` argument."""
    return "hidden_states" in (getattr(model_class, "_can_record_outputs", None) or {})


def copy_with_own_modules(model: PreTrainedModel) -> PreTrainedModel:
    """
    A shallow copy of a model, from which modules can be removed while the original keeps them. A model that accelerate
    has dispatched is returned itself, as its `forward` is bound to that object.
    """
    if hasattr(model, "_hf_hook"):
        return model
    duplicate = copy.copy(model)
    duplicate._modules = dict(model._modules)
    return duplicate


def parameters_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """
    The parameters of a module, also in a replica of `torch.nn.DataParallel`, whose `parameters()` is empty: a backbone that
    trains would get no gradients there.
    """
    for submodule in module.modules():
        for parameter in getattr(submodule, "_former_parameters", submodule._parameters).values():
            if parameter is not None:
                yield parameter


def no_split_modules(model: PreTrainedModel, around: nn.Module) -> set[str]:
    """
    The names of the classes that FSDP wraps, without those that contain the module `around`, the input embeddings:
    accelerate wraps these alone, and they would be in two units.
    """
    backbone = model.backbone
    path = next((name for name, module in backbone.named_modules() if module is around), "").split(".")
    outer = {type(backbone.get_submodule(".".join(path[:end]))).__name__ for end in range(len(path))}
    return set(model._no_split_modules or ()) - outer


def running_position_ids(backbone: nn.Module, inputs: torch.Tensor, past: int = 0) -> torch.Tensor | None:
    """
    Position ids that run on over padding, `(batch, length)`, for RoBERTa and similar backbones, whose positions start at
    `padding_idx + 1`; `past` is the length of a prefix. Adapters that attend to padding need them.
    """
    embeddings = getattr(backbone, "embeddings", None)
    if not hasattr(embeddings, "create_position_ids_from_input_ids"):
        return None
    start = embeddings.padding_idx + 1 + past
    return torch.arange(start, start + inputs.shape[1], device=inputs.device).expand(inputs.shape[:2])


def has_peft_adapter(model: PreTrainedModel) -> bool:
    """Whether transformers' PEFT integration added an adapter to this model."""
    return getattr(model, "_hf_peft_config_loaded", False)
