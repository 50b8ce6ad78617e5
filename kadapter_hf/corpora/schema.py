"""
The three schemas for corpora, the validation of rows, and the report on dropped records.

Spans are `[start, end)` in characters (code points) of the row's text, as in `text[start:end]`.
"""

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from ..messages import shortened
from ..modeling.parsing_kadapter import find_cycle
from .files import csv_records, json_records, write_json


NAMES_PER_REASON = 5
Row = Mapping[str, Any]
# The name of a record, and its row or the problem with it.
Record = tuple[str, Row | str]
# Exceptions raised by malformed records.
MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class Schema:
    """
    The schema of the rows of one kind of data set.

    Attributes:
        problem: returns the problem with a row, in words that don't depend on the row's values, or None. A row without
            labels is no problem: it is to be predicted.
        labels: the column with a row's label or labels.
    """

    name: str
    features: Features
    problem: Callable[[Row], str | None]
    labels: str

    def without_labels(self) -> "Schema":
        """The schema of rows that are to be predicted."""
        features = Features({name: feature for name, feature in self.features.items() if name != self.labels})
        return replace(self, features=features)


@dataclass
class Report:
    """The number of rows kept and of rows per label; for each reason, the number of dropped records and the first names."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, list[str]] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)

    def keep(self, labels: str | Iterable[str]) -> None:
        """Counts a row and its labels."""
        self.kept += 1
        for label in (labels,) if isinstance(labels, str) else labels:
            self.labels[label] += 1

    def drop(self, reason: str, name: str, count: int = 1) -> None:
        """Counts dropped records; `name` is that of one of them."""
        self.dropped[reason] += count
        names = self.first_dropped.setdefault(reason, [])
        if len(names) < NAMES_PER_REASON:
            names.append(shortened(name))

    def add(self, other: "Report") -> None:
        """Adds the numbers and names of another report."""
        self.kept += other.kept
        self.dropped.update(other.dropped)
        self.labels.update(other.labels)
        for reason, names in other.first_dropped.items():
            self.first_dropped[reason] = [*self.first_dropped.get(reason, []), *names][:NAMES_PER_REASON]

    def renamed(self, prefix: str) -> "Report":
        """The same report, with this prefix for the names of records."""
        names = {reason: [f"{prefix}: {name}" for name in names] for reason, names in self.first_dropped.items()}
        return replace(self, first_dropped=names)

    def reasons(self) -> str:
        """All reasons in one line, most frequent first."""
        return "; ".join(
            f"{count} × {reason} ({', '.join(self.first_dropped[reason])})"
            for reason, count in self.dropped.most_common()
        )

    def save(self, path: str | Path, **more: Any) -> None:
        """Writes the report and the entries in `more` as JSON, atomically."""
        write_json(path, vars(self) | more)

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Reads a report that `save` has written."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(content["kept"], Counter(content["dropped"]), content["first_dropped"], Counter(content["labels"]))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disables garbage collection, which takes much of the time where many objects without cycles are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def token_spans(text: str, tokens: Sequence[str]) -> list[tuple[int, int]] | None:
    """The spans of the tokens in the text, in order; None if one is not found."""
    spans, end = [], 0
    for token in tokens:
        start = text.find(token, end)
        if start < 0:
            return None
        end = start + len(token)
        spans.append((start, end))
    return spans


def relation_row(
    tokens: Sequence[str], subject: tuple[int, int], object_: tuple[int, int], relation: str
) -> Row | str:
    """
    A row of the relation schema from words, joined by single spaces; or the problem with the spans.

    Args:
        subject, object_: spans `[start, end)` of words, counted from 0.
    """
    if not all(0 <= first < behind <= len(tokens) for first, behind in (subject, object_)):
        return "a span is outside the words"
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(token) + 1)
    spans = [[starts[first], starts[behind] - 1] for first, behind in (subject, object_)]
    return {"text": " ".join(tokens), "subject": spans[0], "object": spans[1], "relation": relation}


def relation_problem(row: Row) -> str | None:
    """The problem with a row of the relation schema, or None."""
    problem = text_problem(row) or _span_problem(row, "subject") or _span_problem(row, "object")
    if problem:
        return problem
    if row["subject"][0] < row["object"][1] and row["object"][0] < row["subject"][1]:
        return "subject and object overlap"
    if "relation" in row and not is_name(row["relation"]):
        return "relation is not a name"
    return None


def typing_problem(row: Row) -> str | None:
    """The problem with a row of the typing schema, or None."""
    problem = text_problem(row) or _span_problem(row, "entity")
    if problem:
        return problem
    if "types" in row and not is_list(row["types"], is_name):
        return "types is not a list of names"
    return None


def dependency_problem(row: Row) -> str | None:
    """The problem with a row of the dependency schema, or None."""
    problem = text_problem(row)
    if problem:
        return problem
    tokens, heads, labels = (row.get(column, ()) for column in ("tokens", "heads", "labels"))
    if not is_list(tokens, is_name) or not tokens:
        return "tokens is not a list of words"
    if not is_list(heads, lambda head: type(head) is int):
        return "heads is not a list of integers"
    if not is_list(labels, is_name):
        return "labels is not a list of names"
    if not len(tokens) == len(heads) == len(labels):
        return "tokens, heads and labels differ in length"
    if token_spans(row["text"], tokens) is None:
        return "a token does not occur in the text"
    if not all(0 <= head <= len(tokens) for head in heads):
        return "a head is outside the sentence"
    roots = heads.count(0)
    if roots != 1:
        return "no root" if roots == 0 else "several roots"
    return "a cycle" if find_cycle([0, *heads]) else None


def text_problem(row: Row, column: str = "text") -> str | None:
    """The problem with a column that must hold text, or None."""
    text = row.get(column)
    if not isinstance(text, str):
        return f"{column} is not a string"
    if not text.strip():
        return f"the {column} is empty"
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair, Arrow can't
        return f"the {column} is not Unicode"
    return None


def _span_problem(row: Row, name: str) -> str | None:
    span = row.get(name)
    if not (isinstance(span, (list, tuple)) and len(span) == 2 and type(span[0]) is type(span[1]) is int):
        return f"{name} is not [start, end]"
    start, end = span
    if start < 0 or end > len(row["text"]):
        return f"the {name} is outside the text"
    return None if row["text"][start:end].strip() else f"the {name} is empty"


def is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(of, value))


_TEXT, _SPAN = Value("string"), List(Value("int32"), length=2)
RELATION = Schema(
    "relation",
    Features({"text": _TEXT, "subject": _SPAN, "object": _SPAN, "relation": _TEXT}),
    relation_problem,
    "relation",
)
TYPING = Schema(
    "typing", Features({"text": _TEXT, "entity": _SPAN, "types": List(_TEXT)}), typing_problem, labels="types"
)
# heads are token numbers, starting at 1; 0 is the root. The tokens occur in the text in this order.
DEPENDENCY = Schema(
    "dependency",
    Features({"text": _TEXT, "tokens": List(_TEXT), "heads": List(Value("int32")), "labels": List(_TEXT)}),
    dependency_problem,
    "labels",
)


def as_labels(value: str | Sequence[str]) -> Sequence[str]:
    """The labels in the column of a row that holds one or several."""
    return [value] if isinstance(value, str) else value


def label_set(rows: Dataset, schema: Schema) -> set[str]:
    """The labels that occur in rows."""
    return {label for value in rows[schema.labels][:] for label in as_labels(value)}


def check_columns(columns: Iterable[str], schema: Schema) -> None:
    """Raises a ValueError that lists missing columns of the schema."""
    columns = list(columns)
    missing = [name for name in schema.features if name not in columns]
    if missing:
        raise ValueError(
            f"the {schema.name} schema has the columns {', '.join(schema.features)}; missing: {', '.join(missing)}"
        )


def build(path: str | Path, schema: Schema, records: Iterable[Record], strict: bool) -> tuple[Dataset, Report]:
    """
    A data set of all records that are valid rows of the schema, and a report on the others.

    Raises:
        ValueError: no row is left; with `strict`, a record is unusable. The message names the file and the record.
    """
    rows, report = [], Report()
    for name, row in records:
        problem = row if isinstance(row, str) else schema.problem(row)
        if isinstance(row, str) or problem:
            if strict:
                raise ValueError(f"{path}, {shortened(name)}: {problem}")
            report.drop(str(problem), name)
        else:
            rows.append({column: row[column] for column in schema.features})
            labels = row.get(schema.labels)  # of some tasks a number or an answer
            report.keep(labels if isinstance(labels, (str, list, tuple)) else [])
    if not rows:
        raise ValueError(f"{path}: no usable record. {report.reasons() or 'The file has no records'}")
    return Dataset.from_list(rows, features=schema.features), report


def read_jsonl(path: str | Path, schema: Schema, strict: bool = False) -> tuple[Dataset, Report]:
    """
    Reads custom rows with the columns of the schema from a JSON Lines file, or from a JSON file with one list of rows.

    Raises:
        ValueError: no line is usable; with `strict`, a line is unusable.
    """
    return build(path, schema, ((name, _with_columns(row, schema)) for name, row in json_records(path)), strict)


def _with_columns(record: dict[str, Any] | str, schema: Schema) -> Row | str:
    """The row, or what is wrong with it."""
    if isinstance(record, str):
        return record
    missing = [name for name in schema.features if name not in record]
    return f"no column {', '.join(missing)}" if missing else record


def read_csv(path: str | Path, schema: Schema, strict: bool = False, delimiter: str = ",") -> tuple[Dataset, Report]:
    """
    Reads custom rows from a CSV file whose first line names the columns of the schema.

    Spans and other lists are written as JSON, e.g. `[0, 4]` or `["city", "place"]`.

    Raises:
        ValueError: a column is missing; no row is usable; with `strict`, a row is unusable.
    """
    return build(path, schema, _csv_rows(path, schema, delimiter), strict)


def _csv_rows(path: str | Path, schema: Schema, delimiter: str) -> Iterator[Record]:
    lists = [name for name, feature in schema.features.items() if isinstance(feature, List)]
    for number, (name, row) in enumerate(csv_records(path, delimiter)):
        if isinstance(row, str):
            yield name, row
            continue
        if number == 0:
            try:
                check_columns(row, schema)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        yield name, row | {column: _parsed_cell(row[column]) for column in lists}


def _parsed_cell(cell: str | None) -> Any:
    try:
        return json.loads(cell or "null")
    except ValueError:
        return cell
