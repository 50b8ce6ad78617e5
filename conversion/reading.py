"""
Reading the tensors of an untrusted PyTorch checkpoint.

A checkpoint is a pickle, either in a zip archive or, in the format used by torch until 2020, followed by the tensors' bytes.
First the pickle is interpreted with inert placeholders, to find out which names it refers to and how much memory it needs.
Then torch loads it with its restricted unpickler.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import MAGIC_NUMBER

from ..modeling.format_kadapter import KAdapterLoadError


LEGACY_START = pickle.dumps(MAGIC_NUMBER, protocol=2)
# Element sizes in bytes, by the name of the storage class in a checkpoint.
STORAGES = {
    "FloatStorage": 4,
    "DoubleStorage": 8,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}
REBUILDERS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"}


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a state dict by name, on the CPU. They are memory-mapped if the file is a zip archive.

    Raises:
        KAdapterLoadError: the file is missing, damaged or not a state dict; it requests running code; or it describes more
            data than it holds.
    """
    if not path.is_file():
        raise KAdapterLoadError(f"'{path}' is {'a folder, not a checkpoint' if path.is_dir() else 'missing'}.")
    zipped = _check(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise KAdapterLoadError(f"'{path}' holds objects that torch does not load from an untrusted file.") from error
    except Exception as error:  # torch raises several types
        raise _damaged(path, error) from error
    if not isinstance(content, dict) or not content:
        raise KAdapterLoadError(f"'{path}' is not a state dict: it holds an object of type {type(content).__name__}.")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise KAdapterLoadError(f"'{path}' is not a state dict: the value of {str(name)[:80]!r} is not a tensor.")
    return dict(content)


def _damaged(path: Path, error: Exception) -> KAdapterLoadError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return KAdapterLoadError(f"'{path}' is damaged or incomplete ({reason}); download it again.")


def _check(path: Path) -> bool:
    """Whether the file is a zip archive; raises `KAdapterLoadError` if it is unsafe to load."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY_START))
            if start[:4] == b"PK\x03\x04":
                _check_archive(path, size)
                return True
            if start != LEGACY_START:
                raise KAdapterLoadError(f"'{path}' is not a PyTorch checkpoint.")
            for _ in range(2):  # protocol version, system information
                _Rehearsal(path, file).load()
            _rehearse(path, file, size)
            return False
    except KAdapterLoadError:
        raise
    except Exception as error:  # truncated and invalid pickles raise many types
        raise _damaged(path, error) from error


def _check_archive(path: Path, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch does not compress entries, so an entry that claims to be larger than the file is a zip bomb.
        odd = next((entry for entry in entries if entry.compress_type or entry.flag_bits & 1), None)
        if odd is not None:
            raise KAdapterLoadError(
                f"'{path}' has the compressed entry '{odd.filename}'; checkpoints are not compressed."
            )
        if sum(entry.file_size for entry in entries) > size:
            largest = max(entries, key=lambda entry: entry.file_size)
            raise KAdapterLoadError(
                f"'{path}' is {size:,} bytes long, but its entry '{largest.filename}' claims {largest.file_size:,}."
            )
        if len({entry.filename for entry in entries}) < len(entries):
            raise KAdapterLoadError(f"'{path}' has two entries with the same name, unlike any checkpoint.")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise KAdapterLoadError(f"'{path}' is a zip archive, but not a PyTorch checkpoint.")
        with archive.open(pickles[0]) as file:
            _rehearse(path, file, size)


def _rehearse(path: Path, file: Any, size: int) -> None:
    rehearsal = _Rehearsal(path, file)
    rehearsal.load()
    claimed = sum(rehearsal.storages.values())
    if claimed > size:
        raise KAdapterLoadError(
            f"'{path}' is {size:,} bytes long, but describes {claimed:,} bytes of tensors: it is truncated or forged."
        )


class _Rehearsal(pickle._Unpickler):  # the Python version; the C version allocates memory for any number it reads
    """Interprets a pickle without executing it, and records the size of each storage."""

    def __init__(self, path: Path, file: BinaryIO):
        super().__init__(file)
        self.path = path
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return name
        if module == "torch._utils" and name in REBUILDERS:
            return _nothing
        raise KAdapterLoadError(
            f"'{self.path}' refers to {module}.{name}, which tensors don't need: it is not safe to load. Nothing was run."
        )

    def persistent_load(self, saved: Any) -> None:
        kind, storage, key, _, count = saved[:5]
        if kind != "storage" or not isinstance(count, int) or count < 0:
            raise KAdapterLoadError(f"'{self.path}' describes a tensor in a way that torch never does.")
        self.storages[key] = max(self.storages.get(key, 0), count * STORAGES[storage])


def _nothing(*args: Any) -> None:
    """Placeholder for the functions that a pickle calls."""
