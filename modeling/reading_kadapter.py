"""Reading the files of a K-Adapter repository, with checks that they hold what was saved."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, logging

from .compat_kadapter import decode_floats
from .configuration_kadapter import KAdapterConfig, KnowledgeAdapterConfig
from .format_kadapter import (
    BACKBONE_FILE,
    FORMAT_VERSION,
    HEAD_FILE,
    METADATA_KEY,
    PEFT_FILES,
    STAGING,
    KAdapterConfigError,
    KAdapterLoadError,
    SavedConfigError,
    adapter_path,
    damaged,
    file_of,
    fingerprint,
    is_moving,
    locate,
    metadata_checksum,
    obsolete_files,
)


logger = logging.get_logger(__name__)
_MAX_JSON_BYTES = 64 * 2**20


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `KAdapterLoadError` if it is missing, unreadable, larger than 64 MB, or not JSON."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
    except FileNotFoundError as error:
        raise damaged(path, f"is missing: '{path.parent}' is not a complete K-Adapter") from error
    except OSError as error:
        raise damaged(path, f"can't be read ({error})") from error
    if len(content) > _MAX_JSON_BYTES:
        raise damaged(path, f"is larger than {_MAX_JSON_BYTES // 2**20} MB: not a file of a K-Adapter")
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"is not valid JSON ({error})") from error


def read_config_dict(folder: Path, source: Any = None) -> dict[str, Any]:
    """The content of a K-Adapter's config.json; `source` is the name of the repository in errors."""
    config = read_json(locate(folder, CONFIG_NAME))
    if not isinstance(config, dict):
        raise damaged(folder / CONFIG_NAME, "is not a JSON object")
    if config.get("model_type") != KAdapterConfig.model_type:
        raise KAdapterLoadError(
            f"'{source or folder}' holds a {config.get('model_type')!r} model, not a K-Adapter. To put knowledge adapters on "
            "it, use from_backbone."
        )
    return decode_floats(config)


def read_config(folder: Path, source: Any = None) -> KAdapterConfig:
    """As `read_config_dict`, as an object. Raises `KAdapterConfigError` if a field has an impossible value."""
    config = read_config_dict(folder, source)
    try:
        return KAdapterConfig.from_dict(config)
    except KAdapterConfigError as error:
        path = locate(folder, CONFIG_NAME)
        raise SavedConfigError(f"'{path}': {error} Download or save the model again, or correct the field.") from error


