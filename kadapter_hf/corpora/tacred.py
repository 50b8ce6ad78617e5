"""TACRED (Zhang et al., 2017), also TACREV and Re-TACRED: relations in tokenised sentences from news and the web."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..progress import progress
from .files import read_json
from .schema import MALFORMED, RELATION, Record, Report, Row, build, relation_row


def read_tacred(path: str | Path, strict: bool = False) -> tuple[Dataset, Report]:
    """
    Reads a TACRED file in JSON format as rows of the relation schema, including `no_relation`.

    As in the original code, words are unchanged, e.g. `-LRB-` for an opening bracket.

    Raises:
        ValueError: the file is not in TACRED's format; with `strict`, a record is unusable.
    """
    return build(path, RELATION, _rows(path), strict)


def records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yields the name and the content of each record of a file."""
    for number, example in enumerate(progress(read_json(path, list), path)):
        name = example.get("id") if isinstance(example, dict) else None
        yield str(name or f"record {number}"), example


def row_of(example: Any, relation: str) -> Row | str:
    """The row of a record, or the problem with its spans. Raises one of `MALFORMED` if it lacks something."""
    # Ends are inclusive in TACRED.
    subject = (example["subj_start"], example["subj_end"] + 1)
    object_ = (example["obj_start"], example["obj_end"] + 1)
    return relation_row(example["token"], subject, object_, relation)


def _rows(path: str | Path) -> Iterator[Record]:
    for name, example in records(path):
        try:
            row = row_of(example, example["relation"])
        except MALFORMED:
            row = "the record is incomplete"
        yield name, row
