"""TACRED (Zhang et al., 2017), also TACREV and Re-TACRED: relations in sentences of news and the web, as words."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from .schema import MALFORMED, RELATION, Record, Report, Row, build, progress, read_json, relation_row


def read_tacred(path: str | Path, strict: bool = False) -> tuple[Dataset, Report]:
    """
    A TACRED file in its JSON form as rows of the relation schema, `no_relation` included.

    Words are left as they are, `-LRB-` for an opening bracket among them, as the original code does.

    Raises:
        ValueError: the file isn't TACRED's; with `strict`, a record isn't usable.
    """
    return build(path, RELATION, _records(path), strict)


def _records(path: str | Path) -> Iterator[Record]:
    for number, example in enumerate(progress(read_json(path, list), path)):
        name = example.get("id") if isinstance(example, dict) else None
        yield str(name or f"record {number}"), _row(example)


def _row(example: Any) -> Row | str:
    try:
        # TACRED's ends are the last words themselves.
        subject = (example["subj_start"], example["subj_end"] + 1)
        object_ = (example["obj_start"], example["obj_end"] + 1)
        return relation_row(example["token"], subject, object_, example["relation"])
    except MALFORMED:
        return "the record is incomplete"
