"""Loading whole K-Adapters: `from_backbone` and `from_pretrained` of every class."""

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, is_peft_available, logging

from .adapters_kadapter import KnowledgeAdapter
from .backbone_kadapter import (
    add_lm_head,
    check_is_encoder,
    check_same_kind,
    check_trained_on,
    drop_pooler,
    is_opaque,
    load_backbone,
    stored_backbone,
)
from .compat_kadapter import attn_implementation_of, take_auto_arguments, without_initialization
from .configuration_kadapter import KAdapterConfig, KnowledgeAdapterConfig, own_fields
from .format_kadapter import (
    BACKBONE_FILE,
    HEAD_FILE,
    PEFT_CONFIG,
    KAdapterConfigError,
    KAdapterLoadError,
    fingerprint,
    locate,
    part_of,
)
from .origins_kadapter import Origins
from .peft_kadapter import peft_hub_kwargs, plain_state_dict
from .reading_kadapter import (
    SavedAdapter,
    check_peft_settled,
    check_tensors,
    read_config,
    read_config_dict,
    read_file,
    read_index,
    read_json,
    read_repository_adapters,
)
from .registry_kadapter import HEADS
from .sources_kadapter import commit_of, hub_arguments, repository_folder


logger = logging.get_logger(__name__)


def load_on_backbone(model_class: Any, backbone: Any, adapters: Any, fusion: str, kwargs: dict[str, Any]) -> Any:
    """Implements `KAdapterPreTrainedModel.from_backbone`."""
    fields = KAdapterConfig.known_fields() - {"dtype", "attn_implementation"}
    config_kwargs = {key: kwargs.pop(key) for key in list(kwargs) if key in fields}
    hub_kwargs = hub_arguments(kwargs)
    _check_arguments(kwargs)
    if isinstance(backbone, PreTrainedModel):
        if kwargs:
            raise KAdapterConfigError(f"{sorted(kwargs)} can't be used with a backbone that is already loaded.")
        check_is_encoder(backbone.config, type(backbone.base_model))
        drop_pooler(backbone)
        source = backbone.config.name_or_path
        name, revision, as_stored = backbone_place(source) if source else None, None, False
        loaded = add_lm_head(backbone, name) if model_class.needs_lm_head else backbone
    else:
        name = backbone_place(backbone)
        loaded = load_backbone(name, with_lm_head=model_class.needs_lm_head, **kwargs)
        revision = commit_of(name, **hub_kwargs)
        as_stored = kwargs.get("dtype") in (None, "auto") and not kwargs.keys() & {"quantization_config", "device_map"}
    config = model_class.config_class(
        backbone_name_or_path=name,
        backbone_revision=revision,
        backbone_config=copy.deepcopy(loaded.base_model.config),  # the model resets the attention in its own
        fusion=fusion,
        attn_implementation=kwargs.get("attn_implementation"),
        **config_kwargs,
    )
    model = model_class(config, loaded)
    for part in ("backbone", "head") if model_class.needs_lm_head else ("backbone",):
        model.origins.sources[part] = name or "a loaded model"
    _settle(model, kwargs, kwargs.get("dtype"))
    state = plain_state_dict(model)
    model.origins.note_weights(state, "backbone")
    named = None if as_stored else model.origins.fingerprint_if_as_named(model.backbone, state, model.config)
    model.config.backbone_fingerprint = named or model.origins.fingerprints.get("backbone")
    for adapter_name, source in _named_sources(adapters):
        if source is None or isinstance(source, dict) or type(source).__name__ == KnowledgeAdapterConfig.__name__:
            model.add_knowledge_adapter(adapter_name, source)
        else:
            model.load_knowledge_adapter(source, adapter_name, **hub_arguments(hub_kwargs, ("revision", "subfolder")))
    _cast_own_parts(model, kwargs.get("dtype"))
    return model.eval()


def _named_sources(adapters: Any) -> list[tuple[str | None, Any]]:
    if adapters is None:
        return []
    if isinstance(adapters, dict):
        return list(adapters.items())
    if isinstance(adapters, (str, os.PathLike)):
        return [(None, adapters)]
    if not isinstance(adapters, Iterable):
        raise KAdapterConfigError(
            "adapters must be a repository, a folder or a file, a list of them, or a dict from names to them or to "
            f"configurations of new adapters; not {type(adapters).__name__}."
        )
    return [(None, source) for source in adapters]


