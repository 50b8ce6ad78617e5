"""
A K-Adapter repository on disk: what its files are, how they are checked, and how they are replaced safely.

A repository, a local folder and a Trainer checkpoint are the same thing:

    config.json                    the configuration
    model.safetensors.index.json   the standard shard index, plus a fingerprint for each file
    adapters/<name>.safetensors    one knowledge adapter; its metadata makes it usable on its own
    head.safetensors               fusion and task head
    backbone.safetensors           only a backbone that differs from the one that config.json names
    *.py                           the code of this folder
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, logging

from .configuration_kadapter import KAdapterConfigError, KnowledgeAdapterConfig, check_adapter_name


logger = logging.get_logger(__name__)

HEAD_FILE = "head.safetensors"
BACKBONE_FILE = "backbone.safetensors"
ADAPTER_FOLDER = "adapters"
METADATA_KEY = "kadapter"
FORMAT_VERSION = 1
STAGING = ".kadapter-saving"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")

_MAX_JSON_BYTES = 64 * 2**20
# What a fingerprint looks at in each tensor: all of a small one, else this many blocks of this many elements.
_BLOCKS, _BLOCK = 16, 512


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

    Of a tensor with up to 8,192 elements every value counts; of a larger one 16 evenly spaced blocks of 512, so that
    it costs milliseconds even for weights that are only mapped into memory. Names don't count: transformers renames
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
        other = other.to(device=tensor.device, dtype=tensor.dtype).contiguous()
        if not torch.equal(tensor.detach().contiguous().view(torch.uint8), other.view(torch.uint8)):
            return False
    return True


# ---- Reading --------------------------------------------------------------------------------------------------------


def repository_folder(source: str | os.PathLike, *, subfolder: str = "", **hub_kwargs) -> Path:
    """
    The folder of a repository: `source` itself if it is one, else its snapshot in the Hub's cache, downloaded if needed.

    Raises:
        KAdapterLoadError: no such folder, repository or revision, or it can't be reached and is not in the cache.
    """
    source = os.fspath(source)
    if os.path.isdir(source):
        return Path(source, subfolder)
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, HEAD_FILE, BACKBONE_FILE, f"{ADAPTER_FOLDER}/*.safetensors"]
    kwargs = {key: value for key, value in hub_kwargs.items() if key in HUB_ARGUMENTS and value is not None}
    kwargs.pop("proxies", None)
    try:
        folder = snapshot_download(source, allow_patterns=[prefix + pattern for pattern in patterns], **kwargs)
    except (OSError, HFValidationError, ValueError) as error:
        raise KAdapterLoadError(
            f"'{source}' is neither a folder here nor a repository that can be loaded from the Hub or its cache: {error}"
        ) from error
    return Path(folder, subfolder)


def locate(folder: Path, name: str) -> Path:
    """
    The path of a repository's file, also when the process that was replacing the files was killed halfway.

    `replace_files` first writes everything to a staging folder, then moves config.json, then the rest. So a staging
    folder that still has its config.json was never begun to be moved, and what it holds does not count; in one without,
    what is still there is newer than what is beside it.
    """
    staging = folder / STAGING
    if staging.is_dir() and not (staging / CONFIG_NAME).exists() and (staging / name).exists():
        return staging / name
    return folder / name


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise KAdapterLoadError(f"'{path}' is larger than {_MAX_JSON_BYTES // 2**20} MB: not a file of a K-Adapter.")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise KAdapterLoadError(f"'{path}' is missing: '{path.parent}' is not a whole K-Adapter.") from error
    except (ValueError, RecursionError) as error:
        raise KAdapterLoadError(f"'{path}' is not valid JSON ({error}); download or save the model again.") from error


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """`safe_open` that names the file when it is missing, truncated or not safetensors."""
    if not path.is_file():
        raise KAdapterLoadError(f"'{path}' is missing; download or save the model again.")
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise KAdapterLoadError(
            f"'{path}' is damaged, or not a safetensors file ({error}); download or save it again."
        ) from error
    with opened as file:
        yield file


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """
    All tensors of a safetensors file, mapped into memory and not yet read.

    Raises:
        KAdapterLoadError: the file is missing or damaged, or a tensor in it is not of a floating-point dtype.
    """
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.startswith("backbone."):
            raise KAdapterLoadError(f"'{path}': tensor '{name}' has dtype {tensor.dtype}, not a floating-point one.")
    return tensors


def read_index(folder: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """
    The shard index: `{file: [tensor names]}` and `{file: fingerprint}`.

    Raises:
        KAdapterLoadError: it is missing or damaged, or names a file that no K-Adapter repository has.
    """
    path = locate(folder, SAFE_WEIGHTS_INDEX_NAME)
    index = _read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise KAdapterLoadError(f"'{path}' has no weight_map; download or save the model again.")
    files: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        if file_of(tensor) != file:
            raise KAdapterLoadError(
                f"'{path}' says that tensor '{tensor[:100]}' is in {str(file)[:100]!r}; a K-Adapter has it in "
                f"'{file_of(tensor)}'."
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
            raise KAdapterLoadError(f"'{path}': tensor '{name}' is not part of the model that config.json describes.")
        if tensors[name].shape != expected[name]:
            raise KAdapterLoadError(
                f"'{path}': tensor '{name}' has shape {tuple(tensors[name].shape)}, and the model needs "
                f"{tuple(expected[name])}."
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
    tensors = read_tensors(path)
    for problem, odd in (("missing", set(names) - set(tensors)), ("not in the index", set(tensors) - set(names))):
        if odd:
            raise KAdapterLoadError(
                f"'{path}': tensor '{min(odd)}' is {problem}{f' (and {len(odd) - 1} more)' if len(odd) > 1 else ''}; "
                "the file and the index are not of one save. Download or save the model again."
            )
    if expected is not None and fingerprint(tensors.values()) != expected:
        raise KAdapterLoadError(
            f"'{path}' does not hold what was saved: a tensor in it has another dtype, shape or other values. "
            "Download or save the model again."
        )
    return tensors


def read_config_dict(folder: Path) -> dict[str, Any]:
    config = _read_json(locate(folder, CONFIG_NAME))
    if not isinstance(config, dict):
        raise KAdapterLoadError(f"'{folder / CONFIG_NAME}' is not a JSON object.")
    return config


# ---- Adapter files --------------------------------------------------------------------------------------------------


def adapter_metadata(name: str, config: KnowledgeAdapterConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """
    What makes an adapter file self-contained. One key, so that the header, and so the file, is the same each time.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "config": config.to_portable_dict(),
        "fingerprint": fingerprint(tensors.values()),
    }
    return {METADATA_KEY: json.dumps(content | {"checksum": _checksum(content)}, sort_keys=True)}


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def adapter_file(source: str | os.PathLike, name: str | None, **hub_kwargs) -> Path:
    """
    The adapter file in a repository or folder, or `source` itself if it is one.

    `name` chooses among several; where there is only one, it is that.

    Raises:
        KAdapterLoadError: there is none, or several and none of them has that name.
    """
    path = Path(source)
    if path.is_file() or path.suffix == ".safetensors":
        return path
    folder = repository_folder(source, **hub_kwargs)
    names = sorted(file.stem for file in (folder / ADAPTER_FOLDER).glob("*.safetensors"))
    if len(names) == 1:
        name = names[0]
    if name not in names:
        wanted = "no name was given" if name is None else f"there is no '{name}'"
        raise KAdapterLoadError(f"'{source}' has the knowledge adapters {names}, and {wanted}.")
    return locate(folder, f"{ADAPTER_FOLDER}/{name}.safetensors")


