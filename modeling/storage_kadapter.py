"""
A K-Adapter repository on disk: what its files are, how they are checked, and how they are replaced safely.

A repository, a local folder and a Trainer checkpoint are the same thing:

    config.json                    the configuration
    model.safetensors.index.json   the standard shard index, plus a fingerprint for each file
    adapters/<name>.safetensors    one knowledge adapter; its metadata makes it usable on its own
    head.safetensors               fusion and task head
    backbone.safetensors           only a backbone that differs from the one that config.json names
    *.py                           the code of this folder
    README.md                      the model card
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, logging

from .configuration_kadapter import KAdapterConfig, KAdapterConfigError, KnowledgeAdapterConfig, check_adapter_name


logger = logging.get_logger(__name__)

HEAD_FILE = "head.safetensors"
BACKBONE_FILE = "backbone.safetensors"
ADAPTER_FOLDER = "adapters"
METADATA_KEY = "kadapter"
FORMAT_VERSION = 1
STAGING = ".kadapter-saving"
OBSOLETE = "obsolete.json"
# What PEFT adds to the repository of a model that it has changed.
PEFT_CONFIG = "adapter_config.json"
PEFT_FILES = (PEFT_CONFIG, "adapter_model.safetensors")

_ADAPTER_FILE = re.compile(rf"{ADAPTER_FOLDER}/[A-Za-z0-9_-]+\.safetensors")
_MAX_JSON_BYTES = 64 * 2**20
# What a fingerprint looks at in each tensor: all of a small one, else this many blocks of this many elements.
_BLOCKS, _BLOCK = 3, 512


class KAdapterLoadError(OSError):
    """A repository or adapter file is missing, damaged, or not what was asked for; the message says which and how to go on."""


class BackboneMismatchError(KAdapterLoadError):
    """The backbone is not the one that the K-Adapter or the adapter was trained on."""


# ---- Fingerprints ---------------------------------------------------------------------------------------------------


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= _BLOCKS * _BLOCK:
        return flat
    stride = (flat.numel() - _BLOCK) // (_BLOCKS - 1)
    return flat.as_strided((_BLOCKS, _BLOCK), (stride, 1), flat.storage_offset())


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """
    Identifies a set of weights: SHA-256 over each tensor's dtype, shape and a fixed sample of its values.

    Of a tensor with up to 1,536 elements every value counts; of a larger one the first, the middle and the last 512, so
    that it costs milliseconds even for weights that are only mapped into memory. Names don't count: transformers renames
    parameters between versions. It tells apart weights that were trained differently; it is not a checksum.
    """
    digests = []
    for tensor in tensors:
        sample = _sample(tensor).contiguous().cpu().view(torch.uint8).numpy()
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(sample)
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def equal_bits(tensors: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit, once `reference` is cast to the dtype of `tensors`."""
    if tensors.keys() != reference.keys():
        return False
    for name, tensor in tensors.items():
        other = reference[name]
        if tensor.shape != other.shape:
            return False
        other = other.to(device=tensor.device, dtype=tensor.dtype)
        # Bits, not values: NaN is not equal to itself, and 0.0 is to -0.0. Flat, as a scalar has no other view.
        if not torch.equal(*(t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (tensor, other))):
            return False
    return True


# ---- Reading --------------------------------------------------------------------------------------------------------


def locate(folder: Path, name: str) -> Path:
    """
    The path of a repository's file, also when the process that was replacing the files was killed halfway.

    `replace_files` first writes everything to a staging folder, then moves config.json, then the rest. So a staging
    folder that still has its config.json was never begun to be moved, and what it holds does not count; in one without,
    what is still there is newer than what is beside it.
    """
    staging = folder / STAGING
    return staging / name if _is_moving(staging) and (staging / name).exists() else folder / name


def _is_moving(staging: Path) -> bool:
    """Whether the move of a staging folder's files to where they belong has begun, and was interrupted."""
    return staging.is_dir() and not (staging / CONFIG_NAME).exists()


def _obsolete(staging: Path) -> list[str]:
    """The files of the old model that the new one, in this staging folder, does not have."""
    try:
        names = json.loads((staging / OBSOLETE).read_text(encoding="utf-8"))
        known = (BACKBONE_FILE, HEAD_FILE, *PEFT_FILES)
        return [name for name in names if name in known or _ADAPTER_FILE.fullmatch(name)]
    except (OSError, ValueError, TypeError):
        return []


