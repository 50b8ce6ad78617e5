"""`kadapter push`: uploads a K-Adapter folder or one adapter to the Hub."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME

from ..hub import checked_files, push_folder, write_adapter_repository
from ..modeling.compat_kadapter import quiet
from ..modeling.configuration_kadapter import KAdapterConfig
from ..modeling.format_kadapter import BACKBONE_FILE, CARD_FILE, BackboneMismatchError, KAdapterLoadError
from ..modeling.reading_kadapter import SavedAdapter, read_adapter, read_config, read_index
from ..modeling.replacing_kadapter import finish_replacing
from ..modeling.sources_kadapter import adapter_file
from ._common import AsJson, Repo, Token, plain_errors, print_json


def push(
    source: Annotated[
        Path,
        typer.Argument(
            exists=True,
            show_default=False,
            help="A K-Adapter folder written by save_pretrained or `kadapter pretrain`, or an adapter's .safetensors file.",
        ),
    ],
    repo: Repo,
    adapter: Annotated[
        str | None,
        typer.Option(show_default=False, help="Push only this adapter of the folder, as a separate repository."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is created, make it private.")] = False,
    revision: Annotated[
        str | None, typer.Option(show_default=False, help="The branch to push to, created if needed.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Push as a pull request.")] = False,
    message: Annotated[str | None, typer.Option(show_default=False, help="The commit message.")] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """
    Push a K-Adapter folder or one adapter to the Hub as one commit, after checking all files.

    The repository is created if needed. Files that are already on the Hub are not uploaded again, and edits to the model
    card there are kept.

    Example: `kadapter push factual-adapter me/factual-adapter`

    Example: `kadapter push both me/factual-adapter --adapter factual --private`
    """
    with plain_errors(repo), tempfile.TemporaryDirectory() as temporary:
        folder = source
        if adapter is not None or not (source / CONFIG_NAME).exists():
            folder, saved = Path(temporary), read_adapter(adapter_file(source, adapter))
            if adapter not in (None, saved.name):
                raise KAdapterLoadError(f"'{source}' has the adapter '{saved.name}', not '{adapter}'.")
            adapter = saved.name
            write_adapter_repository(folder, adapter, config_of(source, saved, token), saved.tensors)
        else:
            finish_replacing(folder)
        files = sorted(checked_files(folder) | {CARD_FILE})
        commit = push_folder(
            folder,
            repo,
            adapter=adapter,
            commit_message=message,
            private=private or None,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )
    if as_json:
        pushed = {"repo_id": commit.repo_url.repo_id, "commit": commit.oid, "url": commit.commit_url}
        print_json(pushed | {"pr_url": commit.pr_url, "files": files})
    else:
        typer.echo(f"Pushed {', '.join(files)}.")
        typer.echo(commit.pr_url or commit.commit_url)


def config_of(source: Path, saved: SavedAdapter, token: str | None) -> KAdapterConfig:
    """
    A K-Adapter configuration with this adapter: the folder's, or, for a file, a new one with the backbone that it names.

    Raises:
        BackboneMismatchError: the backbone that the adapter was trained on exists only in the folder.
        KAdapterLoadError: there is no folder, and the backbone's configuration can't be read.
    """
    if (source / CONFIG_NAME).exists():
        config = read_config(source)
        if BACKBONE_FILE in read_index(source)[0] and saved.config.backbone_fingerprint == config.backbone_fingerprint:
            raise BackboneMismatchError(
                f"the adapter '{saved.name}' was trained on the backbone in '{source}' and is useless without it: push the "
                "folder without --adapter."
            )
        config.knowledge_adapters = {saved.name: saved.config}
        return config
    name = saved.config.backbone_name_or_path
    if name is None:
        raise KAdapterLoadError(
            f"'{source}' does not name its backbone, which a repository requires: push its folder instead."
        )
    try:
        with quiet():
            backbone = AutoConfig.from_pretrained(name, token=token)
    except Exception as error:  # a foreign configuration class may raise anything
        raise KAdapterLoadError(
            f"the configuration of the backbone '{name}' of '{source}' can't be read: {error}"
        ) from error
    return KAdapterConfig(
        backbone_name_or_path=name, backbone_config=backbone, knowledge_adapters={saved.name: saved.config}
    )
