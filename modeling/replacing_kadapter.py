"""Crash-safe writing: an interrupted save leaves the old files or the new ones, never a mix."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from .format_kadapter import OBSOLETE, PEFT_FILES, STAGING, KAdapterLoadError, is_moving, obsolete_files
from .reading_kadapter import read_index


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file beside `path`, then moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.touch()
        mode = part.stat().st_mode  # safetensors makes files that only their owner can read
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, part, metadata=metadata)
        part.chmod(mode)
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


@contextlib.contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """
    Yields a staging folder for a repository's new files, which then replace the old ones.

    If the process dies before all are written, the old ones are untouched; if it dies while they are moved, `locate` finds
    the new ones. config.json is moved first: from then on the folder is the new model. The index is removed before the
    other files are moved and comes last, so that readers that don't know the staging folder find no checkpoint rather than
    a mix. Files that only the old model had are deleted at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # One process and thread of this machine at a time; the others wait. Folders share 256 lock files, which can't be deleted
    # safely and would otherwise pile up.
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:2]
    user = os.getuid() if hasattr(os, "getuid") else 0
    with WeakFileLock(Path(tempfile.gettempdir(), f"kadapter-{user}-{name}.lock")):
        yield from _replace_files(folder)


def _replace_files(folder: Path) -> Iterator[Path]:
    staging = folder / STAGING
    finish_replacing(folder)
    _discard(staging)
    preparing = folder / f"{STAGING}-new"
    try:
        # A staging folder without config.json counts as being moved, so it is created with one in a single step.
        shutil.rmtree(preparing, ignore_errors=True)
        preparing.mkdir()
        (preparing / CONFIG_NAME).touch()
        os.replace(preparing, staging)
        yield staging
        old, new = _own_files(folder), _own_files(staging)
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
    """Completes an interrupted `replace_files`, if there is one."""
    staging = folder / STAGING
    if not is_moving(staging):
        return
    files = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()} - {OBSOLETE}
    if SAFE_WEIGHTS_INDEX_NAME in files:
        (folder / SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
    for file in (*sorted(files - {SAFE_WEIGHTS_INDEX_NAME}), *sorted(files & {SAFE_WEIGHTS_INDEX_NAME})):
        os.replace(staging / file, folder / file)
    for file in obsolete_files(staging):
        (folder / file).unlink(missing_ok=True)
    _discard(staging)


def _discard(staging: Path) -> None:
    """Removes a staging folder in a single step, as a half-removed one could look as if its files were being moved."""
    trash = staging.with_name(f"{STAGING}-old")
    shutil.rmtree(trash, ignore_errors=True)
    if staging.is_dir():
        os.replace(staging, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _own_files(folder: Path) -> set[str]:
    """The code files of the repository in `folder` and, as far as its index can be read, its weight files."""
    code = {path.name for path in folder.glob("*_kadapter.py")}
    try:
        return code | set(read_index(folder)[0])
    except KAdapterLoadError:
        return code
