"""Finding, loading and checking the backbone."""

import inspect
import os
import re
import time
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .compat_kadapter import (
    LOADING,
    copy_with_own_modules,
    new_model,
    quiet,
    records_hidden_states,
    without_initialization,
    without_load_report,
)
from .configuration_kadapter import KAdapterConfig, own_fields
from .format_kadapter import BackboneMismatchError, KAdapterConfigError, KAdapterLoadError, damaged, nearest
from .reading_kadapter import check_tensors
from .sources_kadapter import HUB_ARGUMENTS, check_downloads, hub_arguments, snapshot_of


logger = logging.get_logger(__name__)

# Fields that are equal in the configurations of backbones of the same kind.
KIND = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


def check_is_encoder(config: PreTrainedConfig, model_class: Any = None) -> None:
    """Raises `KAdapterConfigError` for decoders, and for models that take no token ids or return no hidden states."""
    name = f"a '{config.model_type}' model"
    if config.model_type == KAdapterConfig.model_type:
        raise KAdapterConfigError(
            "a K-Adapter can't be the backbone of another: load it with from_pretrained, and its adapters into another "
            "model with load_knowledge_adapter."
        )
    if config.is_encoder_decoder:
        raise KAdapterConfigError(f"{name} is an encoder-decoder; a K-Adapter's backbone must be an encoder.")
    causal_only = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    if causal_only or getattr(config, "is_decoder", False):
        raise KAdapterConfigError(f"{name} is a decoder; a K-Adapter's backbone must be an encoder.")
    model_class = model_class or _class_of(config)
    if model_class is None:
        return
    if getattr(model_class, "main_input_name", "input_ids") != "input_ids":
        raise KAdapterConfigError(f"{name} reads '{model_class.main_input_name}', not the token ids of a text.")
    takes_argument = "output_hidden_states" in inspect.signature(model_class.forward).parameters
    if not takes_argument and not records_hidden_states(model_class):
        raise KAdapterConfigError(f"{name} returns no hidden states, which knowledge adapters read.")
    if not isinstance(getattr(config, "num_hidden_layers", None), int) or not hasattr(config, "hidden_size"):
        raise KAdapterConfigError(f"{name} does not say its hidden_size and num_hidden_layers.")


def masked_lm_class(config: PreTrainedConfig) -> Any:
    """The class that `AutoModelForMaskedLM` would choose. Raises `KAdapterConfigError` if there is none."""
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise KAdapterConfigError(f"transformers has no masked-language model of type '{config.model_type}'.")
    return MODEL_FOR_MASKED_LM_MAPPING[type(config)]


def _class_of(config: PreTrainedConfig) -> Any:
    """The class that `AutoModel` would choose, or None."""
    return MODEL_MAPPING[type(config)] if type(config) in MODEL_MAPPING else None


def _without_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    """Arguments that leave out the pooler, which is not used and is random if the checkpoint lacks it."""
    model_class = _class_of(config)
    if model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        return {"add_pooling_layer": False}
    return {}


def drop_pooler(backbone: PreTrainedModel) -> None:
    """Removes the pooler of a model that the user loaded."""
    encoder = backbone.base_model
    if _without_pooler(encoder.config) and getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None