def read_index(folder: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The shard index, `{file: [tensor names]}`, and `{file: fingerprint}`."""
    path = locate(folder, SAFE_WEIGHTS_INDEX_NAME)
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise damaged(path, "has no weight_map")
    files: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        try:
            expected = file_of(tensor)
        except KAdapterConfigError as error:
            raise damaged(path, f"lists the tensor '{tensor[:100]}': {error}") from error
        if file != expected:
            raise damaged(
                path, f"lists the tensor '{tensor[:100]}' in {str(file)[:100]!r}; in a K-Adapter it is in '{expected}'"
            )
        files.setdefault(file, []).append(tensor)
    metadata = index.get("metadata")
    fingerprints = metadata.get("fingerprints") if isinstance(metadata, dict) else None
    return files, fingerprints if isinstance(fingerprints, dict) else {}


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, memory-mapped, and its metadata."""
    if not path.is_file():
        raise damaged(path, "is missing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors raises several types, e.g. for dtypes unknown to torch
        raise damaged(path, f"is damaged, or not a safetensors file ({error})") from error
    return tensors, metadata


def read_file(folder: Path, file: str, names: list[str], expected: str | None) -> dict[str, torch.Tensor]:
    """The tensors of one file of a repository, after checking their names and fingerprint against those in the index."""
    path = locate(folder, file)
    tensors, _ = read_tensors(path)
    check_names(path, tensors, names)
    if expected is not None:
        check_fingerprint(path, tensors, expected)
    return tensors


def check_fingerprint(path: Path, tensors: Mapping[str, torch.Tensor], expected: str) -> None:
    if fingerprint(tensors.values()) != expected:
        raise damaged(
            path,
            "does not hold what was saved: a tensor in it is missing, or has another dtype, shape or other values",
        )


def check_names(path: Path, tensors: Iterable[str], names: Iterable[str]) -> None:
    """Raises `KAdapterLoadError` unless a file holds exactly the tensors that the index lists for it."""
    for problem, odd in (("missing", set(names) - set(tensors)), ("not in the index", set(tensors) - set(names))):
        if odd:
            more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
            raise damaged(path, f"and the index are from different saves: tensor '{min(odd)}' is {problem}{more}")


def check_tensors(
    expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], path: Path, advice: str | None = None
) -> None:
    """
    Raises `KAdapterLoadError` unless the `tensors` of the file `path` have the names, shapes and kinds of dtype of the
    `expected` ones, which may be on the meta device. The message ends with `advice`.
    """
    problems = []
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            problems.append(f"tensor '{name}' is missing")
        elif name not in expected:
            problems.append(f"tensor '{name}' is not part of the model that is described")
        elif tensors[name].shape != expected[name].shape:
            problems.append(
                f"tensor '{name}' has shape {tuple(tensors[name].shape)}, and the model needs {tuple(expected[name].shape)}"
            )
        elif tensors[name].is_floating_point() != expected[name].is_floating_point():
            kind = "a floating-point" if expected[name].is_floating_point() else "an integer"
            problems.append(f"tensor '{name}' has dtype {tensors[name].dtype}, and the model needs {kind} one")
    if problems:
        more = [f"{len(problems) - 20} more"] if len(problems) > 20 else []
        raise damaged(path, f"does not fit: {'; '.join(problems[:20] + more)}", advice)


class SavedAdapter(NamedTuple):
    """The content of an adapter file; the names of `tensors` start with `adapters.<name>.`."""

    name: str
    config: KnowledgeAdapterConfig
    tensors: dict[str, torch.Tensor]
    fingerprint: str


def read_adapter_metadata(metadata: Mapping[str, str], path: Any) -> tuple[str, KnowledgeAdapterConfig, str]:
    """The name, configuration and fingerprint of an adapter, from the header of the file `path`."""
    if METADATA_KEY not in metadata:
        raise KAdapterLoadError(
            f"'{path}' has no '{METADATA_KEY}' metadata: it is not the file of a knowledge adapter, or it was rewritten by a "
            "tool that drops metadata. Save it with save_knowledge_adapter."
        )
    try:
        content = json.loads(metadata[METADATA_KEY])
        checksum = content.pop("checksum")
        if content["format_version"] > FORMAT_VERSION:
            logger.warning(f"'{path}' was written by a newer version of kadapter-hf; upgrade if it does not load.")
        if checksum != metadata_checksum(content):
            raise ValueError("its checksum differs")
        config = KnowledgeAdapterConfig.from_dict(decode_floats(content["config"]))
        return content["name"], config, content["fingerprint"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"has '{METADATA_KEY}' metadata that was changed or damaged ({error})") from error


def read_adapter(path: Path) -> SavedAdapter:
    """Reads an adapter file. Raises `KAdapterLoadError` if it is missing, damaged or changed, or of another kind."""
    tensors, metadata = read_tensors(path)
    name, config, expected = read_adapter_metadata(metadata, path)
    # Checked before anything of that size is built.
    if len(config.backbone_layers or ()) * max(config.num_hidden_layers, 1) > len(tensors):
        raise damaged(path, f"has {len(tensors)} tensors, too few for the layers that its metadata describes")
    for tensor, value in tensors.items():
        if not tensor.startswith(f"adapters.{name}."):
            raise damaged(path, f"has a tensor '{tensor}', which does not belong to the adapter '{name}'")
        if not value.is_floating_point():
            raise damaged(path, f"has a tensor '{tensor}' of dtype {value.dtype}, not a floating-point one")
    check_fingerprint(path, tensors, expected)
    return SavedAdapter(name, config, tensors, expected)


def read_repository_adapters(
    folder: Path, config: KAdapterConfig, files: dict[str, list[str]], fingerprints: dict[str, str]
) -> dict[str, SavedAdapter]:
    """
    The adapters of a repository by file, after checking that files, index and config.json agree. Call it before building
    a model: config.json alone could ask for any amount of memory.
    """
    adapters = {}
    for file in {adapter_path(name): None for name in config.knowledge_adapters} | files:
        if file in (HEAD_FILE, BACKBONE_FILE):
            continue
        path = locate(folder, file)
        saved = read_adapter(path)
        check_names(path, saved.tensors, files.get(file, []))
        here = config.knowledge_adapters.get(saved.name)
        same = here is not None and here.to_json() == saved.config.to_json()
        if saved.name != path.stem or not same or fingerprints.get(file) not in (None, saved.fingerprint):
            raise damaged(
                path,
                f"and config.json don't agree about the adapter '{path.stem}': they are from different saves",
                "Load the file with load_knowledge_adapter, or download or save the model again.",
            )
        adapters[file] = saved
    return adapters


def adapter_names(folder: Path) -> list[str]:
    """The names of the adapters in a folder, also if replacing them was interrupted."""
    places = [folder, folder / STAGING] if is_moving(folder / STAGING) else [folder]
    names = {path.stem for place in places for path in place.glob(adapter_path("*"))}
    obsolete = obsolete_files(places[-1])
    return sorted(name for name in names if adapter_path(name) not in obsolete)


def check_peft_settled(folder: Path) -> None:
    """Refuses a folder whose PEFT files an interrupted save was replacing: PEFT reads them without `locate`."""
    staging = folder / STAGING
    obsolete = obsolete_files(staging)
    if is_moving(staging) and any((staging / file).exists() or file in obsolete for file in PEFT_FILES):
        raise KAdapterLoadError(
            f"'{folder}': saving was interrupted while its files, a PEFT adapter's among them, were being replaced. "
            f"Complete it with kadapter_hf.modeling.replacing_kadapter.finish_replacing(Path({str(folder)!r})), then load "
            "again."
        )