def check_peft_settled(folder: Path) -> None:
    """
    PEFT reads its files itself, where they are: it would not see which of them an interrupted save was about to replace.

    Raises:
        KAdapterLoadError: that is the state of this folder.
    """
    staging = folder / STAGING
    if _is_moving(staging) and any((staging / file).exists() or file in _obsolete(staging) for file in PEFT_FILES):
        raise KAdapterLoadError(
            f"'{folder}': saving was interrupted when all files were written and being moved, a PEFT adapter's among "
            f"them. Complete it with kadapter_hf.modeling.storage_kadapter.finish_replacing(Path({str(folder)!r})), and "
            "load again."
        )


def read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise KAdapterLoadError(
                f"'{path}' is larger than {_MAX_JSON_BYTES // 2**20} MB: not a file of a K-Adapter."
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except KAdapterLoadError:
        raise
    except FileNotFoundError as error:
        raise KAdapterLoadError(
            f"'{path}' is missing: '{path.parent}' is not a whole K-Adapter. Download or save the model again."
        ) from error
    except OSError as error:
        raise KAdapterLoadError(f"'{path}' can't be read ({error}); download or save the model again.") from error
    except (ValueError, RecursionError) as error:
        raise KAdapterLoadError(f"'{path}' is not valid JSON ({error}); download or save the model again.") from error


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    All tensors of a safetensors file, mapped into memory and not yet read, and its metadata.

    Raises:
        KAdapterLoadError: the file is missing or damaged, or a tensor in it is not of a floating-point dtype.
    """
    if not path.is_file():
        raise KAdapterLoadError(f"'{path}' is missing; download or save the model again.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors raises this or that, such as for a dtype that torch has not
        raise KAdapterLoadError(
            f"'{path}' is damaged, or not a safetensors file ({error}); download or save it again."
        ) from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.startswith("backbone."):
            raise KAdapterLoadError(
                f"'{path}': tensor '{name}' has dtype {tensor.dtype}, not a floating-point one. Download or save it again."
            )
    return tensors, metadata


def read_index(folder: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """
    The shard index: `{file: [tensor names]}` and `{file: fingerprint}`.

    Raises:
        KAdapterLoadError: it is missing or damaged, or names a file that no K-Adapter repository has.
    """
    path = locate(folder, SAFE_WEIGHTS_INDEX_NAME)
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise KAdapterLoadError(f"'{path}' has no weight_map; download or save the model again.")
    files: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        try:
            right = file_of(tensor)
        except KAdapterLoadError as error:
            raise KAdapterLoadError(f"'{path}': {error} Download or save the model again.") from error
        if file != right:
            raise KAdapterLoadError(
                f"'{path}' says that tensor '{tensor[:100]}' is in {str(file)[:100]!r}; a K-Adapter has it in "
                f"'{right}'. Download or save the model again."
            )
        files.setdefault(file, []).append(tensor)
    metadata = index.get("metadata")
    fingerprints = metadata.get("fingerprints") if isinstance(metadata, dict) else None
    return files, fingerprints if isinstance(fingerprints, dict) else {}


def part_of(state_dict: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """The tensors of one part (`"backbone"`, `"adapters.<name>"`), under their full names."""
    return {name: tensor for name, tensor in state_dict.items() if name.startswith(f"{part}.")}


def check_tensors(expected: Mapping[str, torch.Size], tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """
    Raises:
        KAdapterLoadError: a tensor is missing, not expected, or of another shape; the message names it.
    """
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise KAdapterLoadError(f"'{path}': tensor '{name}' is missing. Download or save the model again.")
        if name not in expected:
            raise KAdapterLoadError(
                f"'{path}': tensor '{name}' is not part of the model that is described. Download or save it again."
            )
        if tensors[name].shape != expected[name]:
            raise KAdapterLoadError(
                f"'{path}': tensor '{name}' has shape {tuple(tensors[name].shape)}, and the model needs "
                f"{tuple(expected[name])}. Download or save it again."
            )


def file_of(tensor: str) -> str:
    """The file of a repository that holds the tensor of this name."""
    part, _, rest = tensor.partition(".")
    if part == "backbone":
        return BACKBONE_FILE
    if part == "adapters":
        name = rest.partition(".")[0]
        try:
            return f"{ADAPTER_FOLDER}/{check_adapter_name(name)}.safetensors"
        except KAdapterConfigError as error:
            raise KAdapterLoadError(f"tensor '{tensor[:100]}': {error}") from error
    return HEAD_FILE


def read_file(folder: Path, file: str, names: list[str], expected: str | None) -> dict[str, torch.Tensor]:
    """
    The tensors of one file of a repository, after checking that they are those that its index promises.

    Args:
        names: the tensors that the index has for the file.
        expected: the fingerprint that the index has for it, if any.

    Raises:
        KAdapterLoadError: the file is missing or damaged, or a tensor is missing, extra or changed.
    """
    path = locate(folder, file)
    tensors, _ = read_tensors(path)
    check_names(path, tensors, names)
    if expected is not None and fingerprint(tensors.values()) != expected:
        raise KAdapterLoadError(
            f"'{path}' does not hold what was saved: a tensor in it has another dtype, shape or other values. "
            "Download or save the model again."
        )
    return tensors


def check_names(path: Path, tensors: Iterable[str], names: Iterable[str]) -> None:
    """Raises `KAdapterLoadError` if a file does not hold just the tensors that the index has for it."""
    for problem, odd in (("missing", set(names) - set(tensors)), ("not in the index", set(tensors) - set(names))):
        if odd:
            raise KAdapterLoadError(
                f"'{path}': tensor '{min(odd)}' is {problem}{f' (and {len(odd) - 1} more)' if len(odd) > 1 else ''}; "
                "the file and the index are not of one save. Download or save the model again."
            )


def read_config_dict(folder: Path) -> dict[str, Any]:
    config = read_json(locate(folder, CONFIG_NAME))
    if not isinstance(config, dict):
        raise KAdapterLoadError(f"'{folder / CONFIG_NAME}' is not a JSON object; download or save the model again.")
    return KAdapterConfig._decode_special_floats(config)


# ---- Adapter files --------------------------------------------------------------------------------------------------


def adapter_metadata(name: str, config: KnowledgeAdapterConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """
    What makes an adapter file self-contained. One key, so that the header, and so the file, is the same each time.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "config": portable(config),
        "fingerprint": fingerprint(tensors.values()),
    }
    return {METADATA_KEY: json.dumps(content | {"checksum": _checksum(content)}, sort_keys=True)}


