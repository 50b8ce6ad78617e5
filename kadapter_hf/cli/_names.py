"""
Names, and whether they can be right: what the commands check before they import anything large. A test compares the lists with
the registries of `kadapter_hf`.
"""

import difflib
from collections.abc import Iterable


TASKS = (
    *("open-entity", "figer", "tacred", "cosmos-qa", "search-qa", "quasar-t", "semeval-2010-task-8"),
    *("relation", "typing", "classification", "multiple-choice", "extractive-qa", "ner"),
)
OBJECTIVES = ("factual", "linguistic", "typing")
FUSIONS = ("add", "attention", "concat", "gate")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The suggestion of a similar name, to append to a message; empty if there is none."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def is_repo_id(name: str) -> bool:
    """Whether this is a valid name of a repository on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
