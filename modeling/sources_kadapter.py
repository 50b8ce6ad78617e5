"""Locating a K-Adapter or a knowledge adapter: a file, a folder, or a repository on the Hub."""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import parse_ratelimit_headers
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file, logging

from .format_kadapter import (
    BACKBONE_FILE,
    HEAD_FILE,
    PEFT_CONFIG,
    KAdapterConfigError,
    KAdapterLoadError,
    adapter_path,
    locate,
)
from .reading_kadapter import adapter_names


logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# The number of attempts of a request to the Hub, and the longest wait between them in seconds.
ATTEMPTS, LONGEST_WAIT = 5, 300
T = TypeVar("T")


def hub_arguments(kwargs: Mapping[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments that tell how to find a repository on the Hub."""
    return {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs and key not in without}


def adapter_file(source: str | os.PathLike, name: str | None, **hub_kwargs) -> Path:
    """
    The adapter file in a repository or folder, or `source` itself if it is a file. `name` only chooses among several.

    Raises:
        KAdapterLoadError: there is none, or several and none of them has that name.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise KAdapterConfigError(
            "the source of a knowledge adapter must be a repository, a folder or a file, or a KnowledgeAdapterConfig for a new "
            f"one; not {type(source).__name__}."
        )
    path = Path(source)
    if path.is_file() or path.suffix == ".safetensors":
        return path
    folder = repository_folder(source, **hub_kwargs)
    names = adapter_names(folder)
    if len(names) == 1:
        name = names[0]
    if not names:
        raise KAdapterLoadError(
            f"'{source}' has no knowledge adapter: no file {adapter_path('<name>')}. save_pretrained and "
            "save_knowledge_adapter write one."
        )
    if name not in names:
        wanted = "no name was given" if name is None else f"there is no '{name}'"
        raise KAdapterLoadError(
            f"'{source}' has the knowledge adapters {names}, and {wanted}. Choose one with name=…, or pass its file."
        )
    return locate(folder, adapter_path(name))


def patiently(call: Callable[..., T], *args, **kwargs) -> T:
    """Calls a function of the Hub's client, again if there were too many requests: the client only retries transfers."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call(*args, **kwargs)
        except OSError as error:
            # snapshot_download reports it as a lost connection.
            response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            if response is None or response.status_code != 429:
                raise
            limit, asked = parse_ratelimit_headers(response.headers), response.headers.get("Retry-After", "")
            seconds = limit.reset_in_seconds + 1 if limit else int(asked) if asked.isdigit() else 2**attempt
            if seconds > LONGEST_WAIT:
                raise
            logger.warning(f"too many requests to the Hub: trying again in {seconds} s.")
            time.sleep(seconds)
    return call(*args, **kwargs)


def repository_folder(source: str | os.PathLike, *, subfolder: str = "", **hub_kwargs) -> Path:
    """
    The folder of a repository: `source` itself if it is a folder, else its snapshot in the Hub's cache, downloaded if needed.

    Raises:
        KAdapterLoadError: it does not exist, or is neither cached nor reachable; or the hash of a download is wrong.
    """
    source = os.fspath(source)
    if os.path.isdir(source):
        return Path(source, subfolder)
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, HEAD_FILE, BACKBONE_FILE, adapter_path("*"), PEFT_CONFIG]
    kwargs = {key: value for key, value in hub_arguments(hub_kwargs, ("proxies",)).items() if value is not None}
    started = time.time()
    try:
        wanted = [prefix + pattern for pattern in patterns]
        folder = patiently(snapshot_download, source, allow_patterns=wanted, **kwargs)
    except (OSError, HFValidationError, ValueError) as error:
        raise KAdapterLoadError(
            f"'{source}' is neither a local file or folder nor a repository on the Hub that can be loaded: {error}"
        ) from error
    check_downloads(Path(folder), source, started)
    return Path(folder, subfolder)


def check_downloads(folder: Path, source: str, since: float) -> None:
    """
    Compares the files of a snapshot in the Hub's cache that are newer than `since` with their hashes, as the client only
    compares sizes. Raises `KAdapterLoadError` if a hash is wrong, and deletes the file.
    """
    # The clock of a file system may be behind.
    new = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_mtime >= since - 1]
    damaged = [path for path in new if not _has_its_hash(path.resolve())]
    for path in damaged:
        path.resolve().unlink(missing_ok=True)
        path.unlink()
    if damaged:
        names = ", ".join(path.relative_to(folder).as_posix() for path in damaged)
        raise KAdapterLoadError(f"'{source}': hash mismatch for {names}; deleted from the cache. Load it again.")


def _has_its_hash(blob: Path) -> bool:
    """Whether a file in the Hub's cache has the hash that is its name: SHA-256, git's, or the SHA-1 of some mirrors."""
    header = b"blob %d\0" % blob.stat().st_size
    if len(blob.name) == 64:
        digests = [hashlib.sha256()]
    elif len(blob.name) == 40:
        digests = [hashlib.sha1(start, usedforsecurity=False) for start in (header, b"")]
    else:  # without symbolic links, the cache does not keep the hash
        return True
    with open(blob, "rb") as file:
        while block := file.read(2**20):
            for digest in digests:
                digest.update(block)
    return blob.name in [digest.hexdigest() for digest in digests]


def snapshot_of(name: str | os.PathLike, **hub_kwargs) -> Path | None:
    """The folder in the Hub's cache of a backbone that was loaded; None for a local folder."""
    if os.path.isdir(name):
        return None
    given = {key: value for key in ("cache_dir", "revision", "token") if (value := hub_kwargs.get(key)) is not None}
    try:
        path = cached_file(name, CONFIG_NAME, local_files_only=True, **given)
    except OSError:
        return None
    return Path(path).parent if path else None


def commit_of(name: str | os.PathLike, **hub_kwargs) -> str | None:
    """The commit of the repository that a backbone was loaded from; None for a local folder."""
    snapshot = snapshot_of(name, **hub_kwargs)
    return snapshot.name if snapshot else None