def read_adapter(path: Path) -> tuple[str, KnowledgeAdapterConfig, dict[str, torch.Tensor]]:
    """
    An adapter file's name, configuration and tensors (without the `adapters.<name>.` before their names).

    Raises:
        KAdapterLoadError: missing, damaged, changed since it was saved, or without a K-Adapter's metadata.
    """
    with open_tensors(path) as file:
        metadata = (file.metadata() or {}).get(METADATA_KEY)
    if metadata is None:
        raise KAdapterLoadError(
            f"'{path}' has no '{METADATA_KEY}' metadata: it is not a knowledge adapter's file, or a tool that dropped "
            "the metadata rewrote it. Save it with save_knowledge_adapter."
        )
    try:
        content = json.loads(metadata)
        checksum = content.pop("checksum")
        if content["format_version"] > FORMAT_VERSION:
            logger.warning(f"'{path}' was written by a newer version of kadapter-hf; upgrade if it does not load.")
        name, expected = content["name"], content["fingerprint"]
        if checksum != _checksum(content):
            raise KAdapterLoadError(f"'{path}': its metadata was changed or damaged; download or save it again.")
        config = KnowledgeAdapterConfig(**content["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KAdapterLoadError(f"'{path}': its '{METADATA_KEY}' metadata is damaged ({error}).") from error
    tensors = read_tensors(path)
    prefix = f"adapters.{name}."
    odd = [tensor for tensor in tensors if not tensor.startswith(prefix)]
    if odd:
        raise KAdapterLoadError(f"'{path}': tensor '{odd[0]}' does not belong to the adapter '{name}'.")
    if fingerprint(tensors.values()) != expected:
        raise KAdapterLoadError(
            f"'{path}' does not hold what was saved: a tensor in it is missing, or has another dtype, shape or other "
            "values. Download or save it again."
        )
    return name, config, {tensor.removeprefix(prefix): value for tensor, value in tensors.items()}


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def code_files() -> list[Path]:
    """The modules that travel with every repository: this one and its siblings."""
    return sorted(Path(__file__).parent.glob("*_kadapter.py"))


@contextlib.contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """
    Yields a staging folder to write a repository's new files to; afterwards they replace the old ones.

    If the process dies while the new files are written, the old ones are untouched; if it dies while they are moved,
    `locate` finds the new ones. config.json is moved first: that is the moment at which the folder becomes the new
    model. The index is taken away before the other files are moved and comes last, so that readers that don't know
    about the staging folder find no checkpoint rather than a mixed one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / STAGING
    finish_replacing(folder)
    _discard(staging)
    # A staging folder without a config.json counts as moved: it gets one before anything else, in one step.
    preparing = folder / f"{STAGING}-new"
    shutil.rmtree(preparing, ignore_errors=True)
    preparing.mkdir()
    (preparing / CONFIG_NAME).touch()
    os.replace(preparing, staging)
    try:
        yield staging
    except BaseException:
        _discard(staging)
        raise
    old = _listed_files(folder)
    new = _listed_files(staging)
    os.replace(staging / CONFIG_NAME, folder / CONFIG_NAME)
    finish_replacing(folder)
    for file in old - new:
        (folder / file).unlink(missing_ok=True)


def finish_replacing(folder: Path) -> None:
    """Moves what an interrupted `replace_files` had begun to move; does nothing where there is nothing to finish."""
    staging = folder / STAGING
    if not staging.is_dir() or (staging / CONFIG_NAME).exists():
        return
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    index = Path(SAFE_WEIGHTS_INDEX_NAME)
    if index in files:
        (folder / index).unlink(missing_ok=True)
        files.remove(index)
        files.append(index)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / file, folder / file)
    shutil.rmtree(staging, ignore_errors=True)


def _discard(staging: Path) -> None:
    """Removes a staging folder that is not to count, its config.json last."""
    for path in staging.iterdir() if staging.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != CONFIG_NAME:
            path.unlink()
    shutil.rmtree(staging, ignore_errors=True)


def _listed_files(folder: Path) -> set[str]:
    """The weight files of the repository in `folder`, as far as its index can be read."""
    try:
        return set(read_index(folder)[0])
    except KAdapterLoadError:
        return set()
