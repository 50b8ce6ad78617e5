"""Reads the rows of users' own tables: CSV, TSV, JSON Lines, JSON and Parquet, with the column names that are common."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, List

from ..corpora.schema import csv_records, json_records
from ..messages import shortened


# Endings of the files that `records` reads.
TABLES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
Named = Iterator[tuple[str, dict[str, Any] | str]]


class RowProblem(ValueError):
    """What is wrong with a row, in words for the user."""


def records(path: Path) -> Named:
    """The rows of a table as dicts, with their names for error messages, or what is wrong with them."""
    ending = path.suffix.lower()
    if ending == ".parquet":
        return dataset_records(Dataset.from_parquet(str(path)))
    if ending in (".csv", ".tsv"):
        return csv_records(path, "\t" if ending == ".tsv" else ",")
    return json_records(path)


def dataset_records(rows: Dataset) -> Named:
    """The rows of a data set; classes are replaced by their names."""
    classes = {}
    for name, feature in rows.features.items():
        inner = feature.feature if isinstance(feature, List) else feature
        if isinstance(inner, ClassLabel):
            classes[name] = inner
    for number, row in enumerate(rows, start=1):
        for name, labels in classes.items():
            if row[name] is not None and row[name] != -1:
                row[name] = labels.int2str(row[name])
            else:
                row[name] = None
        yield f"row {number}", row


def find(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of these columns that the row has; None if it has none of them, or nothing there."""
    lower = {str(name).strip().lower(): value for name, value in record.items() if isinstance(name, str)}
    value = next((lower[name] for name in names if name in lower), None)
    return None if isinstance(value, str) and not value.strip() else value


def needed(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    """
    As `find`, for a column that must be there.

    Raises:
        RowProblem: it is missing or empty; the message lists the possible names and the columns there are.
    """
    value = find(record, names)
    if value is None:
        columns = shortened(", ".join(str(name) for name in record), 200)
        raise RowProblem(f"no {names[0]} (a column {' or '.join(names)}); the columns are {columns}")
    return value


def parsed(value: Any) -> Any:
    """A cell that holds JSON, such as `[0, 4]`, parsed; other values unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value


def names_in(value: Any) -> list[str]:
    """The labels in a cell: a list, JSON, or names separated by commas, semicolons or vertical bars; None has none."""
    value = parsed(value)
    if value is None:
        return []
    if isinstance(value, str):
        return [name.strip() for name in re.split(r"[,;|]", value) if name.strip()]
    return list(value)


def span(record: Mapping[str, Any], text: str, names: Sequence[str]) -> list[int]:
    """
    The span `[start, end)` of an entity in the text. It is given as such, as two columns (`subject_start` and
    `subject_end`), or as the entity's text if it occurs only once.

    Raises:
        RowProblem: it is missing, does not occur in the text, or occurs several times.
    """
    for name in names:
        start, end = find(record, [f"{name}_start"]), find(record, [f"{name}_end"])
        if start is not None and end is not None:
            try:
                return [int(start), int(end)]
            except (TypeError, ValueError):
                raise RowProblem(f"{name}_start or {name}_end is not a number") from None
    value = parsed(needed(record, names))
    if not isinstance(value, str):
        return value
    places = _places(text, value.strip())
    if len(places) != 1:
        found = f"occurs {len(places)} times" if places else "does not occur"
        raise RowProblem(
            f"the {names[0]} '{shortened(value)}' {found} in the text; give its offsets as [start, end] instead"
        )
    return [places[0], places[0] + len(value.strip())]


def _places(text: str, name: str) -> list[int]:
    """Where a name occurs as a whole word, or else as a part of one, as in languages written without spaces."""
    found = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    return found or [match.start() for match in re.finditer(re.escape(name), text)]
