"""`kadapter pull`: downloads a K-Adapter repository, or one of its adapters, from the Hub."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers.utils import CONFIG_NAME

import kadapter_hf

from ..contents import read_saved
from ..hub import PICKLES, checked_files
from ..messages import one_line
from ..modeling.format_kadapter import BACKBONE_FILE, KAdapterLoadError, adapter_path, check_adapter_name
from ..modeling.reading_kadapter import read_adapter, read_config
from ..modeling.sources_kadapter import check_downloads, patiently
from ._common import AsJson, Repo, Revision, Token, check_new, plain_errors, print_json


def pull(
    repo: Repo,
    output: Annotated[
        Path | None,
        typer.Option(
            show_default=False, help="The output folder, which must be new or empty. Default: the Hub's cache."
        ),
    ] = None,
    revision: Revision = None,
    adapter: Annotated[
        str | None, typer.Option(show_default=False, help="Download only this adapter, to OUTPUT/ADAPTER.safetensors.")
    ] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """
    Download a K-Adapter repository from the Hub, check its files, and show how to load it.

    `from_pretrained(REPO)` finds cached repositories, even without a network. The backbone is not downloaded.

    Example: `kadapter pull me/both --output both`

    Example: `kadapter pull me/both --adapter factual --output adapters`
    """
    with plain_errors(repo):
        if output is not None:
            check_new(output)
        if adapter is None:
            pulled = pull_repository(repo, output, revision, token)
        else:
            pulled = pull_adapter(repo, adapter, output, revision, token)
    if as_json:
        print_json({"repo_id": repo, **pulled})
        return
    typer.echo(f"{repo} at commit {pulled['commit']} is complete, in {pulled['path']}.")
    backbone = one_line(pulled["backbone"]["name"])
    if pulled["backbone"]["included"]:
        typer.echo("It includes its backbone.")
    elif os.path.isabs(backbone):
        typer.echo(f"Its backbone is {backbone}, a folder on its author's machine: pass the backbone with backbone=….")
    else:
        typer.echo(f"Its backbone, {backbone}, is downloaded when the model is first loaded.")
    typer.echo(f"To load it: {pulled['load']}")


def pull_repository(repo: str, output: Path | None, revision: str | None, token: str | None) -> dict[str, Any]:
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


def downloaded(repo: str, file: str, revision: str | None, token: str | None) -> Path:
    try:
        return Path(patiently(hf_hub_download, repo, file, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        raise KAdapterLoadError(
            f"'{repo}' has no {file}. If it is a K-Adapter, `kadapter info {repo}` shows its contents."
        ) from None


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