def new_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone with random weights and without a pooler."""
    check_is_encoder(config)
    return new_model(_class_of(config), config, **_without_pooler(config))


def load_backbone(
    name: str | os.PathLike, *, expected: PreTrainedConfig | None = None, with_lm_head: bool = False, **kwargs
) -> PreTrainedModel:
    """
    Loads a backbone through its own `from_pretrained`.

    Args:
        expected: the configuration whose type, sizes and vocabulary it must have.
        with_lm_head: load and return its `AutoModelForMaskedLM` class.

    Raises:
        KAdapterLoadError: it can't be loaded, or its checkpoint lacks some of its weights.
        BackboneMismatchError: it is not like `expected`.
        KAdapterConfigError: it can't be a backbone.
    """
    hub_kwargs, started = hub_arguments(kwargs), time.time()
    trust = kwargs.get("trust_remote_code")
    try:
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(name, trust_remote_code=trust, **hub_kwargs)
    except Exception as error:  # a foreign configuration class may raise anything
        raise _not_loaded(name, error) from error
    check_is_encoder(config)
    if with_lm_head:
        masked_lm_class(config)
    if expected is not None:
        check_same_kind(config, expected, name)
        for field in own_fields(config) & own_fields(expected):
            if getattr(config, field, None) != getattr(expected, field, None):  # as set in `from_backbone`
                setattr(config, field, getattr(expected, field))
    take_fields(config, kwargs)
    try:
        auto_class = AutoModelForMaskedLM if with_lm_head else AutoModel
        extra = {} if with_lm_head else _without_pooler(config)
        with LOADING, without_load_report():
            loaded, info = auto_class.from_pretrained(name, config=config, output_loading_info=True, **extra, **kwargs)
    except (ImportError, TypeError, torch.OutOfMemoryError) as error:  # not caused by the backbone's files
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        known = {*KAdapterConfig.known_fields(), *own_fields(config), *HUB_ARGUMENTS, "device_map"}
        raise KAdapterConfigError(
            f"'{unknown[1]}' is neither a field of KAdapterConfig or of the backbone's configuration ({config.model_type}) nor "
            f"an argument of from_pretrained{nearest(unknown[1], known) or '.'}"
        ) from error
    except Exception as error:  # damaged files raise many types
        raise _not_loaded(name, error, kwargs.get("variant")) from error
    snapshot = snapshot_of(name, **hub_kwargs)
    if snapshot is not None:
        check_downloads(snapshot, os.fspath(name), started)
    prefix = f"{loaded.base_model_prefix}." if with_lm_head else ""
    missing = sorted(key for key in info["missing_keys"] if key.startswith(prefix))
    if missing:
        raise KAdapterLoadError(
            f"the backbone '{name}' has no weights for '{missing[0]}' (and {len(missing) - 1} more): they would be "
            "random. If it is the wrong repository, pass the right one with backbone=<folder or model>."
        )
    new = sorted(set(info["missing_keys"]) - set(missing))
    if new:
        logger.warning(f"'{name}' has no weights for its language-model head; these are new and untrained: {new}")
    return loaded


def take_fields(config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """Moves the arguments that are fields of the backbone's configuration from `kwargs` to `config`."""
    for field in kwargs.keys() & own_fields(config):
        value = kwargs.pop(field)
        if field in KIND and value != getattr(config, field):
            raise KAdapterConfigError(
                f"{field} of a backbone can't be changed when it is loaded ({getattr(config, field)} to {value}): its weights "
                "would not fit. Load it with AutoModel.from_pretrained and pass the model to from_backbone."
            )
        setattr(config, field, value)


def _not_loaded(name: Any, error: Exception, variant: str | None = None) -> KAdapterLoadError:
    hint = "Check the name and the network"
    if variant is not None:
        hint = f"variant={variant!r} applies to the backbone's files: leave it out if there are none of that name"
    return KAdapterLoadError(
        f"the backbone '{name}' can't be loaded, and a K-Adapter does not run without it. {hint}, or pass "
        f"backbone=<folder or model>. The reason: {error}"
    )


def check_same_kind(config: PreTrainedConfig, expected: PreTrainedConfig, name: Any) -> None:
    """Raises `BackboneMismatchError` if two backbones differ in type, size or vocabulary."""
    for field in KIND:
        found, wanted = getattr(config, field, None), getattr(expected, field, None)
        if found != wanted:
            raise BackboneMismatchError(
                f"the backbone '{name}' has {field} {found!r}, and this K-Adapter was made for {wanted!r}. Pass the right one "
                "with backbone=<repository, folder or model>."
            )


