"""What the commands share: how errors come out, JSON for scripts, and the options about the Hub."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import validate_repo_id
from rich.console import Console


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
LOGIN = "log in with `hf auth login` or give --token"
# The Hub's refusals that need other words than its own, the more special ones first.
REFUSALS = {
    GatedRepoError: f"is gated: ask for access on its page on the Hub, and {LOGIN}",
    RepositoryNotFoundError: f"is not on the Hub, or private: check the name, and {LOGIN}",
    RevisionNotFoundError: "has no such revision on the Hub",
}


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


def sentence(error: Exception, repo: str | None = None) -> str:
    """What an error says, in one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        words = next((words for kind, words in REFUSALS.items() if isinstance(error, kind)), None)
        if words is None and error.response.status_code == 401:
            words = f"needs a valid token: {LOGIN}"
        words = words or f"is refused by the Hub: {(error.server_message or text).rstrip('.')}"
        text = f"'{repo or error.request.url}' {words}."
    elif isinstance(error, LocalEntryNotFoundError) and repo is not None:
        text = (
            f"'{repo}' is not whole in the Hub's cache, and the Hub can't be reached: check the name and the network."
        )
    elif isinstance(error, HTTPError):
        text = f"the Hub can't be reached ({text}): check the network."
    return one_line(text)


def one_line(value: Any) -> str:
    """Text for people: in one line, and without what a terminal would take for a command, as files are of strangers."""
    return "".join(
        char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(str(value).split())
    )


def print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=2))


def is_repo_id(name: str) -> bool:
    """Whether a repository on the Hub can have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


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
