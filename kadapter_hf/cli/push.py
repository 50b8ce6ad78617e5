"""`kadapter push`: uploads a K-Adapter folder or one adapter to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from ._arguments import AsJson, Repo, Token
from ._output import conclude, print_json, running, say


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
    from kadapter_hf.hub import push_source

    with running(repo):
        commit, files = push_source(
            source,
            repo,
            adapter,
            commit_message=message,
            private=private or None,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )
        if as_json:
            pushed = {"repo_id": commit.repo_url.repo_id, "commit": commit.oid, "url": commit.commit_url}
            print_json(pushed | {"pr_url": commit.pr_url, "files": files})
            return
        others = [file for file in files if not file.endswith("_kadapter.py")]
        say(f"Pushed {', '.join(others)} and {len(files) - len(others)} files of code.")
        if commit.pr_url:
            conclude(f"The pull request is {commit.pr_url}.")
        else:
            conclude(
                f"The commit is {commit.commit_url}. `kadapter info {commit.repo_url.repo_id}` shows what is there."
            )