def check_trained_on(
    what: str, trained_on: tuple[str | None, str | None], here: tuple[str | None, str | None], ignore: bool
) -> None:
    """
    Raises `BackboneMismatchError` or, with `ignore`, warns if `what` was trained on another backbone. `trained_on` and
    `here` are the names and fingerprints of that backbone and of the present one.
    """
    wanted, found = trained_on[1], here[1]
    if wanted is None:
        logger.warning(
            f"{what} does not record the fingerprint of its backbone: that it was trained on '{here[0]}' could not be verified."
        )
    elif wanted != found:
        message = (
            f"{what} was trained on the backbone '{trained_on[0]}' with fingerprint {wanted[:12]}…; the present one, "
            f"'{here[0]}', has other weights, with fingerprint {(found or 'none')[:12]}…"
        )
        if not ignore:
            raise BackboneMismatchError(
                f"{message}. Use the right one (from_pretrained takes backbone=<folder or model>), or pass "
                "ignore_backbone_mismatch=True."
            )
        logger.warning(f"{message}; it is used nevertheless.")


def is_opaque(backbone: PreTrainedModel) -> bool:
    """Whether the weights are quantised or offloaded, and so differ from the stored ones."""
    quantised = getattr(backbone.config, "quantization_config", None) is not None
    return quantised or any(parameter.is_meta for parameter in backbone.parameters())


def load_quietly(config: KAdapterConfig, **kwargs) -> PreTrainedModel:
    """Loads the backbone that `config` names from this machine, without progress bars, to compare it with another."""
    kwargs = {key: value for key, value in kwargs.items() if key not in ("force_download", "subfolder")}
    kwargs |= {"local_files_only": True, "revision": config.backbone_revision}
    with quiet():
        return load_backbone(config.backbone_name_or_path, expected=config.backbone_config, **kwargs)


def add_lm_head(backbone: PreTrainedModel, name: str | None, **hub_kwargs) -> PreTrainedModel:
    """The backbone inside its masked-language-model class, whose head comes from the named repository."""
    if isinstance(backbone, masked_lm_class(backbone.config)):
        return copy_with_own_modules(backbone)  # the K-Adapter removes the encoder from it
    backbone = backbone.base_model
    if name is None:
        raise KAdapterLoadError("the backbone is from no repository that has its language-model head.")
    with_head = load_backbone(name, with_lm_head=True, dtype=backbone.dtype, **hub_kwargs)
    setattr(with_head, with_head.base_model_prefix, backbone)
    return with_head


def stored_backbone(
    config: PreTrainedConfig, tensors: dict[str, torch.Tensor], path: Any, **kwargs
) -> PreTrainedModel:
    """The backbone of a K-Adapter repository that stores its own. Raises `KAdapterLoadError` if `tensors` don't fit."""
    check_is_encoder(config)
    take_fields(config, kwargs)
    tensors = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    options = _without_pooler(config)
    problem = "does not fit the backbone in config.json"
    try:
        # Shapes are compared before memory is allocated, as config.json may ask for any amount of it. Names are left to
        # transformers, which maps those of its older versions.
        if config.num_hidden_layers > len(tensors):
            raise ValueError(f"{config.num_hidden_layers} layers, and {len(tensors)} tensors")
        with without_initialization(), torch.device("meta"):
            expected = _class_of(config)(config, **options).state_dict()
        common = expected.keys() & tensors.keys()
        check_tensors({name: expected[name] for name in common}, {name: tensors[name] for name in common}, path)
        with LOADING, without_load_report():
            backbone, info = _class_of(config).from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True, **options, **kwargs
            )
    except KAdapterLoadError:
        raise
    except Exception as error:  # the model's own class may raise anything
        raise damaged(path, f"{problem} ({error})") from error
    for key in ("missing_keys", "unexpected_keys"):
        if info[key]:
            raise damaged(path, f"{problem}: the tensor '{min(info[key])}' is {key.removesuffix('_keys')}")
    return backbone
