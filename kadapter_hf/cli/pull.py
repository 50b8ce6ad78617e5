"""`kadapter pull`: downloads a K-Adapter repository, or one of its adapters, from the Hub."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ._arguments import AsJson, Repo, Revision, Token, check_new
from ._names import one_line
from ._output import conclude, print_json, running, say


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
    if output is not None:
        check_new(output)
    from kadapter_hf.pulling import pull_adapter, pull_repository

    with running(repo):
        if adapter is None:
            pulled = pull_repository(repo, output, revision, token)
        else:
            pulled = pull_adapter(repo, adapter, output, revision, token)
        if as_json:
            print_json({"repo_id": repo, **pulled})
            return
        say(f"{repo} at commit {pulled['commit']} is complete, in {pulled['path']}.")
        backbone = one_line(pulled["backbone"]["name"])
        if pulled["backbone"]["included"]:
            say("It includes its backbone.")
        elif os.path.isabs(backbone):
            say(f"Its backbone is {backbone}, a folder on its author's machine: pass the backbone with backbone=….")
        else:
            say(f"Its backbone, {backbone}, is downloaded when the model is first loaded.")
        conclude(f"To load it: {pulled['load']}")
