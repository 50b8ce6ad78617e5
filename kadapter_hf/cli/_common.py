"""Shared by the commands: error output, JSON output, and the options for the Hub."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError, SafetensorsParsingError
from rich.console import Console

from ..messages import did_you_mean, is_repo_id, sentence
from ..modeling.format_kadapter import KAdapterConfigError, KAdapterLoadError, SavedConfigError


# Errors caused by the data, the machine or the Hub. KAdapterLoadError and errors from the Hub are OSErrors;
# KAdapterConfigError is a ValueError; HTTPError is raised by the HTTP client if there is no response.
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
    Exits with a one-sentence message: with code 1 if an error is caused by the data, the machine or the Hub, and with 2 if
    the value of an argument is impossible.

    Args:
        repo: the repository that errors from the Hub are about.
    """
    try:
        yield
    except BrokenPipeError:  # e.g. output piped to `head`
        raise
    except FAULTS as error:
        Console(stderr=True, soft_wrap=True).print(f"Error: {sentence(error, repo)}", markup=False, highlight=False)
        usage = isinstance(error, KAdapterConfigError) and not isinstance(error, SavedConfigError)
        raise typer.Exit(2 if usage else 1) from None


def check_new(output: Path) -> None:
    """Raises an error if `output` is a file, or a folder that is not empty."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise KAdapterLoadError(f"'{output}' exists and is not empty; choose another folder.")


def print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=2))


def checked_task(task: str | None) -> str | None:
    from ..tasks import TASKS  # imported here, as it takes a moment

    if task is not None and task not in TASKS:
        raise typer.BadParameter(f"'{task}' is not one of {', '.join(TASKS)}.{did_you_mean(task, TASKS)}")
    return task


def _checked_repo(repo: str) -> str:
    if not is_repo_id(repo):
        raise typer.BadParameter(f"'{repo}' is not a valid name of a repository on the Hub (owner/name).")
    return repo


def _checked_token(token: str | None) -> str | None:
    # The HTTP client would reject it too, but print the token.
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise typer.BadParameter("not a valid token: it is empty, or contains a space or another invalid character.")
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
        help="Access token for the Hub. Default: HF_TOKEN or the token of `hf auth login`.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
