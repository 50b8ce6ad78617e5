"""Where a K-Adapter or an adapter comes from: a file, a folder, or a repository on the Hub."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, logging

from .storage_kadapter import (
    ADAPTER_FOLDER,
    BACKBONE_FILE,
    HEAD_FILE,
    PEFT_CONFIG,
    KAdapterLoadError,
    adapter_names,
    locate,
)


logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# How often a request to the Hub is made, and for how many seconds the Hub may ask to wait between.
ATTEMPTS, LONGEST_WAIT = 5, 300
T = TypeVar("T")


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
    names = adapter_names(folder)
    if len(names) == 1:
        name = names[0]
    if not names:
        raise KAdapterLoadError(
            f"'{source}' has no knowledge adapter in it, no {ADAPTER_FOLDER}/<name>.safetensors. save_pretrained and "
            "save_knowledge_adapter write that."
        )
    if name not in names:
        wanted = "no name was given" if name is None else f"there is no '{name}'"
        raise KAdapterLoadError(
            f"'{source}' has the knowledge adapters {names}, and {wanted}. Say which with name=…, or give the file."
        )
    return locate(folder, f"{ADAPTER_FOLDER}/{name}.safetensors")


def patiently(call: Callable[..., T], *args, **kwargs) -> T:
    """Calls the Hub's client, again after a while if the Hub says that there were too many requests."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call(*args, **kwargs)
        except OSError as error:
            # snapshot_download takes it for a lost connection.
            response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            if response is None or response.status_code != 429:
                raise
            asked = response.headers.get("Retry-After", "")
            seconds = int(asked) if asked.isdigit() else 2**attempt
            if seconds > LONGEST_WAIT:
                raise
            logger.warning(f"the Hub has too many requests from here: trying again in {seconds} s.")
            time.sleep(seconds)
    return call(*args, **kwargs)


def repository_folder(source: str | os.PathLike, *, subfolder: str = "", **hub_kwargs) -> Path:
    """
    The folder of a repository: `source` itself if it is one, else its snapshot in the Hub's cache, downloaded if needed.

    What was downloaded is compared with the hashes that the Hub gives for it.

    Raises:
        KAdapterLoadError: no such folder, repository or revision, or it can't be reached and is not in the cache; or a file
            came with other bytes than the Hub announced.
    """
    source = os.fspath(source)
    if os.path.isdir(source):
        return Path(source, subfolder)
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, HEAD_FILE, BACKBONE_FILE, f"{ADAPTER_FOLDER}/*.safetensors"]
    patterns.append(PEFT_CONFIG)
    kwargs = {key: value for key, value in hub_kwargs.items() if key in HUB_ARGUMENTS and value is not None}
    kwargs.pop("proxies", None)
    started = time.time()
    try:
        wanted = [prefix + pattern for pattern in patterns]
        folder = patiently(snapshot_download, source, allow_patterns=wanted, **kwargs)
    except (OSError, HFValidationError, ValueError) as error:
        raise KAdapterLoadError(
            f"'{source}' is neither a folder here nor a repository that can be loaded from the Hub or its cache: {error}"
        ) from error
    check_downloads(Path(folder), source, started)
    return Path(folder, subfolder)


def check_downloads(folder: Path, source: str, since: float) -> None:
    """
    Compares the files of a snapshot in the Hub's cache that came after `since` with the hashes that the Hub gave for them.

    The cache names a file's content by its hash: SHA-256, or for small files git's or the SHA-1 of some mirrors. The client
    itself compares sizes only, and a fingerprint looks at a sample of the values.

    Raises:
        KAdapterLoadError: a file has other bytes; all such files are removed.
    """
    # A file system's clock may be behind.
    new = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_mtime >= since - 1]
    damaged = [path for path in new if not _has_its_hash(path.resolve())]
    for path in damaged:
        path.resolve().unlink(missing_ok=True)
        path.unlink()
    if damaged:
        names = ", ".join(path.relative_to(folder).as_posix() for path in damaged)
        raise KAdapterLoadError(
            f"'{source}': not the bytes that the Hub announced came for {names} (their hash is another one). What came was "
            "removed: load it again."
        )


def _has_its_hash(blob: Path) -> bool:
    """Whether a file of the Hub's cache is what its name says; one whose name is no hash may be anything."""
    header = b"blob %d\0" % blob.stat().st_size
    if len(blob.name) == 64:
        digests = [hashlib.sha256()]
    elif len(blob.name) == 40:
        digests = [hashlib.sha1(start, usedforsecurity=False) for start in (header, b"")]
    else:  # a file system without links, where nothing keeps the hash
        return True
    with open(blob, "rb") as file:
        while block := file.read(2**20):
            for digest in digests:
                digest.update(block)
    return blob.name in [digest.hexdigest() for digest in digests]
