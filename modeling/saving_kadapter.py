"""Saving whole K-Adapters: `save_pretrained` of every class."""

import copy
import inspect
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, logging

from .compat_kadapter import is_remote_code
from .format_kadapter import (
    ADAPTER_FOLDER,
    BACKBONE_FILE,
    CARD_FILE,
    HEAD_FILE,
    KAdapterConfigError,
    KAdapterLoadError,
    adapter_metadata,
    code_files,
    file_of,
    fingerprint,
    is_own_class,
    part_of,
)
from .peft_kadapter import check_peft_is_saved, plain_state_dict, save_peft_adapter
from .pipelines_kadapter import custom_pipelines
from .registry_kadapter import ENTRY_MODULE, auto_map
from .replacing_kadapter import replace_files, write_json, write_tensors


logger = logging.get_logger(__name__)


def save_repository(model: Any, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Implements `KAdapterPreTrainedModel.save_pretrained`, without pushing to the Hub."""
    check_peft_is_saved(model)
    _check_target(folder, model.config.backbone_name_or_path)
    config, origins = model.config, model.origins
    state = plain_state_dict(model, state_dict)
    tied = set(model.all_tied_weights_keys)
    backbone = part_of(state, "backbone")
    # A backbone that trains is stored even if no step has changed it yet, as Trainer may load the checkpoint after later steps.
    named = None if origins.backbone_trained else origins.fingerprint_if_as_named(model.backbone, state, config)
    quantised = getattr(model.backbone.config, "quantization_config", None) is not None
    if quantised and (named is None or origins.backbone_stored):
        raise KAdapterConfigError(
            "the model can't be saved without its backbone, which was trained or is from no known repository, nor with it, "
            "as it is quantised. Load it without quantization_config, or save its adapters with save_knowledge_adapter."
        )
    saved = {
        name: tensor for name, tensor in state.items() if name not in tied and (named is None or name not in backbone)
    }
    origins.update_adapters(model, state)
    config.backbone_fingerprint = named or fingerprint(part_of(saved, "backbone").values())
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    own = next((tensor for name, tensor in saved.items() if name not in backbone), None)
    config.dtype = str(model.dtype if own is None else own.dtype).removeprefix("torch.")
    write_repository(model, folder, saved, state_dict)
    origins.backbone_stored = named is None
    origins.note_weights(state, "backbone", *(f"adapters.{name}" for name in model.adapters))


def _check_target(folder: Path, backbone: str | None) -> None:
    if folder.is_file():
        raise KAdapterLoadError(f"'{folder}' is a file; save_pretrained needs a folder.")
    if backbone and os.path.isdir(backbone) and folder.exists() and folder.samefile(backbone):
        raise KAdapterLoadError(f"'{folder}' holds the backbone, which has a config.json too. Choose another folder.")


def write_repository(
    model: Any, folder: Path, state: Mapping[str, torch.Tensor], peft_state: dict[str, torch.Tensor] | None = None
) -> None:
    """
    Replaces the repository in `folder` by one with the tensors `state`, and the class, configuration and PEFT adapter of
    `model`; the weights of the latter come from `peft_state`, by default from the model.
    """
    if folder.name.startswith("checkpoint-"):
        # To push a checkpoint, Trainer copies its weights to the parent folder, and expects the subfolder there.
        (folder.parent / ADAPTER_FOLDER).mkdir(parents=True, exist_ok=True)
    with replace_files(folder) as staging:
        _write_files(model, staging, state)
        try:
            backbone_stored = any(file_of(name) == BACKBONE_FILE for name in state)
            model.write_model_card(staging, folder, backbone_stored=backbone_stored)
        except Exception as error:  # a card is rendered from whatever users record; the weights are saved in any case
            logger.warning(f"the model card of '{folder}' could not be written, and stays as it was: {error!r}")
            (staging / CARD_FILE).unlink(missing_ok=True)
        save_peft_adapter(model, staging, peft_state)


def _write_files(model: Any, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        files.setdefault(file_of(name), {})[name] = tensor
    for file, tensors in files.items():
        metadata = {"format": "pt"}
        if file not in (HEAD_FILE, BACKBONE_FILE):
            name = Path(file).stem
            metadata = adapter_metadata(name, model.config.knowledge_adapters[name].to_dict(), tensors)
        write_tensors(folder / file, tensors, metadata)
    index = {
        "metadata": {
            "total_parameters": sum(tensor.numel() for tensor in state.values()),
            "total_size": sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
            "fingerprints": {file: fingerprint(tensors.values()) for file, tensors in files.items()},
        },
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
    config = copy.deepcopy(model.config)
    config.auto_map = auto_map(type(model))
    pipelines = custom_pipelines(type(model))
    if pipelines:
        config.custom_pipelines = pipelines
    dtype = model.origins.backbone_dtype or model.backbone.dtype
    config.backbone_config.dtype = dtype if dtype.is_floating_point else None
    config.backbone_config.__dict__.pop("quantization_config", None)  # the named backbone has not been quantised
    _copy_code(model, folder, config)
    write_json(folder / CONFIG_NAME, json.loads(config.to_json_string()))


def _copy_code(model: Any, folder: Path, config: Any) -> None:
    """Copies this folder's modules, and those of a user's own head and fusion, if `register_for_auto_class` was called."""
    if type(model).is_remote_code() and not is_own_class(type(model)):
        for path in map(Path, custom_object_save(model, folder, config=config) or ()):
            _copy_own(path, path)
    # A module that defines the head too is still being imported when this line runs: `__name__` exists even then.
    importing, own = "from .{} import __name__ as own_fusion  # noqa: E402, F401\n", _own_fusion(type(model.fusion))
    if own is not None:
        _copy_own(own, folder / own.name)
    for path in code_files():
        if path.stem == ENTRY_MODULE:
            # The code of a loaded repository may have the line already, of this fusion or of another.
            text = re.sub(importing.format(".+"), "", path.read_text(encoding="utf-8"))
            text += "" if own is None else importing.format(own.stem)
            (folder / path.name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(path, folder / path.name)


def _own_fusion(fusion: Any) -> Path | None:
    """The file of a user's own fusion that travels with the model."""
    if is_own_class(fusion) or not (fusion.travels or is_remote_code(fusion.__module__)):
        return None
    if fusion.__module__ == "__main__":
        logger.warning(
            f"{fusion.__name__} is not saved with the model, as it is defined in __main__: define it in a module."
        )
        return None
    return Path(inspect.getfile(fusion))


def _copy_own(source: Path, target: Path) -> None:
    """Copies a user's module. In a repository, the package's modules are beside it."""
    text = source.read_text(encoding="utf-8")
    text = re.sub(r"^from kadapter_hf import", f"from .{ENTRY_MODULE} import", text, flags=re.MULTILINE)
    target.write_text(text, encoding="utf-8")
