"""
Names, and whether they can be right: what the commands check before they import anything large, and the package checks too. A
test compares the lists with the registries of `kadapter_hf`.
"""

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


# With the class of their options in `kadapter_hf.tasks`.
TASKS = {
    "open-entity": "typing.TypingOptions",
    "figer": "typing.TypingOptions",
    "tacred": "tacred.TacredOptions",
    "cosmos-qa": "task.Options",
    "search-qa": "extractive_qa.ExtractiveQAOptions",
    "quasar-t": "extractive_qa.ExtractiveQAOptions",
    "semeval-2010-task-8": "semeval.SemEvalOptions",
    "relation": "relation.RelationOptions",
    "typing": "typing.TypingOptions",
    "classification": "task.Options",
    "multiple-choice": "task.Options",
    "extractive-qa": "extractive_qa.ExtractiveQAOptions",
    "ner": "task.Options",
}
OF_CLASSES = ("accuracy", "macro_f1", "micro_f1")
OF_TYPES = (*OF_CLASSES, "macro_precision", "macro_recall", "micro_precision", "micro_recall")
OF_ANSWERS = ("exact_match", "f1")
# What an evaluation for a task or an objective computes besides the loss.
METRICS = {
    "factual": OF_CLASSES,
    "linguistic": ("uas", "las", "uas_without_punctuation", "las_without_punctuation"),
    "open-entity": OF_TYPES,
    "figer": OF_TYPES,
    "tacred": ("micro_f1", "micro_precision", "micro_recall"),
    "cosmos-qa": ("accuracy",),
    "search-qa": OF_ANSWERS,
    "quasar-t": OF_ANSWERS,
    "semeval-2010-task-8": ("macro_f1", "macro_f1_original"),
    "relation": OF_CLASSES,
    "typing": OF_TYPES,
    "classification": OF_CLASSES,
    "multiple-choice": ("accuracy",),
    "extractive-qa": OF_ANSWERS,
    "ner": ("f1", "precision", "recall"),
}
OBJECTIVES = ("factual", "linguistic", "typing")
# With what their configurations may have.
FUSIONS = {
    "add": ("scale",),
    "attention": ("key_size", "start"),
    "concat": ("start",),
    "gate": ("activation", "start", "top_k"),
}
DATA_SUFFIXES = (".conllu", ".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt")
ADAPTER_NAME = "[A-Za-z0-9][A-Za-z0-9_-]{0,63}"


def one_line(value: Any) -> str:
    """Text in one line, without control characters for the terminal, as files may come from strangers."""
    return "".join(
        char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(str(value).split())
    )


def parsed_object(text: str) -> dict[str, Any] | None:
    """The JSON object in a text; None if it is not one."""
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The suggestion of a similar name, to append to a message; empty if there is none."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def fusion_problem(fusion: str, values: Iterable[str]) -> str | None:
    """Why a fusion can't have these values in its configuration; None if it can, or is none of `FUSIONS`."""
    known = FUSIONS.get(fusion)
    unknown = sorted(set(values) - set(known or values))
    if not unknown:
        return None
    return f"the fusion '{fusion}' has no {unknown}; it has {', '.join(known or ())}.{did_you_mean(unknown[0], known or ())}"


def source_problem(source: str) -> str | None:
    """Why this can't be the place of a model or an adapter, or NAME=PLACE; None if it can."""
    source = _without_name(source)
    if os.path.exists(source) or (is_repo_id(source) and not source.endswith(".safetensors")):
        return None
    return f"'{source}' is neither a local file or folder nor a valid name of a repository on the Hub (owner/name)."


def data_problem(source: str) -> str | None:
    """Why this can't be the place of data, or NAME=PLACE: it is a path, and there is nothing; None if it can."""
    source = _without_name(source)
    is_path = source.startswith((".", "/", "~")) or source.endswith(DATA_SUFFIXES)
    return f"'{source}' does not exist." if is_path and not os.path.exists(source) else None


def _without_name(source: str) -> str:
    _, equals, place = source.partition("=")
    return place if equals and not os.path.exists(source) else source


def output_problem(output: Path) -> str | None:
    """Why a command can't write to `output`, which must be an empty folder or not exist yet; None if it can."""
    existing = next(path for path in (output, *output.absolute().parents) if os.path.exists(path))
    if not existing.is_dir():
        return f"'{existing}' is a file; choose another folder."
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"'{existing}' can't be written to; choose another folder."
    if existing == output and any(output.iterdir()):
        return f"'{output}' exists and is not empty; choose another folder."
    return None


def is_repo_id(name: str) -> bool:
    """Whether this is a valid name of a repository on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