def portable(config: KnowledgeAdapterConfig) -> dict[str, Any]:
    """An adapter's configuration as JSON has it, which can be compared: NaN is tagged there, and equal to itself."""
    return config._encode_special_floats(config.to_portable_dict())


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def adapter_names(folder: Path) -> list[str]:
    """The adapters that there are files of in a folder, also when replacing them was interrupted."""
    places = [folder, folder / STAGING] if _is_moving(folder / STAGING) else [folder]
    files = {file.name for place in places for file in (place / ADAPTER_FOLDER).glob("*.safetensors")}
    return sorted(Path(file).stem for file in files if f"{ADAPTER_FOLDER}/{file}" not in _obsolete(places[-1]))


class SavedAdapter(NamedTuple):
    """What an adapter file holds; the tensors' names begin with `adapters.<name>.`."""

    name: str
    config: KnowledgeAdapterConfig
    tensors: dict[str, torch.Tensor]
    fingerprint: str


def read_adapter_metadata(metadata: Mapping[str, str], path: Any) -> tuple[str, KnowledgeAdapterConfig, str]:
    """
    The name, configuration and fingerprint of an adapter, from the header of its file.

    Raises:
        KAdapterLoadError: the metadata, those of `path`, are missing, damaged, or changed since they were saved.
    """
    if METADATA_KEY not in metadata:
        raise KAdapterLoadError(
            f"'{path}' has no '{METADATA_KEY}' metadata: it is not a knowledge adapter's file, or a tool that dropped "
            "the metadata rewrote it. Save it with save_knowledge_adapter."
        )
    try:
        content = json.loads(metadata[METADATA_KEY])
        checksum = content.pop("checksum")
        if content["format_version"] > FORMAT_VERSION:
            logger.warning(f"'{path}' was written by a newer version of kadapter-hf; upgrade if it does not load.")
        name, expected = content["name"], content["fingerprint"]
        if checksum != _checksum(content):
            raise KAdapterLoadError(f"'{path}': its metadata was changed or damaged; download or save it again.")
        return (
            name,
            KnowledgeAdapterConfig(**KnowledgeAdapterConfig._decode_special_floats(content["config"])),
            expected,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KAdapterLoadError(
            f"'{path}': its '{METADATA_KEY}' metadata is damaged ({error}); download or save it again."
        ) from error


def read_adapter(path: Path) -> SavedAdapter:
    """
    Reads an adapter file.

    Raises:
        KAdapterLoadError: missing, damaged, changed since it was saved, or without a K-Adapter's metadata.
    """
    tensors, metadata = read_tensors(path)
    name, config, expected = read_adapter_metadata(metadata, path)
    # Before anything of that size is built.
    if len(config.backbone_layers or ()) * config.num_hidden_layers > len(tensors):
        raise KAdapterLoadError(
            f"'{path}' has {len(tensors)} tensors, too few for the layers that its metadata describes. Download or save "
            "it again."
        )
    prefix = f"adapters.{name}."
    odd = [tensor for tensor in tensors if not tensor.startswith(prefix)]
    if odd:
        raise KAdapterLoadError(f"'{path}': tensor '{odd[0]}' does not belong to the adapter '{name}'.")
    if fingerprint(tensors.values()) != expected:
        raise KAdapterLoadError(
            f"'{path}' does not hold what was saved: a tensor in it is missing, or has another dtype, shape or other "
            "values. Download or save it again."
        )
    return SavedAdapter(name, config, tensors, expected)


def write_adapter(path: Path, name: str, config: KnowledgeAdapterConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes an adapter file; `tensors` are named with `adapters.<name>.`."""
    write_tensors(path, tensors, adapter_metadata(name, config, tensors))


# ---- Writing --------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file beside `path`, then moves it there, so that `path` is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, part, metadata=metadata)
        _flush(part)
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"'{path}' could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def code_files() -> list[Path]:
    """The modules that travel with every repository: this one and its siblings."""
    return sorted(Path(__file__).parent.glob("*_kadapter.py"))


def is_own_file(file: str) -> bool:
    """Whether a repository's file of this name is one that a K-Adapter's weights or code are in."""
    code = "/" not in file and file.endswith("_kadapter.py")
    return code or file in (HEAD_FILE, BACKBONE_FILE, *PEFT_FILES) or _ADAPTER_FILE.fullmatch(file) is not None


@contextlib.contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """
    Yields a staging folder to write a repository's new files to; afterwards they replace the old ones.

    If the process dies while the new files are written, the old ones are untouched; if it dies while they are moved,
    `locate` finds the new ones. config.json is moved first: that is the moment at which the folder becomes the new
    model. The index is taken away before the other files are moved and comes last, so that readers that don't know
    about the staging folder find no checkpoint rather than a mixed one. What only the old model had goes at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / STAGING
    finish_replacing(folder)
    _discard(staging)
    preparing = folder / f"{STAGING}-new"
    try:
        # A staging folder without a config.json counts as moving: it gets one before anything else, in one step.
        shutil.rmtree(preparing, ignore_errors=True)
        preparing.mkdir()
        (preparing / CONFIG_NAME).touch()
        os.replace(preparing, staging)
        yield staging
        old, new = _listed_files(folder), _listed_files(staging)
        for file in PEFT_FILES:
            if (staging / file).exists():
                _flush(staging / file)
            elif (folder / file).exists():
                old.add(file)
        write_json(staging / OBSOLETE, sorted(old - new))
        for parent in {(folder / file).parent for file in new}:
            parent.mkdir(exist_ok=True)
    except BaseException:
        shutil.rmtree(preparing, ignore_errors=True)
        _discard(staging)
        raise
    os.replace(staging / CONFIG_NAME, folder / CONFIG_NAME)
    finish_replacing(folder)


def finish_replacing(folder: Path) -> None:
    """Moves what an interrupted `replace_files` had begun to move; does nothing where there is nothing to finish."""
    staging = folder / STAGING
    if not _is_moving(staging):
        return
    files = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()} - {OBSOLETE}
    if SAFE_WEIGHTS_INDEX_NAME in files:
        (folder / SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
    for file in (*sorted(files - {SAFE_WEIGHTS_INDEX_NAME}), *sorted(files & {SAFE_WEIGHTS_INDEX_NAME})):
        os.replace(staging / file, folder / file)
    for file in _obsolete(staging):
        (folder / file).unlink(missing_ok=True)
    _discard(staging)


def _discard(staging: Path) -> None:
    """Removes a staging folder in one step, as half of one could be taken for one whose files are moving."""
    trash = staging.with_name(f"{STAGING}-old")
    shutil.rmtree(trash, ignore_errors=True)
    if staging.is_dir():
        os.replace(staging, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _listed_files(folder: Path) -> set[str]:
    """The weight files of the repository in `folder`, as far as its index can be read."""
    try:
        return set(read_index(folder)[0])
    except KAdapterLoadError:
        return set()
