"""Reads the rows of users' own tables: CSV, TSV, JSON Lines, JSON and Parquet, with the column names that are common."""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, List
from datasets.exceptions import DatasetsError

from ..corpora.files import csv_records, json_records
from ..messages import shortened


# Endings of the files that `records` reads.
TABLES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
# The name of each record for messages, and its content or what is wrong with it.
Records = Iterator[tuple[str, dict[str, Any] | str]]


class RowProblem(ValueError):
    """What is wrong with a row, in words for the user."""


def records(path: Path) -> Records:
    """The rows of a table."""
    ending = path.suffix.lower()
    if ending == ".parquet":
        try:
            return dataset_records(Dataset.from_parquet(str(path)))
        except (OSError, ValueError, DatasetsError) as error:
            raise ValueError(f"{path} is not Parquet: {error}") from None
    if ending in (".csv", ".tsv"):
        return csv_records(path, "\t" if ending == ".tsv" else ",")
    return json_records(path)


def dataset_records(rows: Dataset) -> Records:
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
    """
    The value of the first of these columns in which the row has something; None if there is none. Case, spaces, hyphens and
    underscores in the names of columns make no difference.
    """
    values = {_plain(name): value for name, value in record.items() if isinstance(name, str)}
    found = (values.get(_plain(name)) for name in names)
    return next(
        (value for value in found if value is not None and not (isinstance(value, str) and not value.strip())), None
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def label_in(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    """As `find`, for the name of a class, which may be written as a number."""
    value = find(record, names)
    return str(value) if isinstance(value, (int, float)) else value


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
    """A cell with a list or a dict in JSON or, as pandas writes it, in Python, such as `[0, 4]`; other values unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            pass
        if not re.search(r"""['"]\s+['"]""", value):  # an array of numpy, whose texts Python would join
            try:
                return ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                pass
    return value


def names_in(value: Any) -> list[str]:
    """The labels in a cell: a list, JSON, or names separated by commas, semicolons or vertical bars."""
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
            return [_whole(start, f"{name}_start"), _whole(end, f"{name}_end")]
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


def _whole(value: Any, name: str) -> int:
    """A whole number, also from a text such as `12.0`, which pandas writes if other cells of the column are empty."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RowProblem(f"{name} is not a number") from None
    if not number.is_integer():
        raise RowProblem(f"{name} is not a whole number")
    return int(number)
