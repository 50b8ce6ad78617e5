"""Formatting of errors and of untrusted text for display."""

from typing import Any

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kadapter_cli._names import one_line


MOST = 4000
LOGIN = "log in with `hf auth login` or give --token"
# Errors of the Hub that get a different message, subclasses first.
REFUSALS = {
    GatedRepoError: f"is gated: ask for access on its page on the Hub, and {LOGIN}",
    RepositoryNotFoundError: f"is not on the Hub, or private: check the name, and {LOGIN}",
    RevisionNotFoundError: "has no such revision on the Hub",
}


def sentence(error: Exception, repo: str | None = None) -> str:
    """The message of an error, in one line of at most `MOST` characters."""
    text = str(error) or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        words = next((words for kind, words in REFUSALS.items() if isinstance(error, kind)), None)
        if words is None and error.response.status_code == 401:
            words = f"needs a valid token: {LOGIN}"
        words = words or f"was refused by the Hub: {(error.server_message or text).rstrip('.')}"
        text = f"'{repo or error.request.url}' {words}."
    elif isinstance(error, LocalEntryNotFoundError) and repo is not None:
        text = f"'{repo}' is not completely cached, and the Hub can't be reached: check the name and the network."
    elif isinstance(error, HTTPError):
        text = f"the Hub can't be reached ({text}): check the network."
    return one_line(shortened(text, MOST))


def needs(what: str, library: str, extra: str) -> str:
    """The sentence that says which extra of the package to install, as a library is missing."""
    return f"{what} needs {library}: pip install 'kadapter-hf[{extra}]'"


def shortened(text: Any, most: int = 100) -> str:
    """Text of at most `most` characters; a longer one loses its middle. For quoting what is in a file."""
    text = str(text)
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
