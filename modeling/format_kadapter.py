"""The repository format: names of files and tensors, metadata and fingerprints; and the package's errors."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import CONFIG_NAME

from .compat_kadapter import encode_floats


HEAD_FILE = "head.safetensors"  # the fusion and the task head
BACKBONE_FILE = "backbone.safetensors"  # only if it differs from the backbone that config.json names
ADAPTER_FOLDER = "adapters"  # a file for each knowledge adapter
CARD_FILE = "README.md"
# PEFT's files, in the repository of a model with a PEFT adapter.
PEFT_CONFIG = "adapter_config.json"
PEFT_FILES = (PEFT_CONFIG, "adapter_model.safetensors")
# The folder in which a save prepares its files (see replacing_kadapter.py), and its list of files to delete.
STAGING = ".kadapter-saving"
OBSOLETE = "obsolete.json"

METADATA_KEY = "kadapter"
FORMAT_VERSION = 1
# The number and size of the blocks of elements that a fingerprint samples from each tensor.
_BLOCKS, _BLOCK = 3, 512
_ROW = 8192  # bytes of a row in `checksum`

# One path-safe segment: it names a file and is one component of a dotted tensor name.
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class KAdapterConfigError(ValueError):
    """A configuration has a field of the wrong type or with an impossible value; the message names the field."""


class SavedConfigError(KAdapterConfigError):
    """The configuration in a saved file is impossible, so what is wrong is the file and not an argument."""


class KAdapterLoadError(OSError):
    """A repository or file is missing, damaged or not what was expected; the message names it and a solution."""


class BackboneMismatchError(KAdapterLoadError):
    """The backbone is not the one that the K-Adapter or the knowledge adapter was trained on."""


def damaged(path: Any, problem: str, advice: str | None = None) -> KAdapterLoadError:
    """The error for a file whose content is not what was saved."""
    return KAdapterLoadError(f"'{path}' {problem.rstrip('.')}. {advice or 'Download or save it again.'}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggests the most similar of the known names, as the end of a sentence; empty if none is similar."""
    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75)
    return f"; did you mean '{found[0]}'?" if found else ""


def check_adapter_name(name: Any) -> str:
    """Returns `name` if a knowledge adapter can have it, else raises `KAdapterConfigError`."""
    fits = isinstance(name, str) and _ADAPTER_NAME.fullmatch(name)
    if not fits or hasattr(nn.ModuleDict, name) or name == "training":
        raise KAdapterConfigError(
            f"{str(name)[:80]!r} can't name a knowledge adapter: a name has 1 to 64 letters, digits, '_' or '-', starts with "
            "a letter or digit, and is not that of an attribute of torch.nn.ModuleDict."
        )
    return name


def adapter_path(name: str) -> str:
    """The file of a knowledge adapter, relative to its repository."""
    return f"{ADAPTER_FOLDER}/{name}.safetensors"


def file_of(tensor: str) -> str:
    """The file for the tensor of this name. Raises `KAdapterConfigError` if it is of an adapter with an impossible name."""
    part, _, rest = tensor.partition(".")
    if part == "backbone":
        return BACKBONE_FILE
    if part == "adapters":
        return adapter_path(check_adapter_name(rest.partition(".")[0]))
    return HEAD_FILE


def part_of(state_dict: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """The tensors of one part (`"backbone"`, `"adapters.<name>"`), under their full names."""
    return {name: tensor for name, tensor in state_dict.items() if name.startswith(f"{part}.")}


def is_own_file(file: str) -> bool:
    """Whether a repository stores weights or this folder's code in a file of this name."""
    if "/" in file:
        return re.fullmatch(adapter_path("[A-Za-z0-9_-]+"), file) is not None
    return file in (HEAD_FILE, BACKBONE_FILE, *PEFT_FILES) or file.endswith("_kadapter.py")


def code_files() -> list[Path]:
    """The modules that are copied to every repository: this one and its siblings."""
    return sorted(Path(__file__).parent.glob("*_kadapter.py"))


def is_own_class(model_class: type) -> bool:
    """Whether a class is defined in one of the `code_files`, and not by a user."""
    return model_class.__module__.rpartition(".")[2] in {path.stem for path in code_files()}


def locate(folder: Path, name: str) -> Path:
    """
    The path of a repository's file, also if `replace_files` was interrupted: it writes all files to a staging folder, then
    moves config.json, then the others. So the files that remain in a staging folder without config.json are the newer ones.
    """
    staging = folder / STAGING
    return staging / name if is_moving(staging) and (staging / name).exists() else folder / name


def is_moving(staging: Path) -> bool:
    """Whether the files of a staging folder were being moved when the save was interrupted."""
    return staging.is_dir() and not (staging / CONFIG_NAME).exists()


def obsolete_files(staging: Path) -> list[str]:
    """Files of the previous model that the new one, in this staging folder, does not have."""
    try:
        names = json.loads((staging / OBSOLETE).read_text(encoding="utf-8"))
        return [name for name in names if is_own_file(name)]
    except (OSError, ValueError, TypeError):
        return []


def adapter_metadata(name: str, config: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The metadata of an adapter file, under a single key, as safetensors does not keep the order of several."""
    content = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "config": encode_floats(config),
        "fingerprint": fingerprint(tensors.values()),
    }
    return {METADATA_KEY: json.dumps(content | {"checksum": metadata_checksum(content)}, sort_keys=True)}


def metadata_checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """
    Identifies a set of weights: SHA-256 over each tensor's dtype, shape and values, of which tensors with more than 1,536
    count the first, middle and last 512. It takes milliseconds, also for memory-mapped weights, and distinguishes weights
    that were trained differently. Names don't count, as transformers renames parameters between versions.
    """
    digests = []
    for tensor in tensors:
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(_bytes(_sample(tensor)))
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """
    Identifies named tensors within a process: SHA-256 over their names, dtypes and shapes, and over the sums of the rows and
    columns of their bytes, which are read as a matrix of 64-bit integers. It takes a fifth of the time of SHA-256 over all
    values, and copies no weights from a GPU.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        bits = _bits(tensor)
        bits = bits.clone() if bits.storage_offset() % 8 else bits  # whole numbers of 8 bytes must be aligned
        whole = bits[: len(bits) // _ROW * _ROW].view(torch.int64).view(-1, _ROW // 8)
        for part in (whole.sum(0), whole.sum(1), bits[whole.numel() * 8 :]):
            digest.update(_bytes(part))
    return digest.hexdigest()


def equal_bits(tensors: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit, after casting `reference` to the dtypes in `tensors`."""
    if tensors.keys() != reference.keys():
        return False
    for name, tensor in tensors.items():
        other = reference[name]
        if tensor.shape != other.shape:
            return False
        other = other.to(device=tensor.device, dtype=tensor.dtype)
        # Bits, not values: NaN differs from itself, and 0.0 equals -0.0.
        if not torch.equal(_bits(tensor), _bits(other)):
            return False
    return True


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= _BLOCKS * _BLOCK:
        return flat
    stride = (flat.numel() - _BLOCK) // (_BLOCKS - 1)
    return flat.as_strided((_BLOCKS, _BLOCK), (stride, 1), flat.storage_offset())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)  # flat, as a scalar has no view of another dtype


def _bytes(tensor: torch.Tensor) -> Any:
    return _bits(tensor.cpu()).numpy()