def backbone_place(backbone: Any) -> str:
    """What a configuration records as `backbone_name_or_path`: a repository id, or the absolute path of a folder."""
    if type(backbone).__module__.startswith("peft."):
        raise KAdapterConfigError(
            "a model that PEFT has wrapped can't be a backbone. Pass the result of its merge_and_unload(), which contains "
            "PEFT's weights; or that of its unload(), and call add_adapter of the K-Adapter."
        )
    if not isinstance(backbone, (str, os.PathLike)):
        raise KAdapterConfigError(
            f"a backbone is a repository, a folder or a loaded model of transformers, not {type(backbone).__name__}."
        )
    return os.path.abspath(backbone) if os.path.isdir(backbone) else os.fspath(backbone)


def _check_arguments(kwargs: dict[str, Any]) -> None:
    """Refuses arguments of `from_pretrained` that would replace the backbone's own files, and renames `torch_dtype`."""
    former = kwargs.pop("torch_dtype", None)
    if former is not None:
        kwargs["dtype"] = former
    for name in ("state_dict", "gguf_file"):
        if kwargs.get(name) is not None:
            raise KAdapterConfigError(
                f"a K-Adapter can't be loaded with {name}=: its weights and its backbone's are in different files. Load the "
                "backbone yourself and pass the model, or call load_state_dict of the loaded K-Adapter."
            )


