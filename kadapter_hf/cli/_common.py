"""What the commands share: how errors come out, JSON for scripts, and the options about the Hub."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError, SafetensorsParsingError
from rich.console import Console

from ..messages import is_repo_id, sentence


# What data, a machine or the Hub can be at fault with. KAdapterLoadError and the Hub's refusals are OSErrors,
# KAdapterConfigError is a ValueError; HTTPError is that of the HTTP client: nobody answered.
FAULTS = (
    ValueError,
    OSError,
    ImportError,
    MemoryError,
    torch.OutOfMemoryError,
    HTTPError,
    SafetensorsParsingError,
    DatasetsError,
)


@contextmanager
def plain_errors(repo: str | None = None) -> Iterator[None]:
    """
    Ends the command with one sentence and exit code 1 where the data, the machine or the Hub is at fault.

    Args:
        repo: the repository that a refusal of the Hub is about.
    """
    try:
        yield
    except BrokenPipeError:  # of `| head`, which has read enough
        raise
    except FAULTS as error:
        Console(stderr=True, soft_wrap=True).print(f"Error: {sentence(error, repo)}", markup=False, highlight=False)
        raise typer.Exit(1) from None


def print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=2))


def _checked_repo(repo: str) -> str:
    if not is_repo_id(repo):
        raise typer.BadParameter(f"'{repo}' can't be a repository on the Hub, which is called owner/name.")
    return repo


def _checked_token(token: str | None) -> str | None:
    # The HTTP client would refuse it too, and say what it is.
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise typer.BadParameter(
            "that is not a token: it is empty, or has a space or another character that none has."
        )
    return token


Repo = Annotated[
    str, typer.Argument(callback=_checked_repo, show_default=False, help="A repository on the Hub, owner/name.")
]
Revision = Annotated[
    str | None, typer.Option(show_default=False, help="A branch, tag or commit of the repository on the Hub.")
]
Token = Annotated[
    str | None,
    typer.Option(
        callback=_checked_token,
        show_default=False,
        help="For the Hub; by default HF_TOKEN or that of `hf auth login`.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
