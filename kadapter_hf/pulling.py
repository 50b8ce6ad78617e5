"""Downloads of K-Adapter repositories and their adapters, which are checked before they are used."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils import CONFIG_NAME

import kadapter_hf

from .contents import read_saved
from .hub import PICKLES, checked_files, downloaded
from .modeling.format_kadapter import BACKBONE_FILE, adapter_path, check_adapter_name
from .modeling.reading_kadapter import read_adapter, read_config
from .modeling.sources_kadapter import check_downloads, patiently


def pull_repository(repo: str, output: Path | None, revision: str | None, token: str | None) -> dict[str, Any]:
    """
    Downloads a repository to the Hub's cache and, if `output` is given, copies it there, after all files are checked.

    Returns:
        What `kadapter pull --json` prints, without the name of the repository.

    Raises:
        KAdapterLoadError: it is not a K-Adapter, or a file is missing or damaged.
        HfHubHTTPError: the Hub refused it.
    """
    # Checks that it is a K-Adapter before downloading anything large.
    read_config(downloaded(repo, CONFIG_NAME, revision, token).parent, repo)
    pickles = [f"*{ending}" for ending in PICKLES]
    folder = Path(patiently(snapshot_download, repo, revision=revision, token=token, ignore_patterns=pickles))
    check_downloads(folder, repo, since=0)
    saved = read_saved(folder, repo)
    files = sorted(checked_files(folder))
    for file in saved.adapter_files:
        read_adapter(folder / file)
    place = repr(repo)
    if output is not None:
        place = repr(str(output))
        with whole(output) as draft:
            shutil.copytree(folder, draft, ignore=shutil.ignore_patterns(*pickles))
    elif revision is not None:
        place += f", revision={revision!r}"
    architecture = (saved.config.architectures or [""])[0]
    model_class = architecture if architecture in kadapter_hf.__all__ else "KAdapterModel"
    return {
        "commit": folder.name,
        "path": str(output or folder),
        "files": files,
        "backbone": {
            "name": saved.config.backbone_name_or_path,
            "revision": saved.config.backbone_revision,
            "included": BACKBONE_FILE in saved.tensors,
        },
        "load": f"from kadapter_hf import {model_class}; model = {model_class}.from_pretrained({place})",
    }


def pull_adapter(repo: str, name: str, output: Path | None, revision: str | None, token: str | None) -> dict[str, Any]:
    """As `pull_repository`, for the file of one adapter."""
    file = adapter_path(check_adapter_name(name))
    path = cached = downloaded(repo, file, revision, token)
    snapshot = cached.parents[1]
    check_downloads(snapshot, repo, since=0)
    config = read_adapter(cached).config
    if output is not None:
        path = output / cached.name
        with whole(output) as draft:
            draft.mkdir()
            shutil.copyfile(cached, draft / cached.name)
    return {
        "commit": snapshot.name,
        "path": str(path),
        "files": [file],
        "backbone": {"name": config.backbone_name_or_path, "revision": None, "included": False},
        "load": f"model.load_knowledge_adapter({str(path)!r})",
    }


@contextmanager
def whole(output: Path) -> Iterator[Path]:
    """Yields the path of a temporary folder, to be created, which is renamed to `output`, or deleted on an error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".kadapter-", dir=output.parent) as temporary:
        draft = Path(temporary, output.name)
        yield draft
        if output.is_dir():
            output.rmdir()
        os.replace(draft, output)