def load_repository(
    model_class: Any,
    source: str | os.PathLike,
    model_args: tuple,
    config: Any,
    backbone: Any,
    ignore_backbone_mismatch: bool,
    ignore_mismatched_sizes: bool,
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """Implements `KAdapterPreTrainedModel.from_pretrained`; also returns the loading info of transformers."""
    hub_kwargs = hub_arguments(kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key not in hub_kwargs}
    _check_arguments(kwargs)
    source, folder, peft_source = _find(source, take_auto_arguments(kwargs), hub_kwargs)
    check_peft_settled(folder)
    config, saved_class, kwargs = _read_config(model_class, folder, config, kwargs)
    dtype = kwargs.get("dtype")
    config.name_or_path = os.fspath(source)
    files, fingerprints = read_index(folder)
    adapters = read_repository_adapters(folder, config, files, fingerprints)
    stored_parts = {name.partition(".")[0] for name in files.get(HEAD_FILE, ())}
    head_is_lm = saved_class == model_class.__name__ and "lm_head" in stored_parts
    lm_head_from_backbone = model_class.needs_lm_head and not head_is_lm
    hub_kwargs = hub_arguments(hub_kwargs, ("revision", "subfolder"))
    stored = None
    if BACKBONE_FILE in files:
        stored = read_file(folder, BACKBONE_FILE, files[BACKBONE_FILE], fingerprints.get(BACKBONE_FILE))
    loaded, now = _load_its_backbone(
        config, backbone, stored, lm_head_from_backbone, ignore_backbone_mismatch, hub_kwargs, kwargs
    )
    with without_initialization():  # allocates memory without touching it; the tensors of the files replace it
        model = model_class(config, loaded, *model_args)
    origins = model.origins
    if now is not None:
        origins.fingerprints["backbone"] = now
    origins.backbone_stored = stored is not None
    in_repository = backbone is None and stored is not None
    origins.sources["backbone"] = source if in_repository else config.backbone_name_or_path or "a loaded model"
    for file, saved in adapters.items():
        fill_adapter(model.adapters[saved.name], saved, locate(folder, file))
        origins.fingerprints[f"adapters.{saved.name}"] = saved.fingerprint
        origins.sources[f"adapters.{saved.name}"] = source
    found: dict[str, torch.Tensor] = {}
    if HEAD_FILE in files:
        found = read_file(folder, HEAD_FILE, files[HEAD_FILE], fingerprints.get(HEAD_FILE))
    path = locate(folder, HEAD_FILE)
    check_tensors(model.fusion.state_dict(prefix="fusion."), part_of(found, "fusion"), path)
    model.load_state_dict(part_of(found, "fusion"), strict=False, assign=True)
    origins.sources["fusion"] = source
    head = {name: tensor for name, tensor in found.items() if not name.startswith("fusion.")}
    missing, unexpected = _load_head(
        model, head, path, saved_class, without_lm_head=lm_head_from_backbone, ignore_sizes=ignore_mismatched_sizes
    )
    if lm_head_from_backbone:
        origins.sources["head"] = origins.sources["backbone"]
    elif not missing:
        origins.sources["head"] = source
    _settle(model, hub_kwargs | kwargs, dtype)
    model.eval()
    if peft_source is not None:
        model.load_adapter(peft_source, use_safetensors=True, **peft_hub_kwargs(hub_kwargs))
    return model, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": set(), "error_msgs": []}


def _find(
    source: str | os.PathLike, peft_source: Any, hub_kwargs: dict[str, Any]
) -> tuple[str | os.PathLike, Path, str | os.PathLike | None]:
    """The K-Adapter to load, its folder, and the source of the PEFT adapter to load into it, if there is one."""
    folder = repository_folder(source, **hub_kwargs)
    if peft_source is not None or not (folder / PEFT_CONFIG).is_file():
        return source, folder, peft_source
    if not is_peft_available():
        logger.warning(
            f"'{source}' has an adapter of PEFT, which is left out, as PEFT is not installed: pip install peft"
        )
        return source, folder, None
    if not (folder / CONFIG_NAME).exists():
        content = read_json(folder / PEFT_CONFIG)
        base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        if base:
            return base, repository_folder(base, **hub_arguments(hub_kwargs, ("revision", "subfolder"))), source
    return source, folder, source


def _read_config(
    model_class: Any, folder: Path, config: Any, kwargs: dict[str, Any]
) -> tuple[KAdapterConfig, str | None, dict[str, Any]]:
    """The configuration, the class that was saved, and the arguments that are not the configuration's own."""
    config_class = model_class.config_class
    saved = read_config_dict(folder)
    dtype = kwargs.pop("dtype", None)
    if isinstance(config, config_class):
        config = copy.deepcopy(config)
    elif isinstance(config, PreTrainedConfig):  # the same class, from the code of a repository
        config = config_class.from_dict(config.to_dict(), attn_implementation=attn_implementation_of(config))
    elif config is not None:
        config = config_class.from_pretrained(config)
    else:
        config = read_config(folder)
        of_backbone = own_fields(config.backbone_config) - config_class.__dataclass_fields__.keys()
        given = {key: kwargs.pop(key) for key in kwargs.keys() - of_backbone}
        if given:
            config, unused = config_class.from_dict(saved, return_unused_kwargs=True, **given)
            kwargs |= unused
    if dtype is None and config.dtype is not None and str(config.dtype).removeprefix("torch.") != saved.get("dtype"):
        dtype = config.dtype  # the Auto classes of transformers 5.5 move the argument there
    architectures = saved.get("architectures")
    saved_class = architectures[0] if isinstance(architectures, list) and architectures else None
    return config, saved_class, kwargs | {"dtype": dtype}


def _load_its_backbone(
    config: KAdapterConfig,
    given: Any,
    stored: dict[str, torch.Tensor] | None,
    with_lm_head: bool,
    ignore_backbone_mismatch: bool,
    hub_kwargs: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, str | None]:
    """The backbone of a repository, after checking that it is the right one, and its fingerprint as loaded."""
    attn_implementation = kwargs.pop("attn_implementation", None) or attn_implementation_of(config)
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    if kwargs.get("dtype") in (None, "auto"):
        kwargs["dtype"] = config.backbone_config.dtype or "auto"
    trained_on = config.backbone_name_or_path
    if isinstance(given, PreTrainedModel):
        check_same_kind(given.config, config.backbone_config, given.config.name_or_path)
        drop_pooler(given)
        loaded: Any = given if with_lm_head else given.base_model
    elif given is None and stored is not None:
        options = {key: value for key, value in kwargs.items() if key not in ("trust_remote_code", "use_safetensors")}
        loaded = stored_backbone(config.backbone_config, stored, f"{config.name_or_path}/{BACKBONE_FILE}", **options)
    elif given is None and trained_on is None:
        raise KAdapterLoadError(
            f"'{config.name_or_path}' names no backbone and has none. Pass it with backbone=<folder or model>."
        )
    else:
        if given is not None:
            config.backbone_name_or_path, config.backbone_revision = backbone_place(given), None
        options = {
            "expected": config.backbone_config,
            "with_lm_head": with_lm_head,
            "revision": config.backbone_revision,
        }
        loaded = load_backbone(config.backbone_name_or_path, **options, **hub_kwargs, **kwargs)
    now = None if is_opaque(loaded.base_model) else fingerprint(loaded.base_model.state_dict().values())
    found = now if given is not None or stored is None else fingerprint(stored.values())
    hub_kwargs |= {key: kwargs[key] for key in ("use_safetensors",) if key in kwargs}
    expected = config.backbone_fingerprint
    if expected is not None and found != expected:  # it may have been cast
        origins = Origins()
        origins.backbone_kwargs = hub_kwargs
        state = {f"backbone.{key}": tensor for key, tensor in loaded.base_model.state_dict().items()}
        found = origins.fingerprint_if_as_named(loaded.base_model, state, config) or found
    here = (config.backbone_name_or_path, found)
    check_trained_on(f"'{config.name_or_path}'", (trained_on, expected), here, ignore_backbone_mismatch)
    config.backbone_fingerprint = found
    if with_lm_head:
        loaded = add_lm_head(loaded, config.backbone_name_or_path, revision=config.backbone_revision, **hub_kwargs)
    return loaded, now


def fill_adapter(adapter: KnowledgeAdapter, saved: SavedAdapter, path: Path) -> None:
    """Makes the tensors of an adapter file the adapter's own, after checking that they fit."""
    prefix = f"adapters.{saved.name}."
    check_tensors(adapter.state_dict(prefix=prefix), saved.tensors, path)
    adapter.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in saved.tensors.items()}, assign=True)


