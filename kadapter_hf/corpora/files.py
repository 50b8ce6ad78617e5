"""Reading text, JSON and CSV files, and writing JSON."""

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..messages import shortened
from ..progress import progress


T = TypeVar("T")


def json_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The objects in a JSON Lines file or in a JSON file with one list, with their names, or what is wrong with them."""
    content = Path(path).read_bytes()
    if content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        try:
            rows = json.loads(content.decode("utf-8-sig"))
        except ValueError:
            pass  # perhaps a line that is a list; the others may be usable
        else:
            for number, row in enumerate(progress(rows, path), start=1):
                yield f"row {number}", row if isinstance(row, dict) else "not a JSON object"
            return
    for number, line in progress(list(enumerate(content.splitlines(), start=1)), path):
        try:
            row = json.loads(line.decode("utf-8-sig")) if line.strip() else None
        except UnicodeDecodeError:
            row = "not UTF-8"
        except ValueError:
            row = "not JSON; a file has a list of objects, or an object in each line"
        else:
            if row is None and not line.strip():
                continue
            row = row if isinstance(row, dict) else "not a JSON object"
        yield f"line {number}", row


def csv_records(path: str | Path, delimiter: str = ",") -> Iterator[tuple[str, dict[str, Any] | str]]:
    """
    The rows of a CSV file as dicts from the names in its first line to cells, with the numbers of their first lines, or what is
    wrong with them. Empty rows are left out.

    Args:
        delimiter: of the cells. A first line without it may have semicolons or tabs instead, as some spreadsheets write.

    Raises:
        ValueError: the file is not UTF-8 or not CSV, or two columns have the same name.
    """
    csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters, less than some documents have
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            if delimiter not in first:
                delimiter = next((other for other in ";\t" if other in first), delimiter)
            reader = csv.reader(file, delimiter=delimiter)
            columns = [name.strip() for name in next(reader, [])]
            twice = sorted({name for name in columns if name and columns.count(name) > 1})
            if twice:
                raise ValueError(f"{path} has several columns named '{shortened(twice[0])}'; rename or remove one.")
            before = reader.line_num
            for cells in reader:
                name, before = f"line {before + 1}", reader.line_num
                if not any(cell.strip() for cell in cells):
                    continue
                if any(cell.strip() for cell in cells[len(columns) :]):
                    yield name, "more cells than columns; a text with a comma needs quotation marks"
                    continue
                row: dict[str, Any] = dict.fromkeys(columns)  # a row may have fewer cells
                yield name, row | dict(zip(columns, cells, strict=False))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; save it as CSV in UTF-8.") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}") from None


def read_text(path: str | Path) -> str:
    """The content of a text file. Raises a `ValueError` if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None


def text_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """
    Yields the lines that are not blank, stripped, each with its place for error messages.

    Raises:
        ValueError: a line is not UTF-8.
    """
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        place = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{place} is not UTF-8.") from None
        if text:
            yield place, text


def read_json(path: str | Path, kind: type[T]) -> T:
    """The content of a JSON file whose top level has the given type (dict or list)."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} contains a {type(content).__name__} instead of a {kind.__name__}")
    return content


def write_json(path: str | Path, content: Any) -> None:
    """Writes a JSON file atomically."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)