def _load_head(
    model: Any,
    head: Mapping[str, torch.Tensor],
    path: Path,
    saved_class: str | None,
    *,
    without_lm_head: bool,
    ignore_sizes: bool,
) -> tuple[set[str], set[str]]:
    """
    Loads the task head from the tensors of a repository, or initialises a new one. Returns the names of new tensors, and
    of unused ones, which belong to another class.

    Args:
        without_lm_head: the language-model head has been loaded from the backbone's repository.
        ignore_sizes: initialise the tensors whose shapes differ.
    """
    wanted = {
        name: tensor
        for name, tensor in model.head_state_dict().items()
        if not (without_lm_head and name.startswith("lm_head."))
    }
    unused: set[str] = set()
    # A user-defined subclass keeps its parent's saved head.
    if saved_class not in {kind.__name__ for kind in type(model).__mro__}:
        if head and wanted and saved_class not in (None, "KAdapterModel", *HEADS):
            raise KAdapterLoadError(
                f"'{path.parent}' has the head of a class {saved_class!r}, which is not known here, and "
                f"{type(model).__name__} would replace it by an untrained one. Import the module that defines it and use "
                f"{saved_class}.from_pretrained or register_head; or, if the repository has its code, load it with "
                "trust_remote_code=True where kadapter_hf was not imported. For the knowledge without the head, load it with "
                "KAdapterModel."
            )
        unused, head = set(head), {}
    if ignore_sizes:
        head = {name: tensor for name, tensor in head.items() if wanted.get(name, tensor).shape == tensor.shape}
    # Load the head completely or not at all, except tensors skipped above.
    expected = {name: own for name, own in wanted.items() if name in head or (head and not ignore_sizes)}
    advice = (
        "Download or save the model again; or, for a head of another size (another num_labels, say), pass "
        "ignore_mismatched_sizes=True, which initialises what differs."
    )
    check_tensors(expected, head, path, advice)
    if head:
        model.load_state_dict(head, strict=False, assign=True)
    model.tie_weights()
    new = [name for name in wanted if name not in head]
    children = dict(model.named_children())
    for part in {name.partition(".")[0]: None for name in new}:
        if part in children:  # other tensors have the value that the head's constructor gave them
            children[part].to(model.own_dtype()).apply(model._init_weights)
    if new:
        logger.warning(
            f"{type(model).__name__}: '{path.parent}' has no weights for {sorted(new)}: they are new and untrained. Train "
            "them on a downstream task before you predict with them."
        )
    return set(new), unused


def _settle(model: Any, kwargs: dict[str, Any], dtype: Any) -> None:
    """Moves and casts all parts, and records how to load the named backbone again."""
    model.origins.backbone_kwargs = {
        key: kwargs[key] for key in ("cache_dir", "token", "use_safetensors") if key in kwargs
    }
    model.move_own_parts(model.own_device())
    _cast_own_parts(model, dtype)
    places = getattr(model.backbone, "hf_device_map", {})
    if len(set(places.values())) > 1:  # tells Trainer that the model is spread over devices
        model.hf_device_map = {f"backbone.{name}".rstrip("."): place for name, place in places.items()}


def _cast_own_parts(model: Any, dtype: Any) -> None:
    """Casts everything but the backbone to the requested dtype."""
    if dtype in (None, "auto"):
        model.config.dtype = model.own_dtype()
        return
    model.config.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model.move_own_parts(model.config.dtype)
    model.origins.note_weights(plain_state_dict(model), *(f"adapters.{name}" for name in model.adapters))
