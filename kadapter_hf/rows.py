"""Loads rows from files, folders or the Hub as `kadapter pretrain --data` names them, and divides them."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from transformers.utils import logging

from .corpora import Report, Schema, check_columns, read_csv, read_jsonl


logger = logging.get_logger(__name__)

# The names of splits in the names of files, as in datasets.
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
# Endings of files, with the format's name in datasets and further arguments.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".json": ("json", {}),
}


def load_rows(data: str, schema: Schema | None) -> DatasetDict:
    """
    Loads rows and checks them against a schema. Rows that violate it are dropped with a warning.

    Args:
        data: a file of one of `FORMATS`, a folder of such files or of `save_to_disk`, or a data set on the Hub.

    Raises:
        ValueError: the format is unknown, a column is missing, there is no split to train on, or no row is left.
    """
    found = find_splits(data, tuple(FORMATS))
    if isinstance(found, DatasetDict):
        splits = found
    else:
        splits = DatasetDict({split: _read(files, schema) for split, files in found.items()})
    if "train" not in splits:
        raise ValueError(f"'{data}' has no split named train; it has {list(splits)}")
    if schema is not None:
        for name, rows in splits.items():
            check_columns(rows.column_names, schema)
            rows = _without_problems(rows.select_columns(list(schema.features)), schema, f"{data}, {name}")
            # With the same types of columns, several data sets can be joined.
            splits[name] = rows if rows.features == schema.features else rows.cast(schema.features)
    return splits


def _read(files: list[str], schema: Schema | None) -> Dataset:
    kind, options = FORMATS[Path(files[0]).suffix.lower()]
    if schema is None or kind == "parquet":
        return load_dataset(kind, data_files={"train": files}, split="train", **options)
    read = read_csv if kind == "csv" else read_jsonl
    return concatenate_datasets([_without_report(file, *read(file, schema, **options)) for file in files])


def find_splits(data: str, endings: Sequence[str]) -> dict[str, list[str]] | DatasetDict:
    """
    The files of each split in a folder; a file is all of the split for training. Or a data set, if `data` is a folder of
    `save_to_disk` or the name of one on the Hub.

    Args:
        endings: of the files to look for. Of the files of a split, those with the first ending that occurs are taken.

    Raises:
        ValueError: there is no such file or data set, or the format is unknown.
    """
    path = Path(data)
    if not path.exists():
        if path.suffix.lower() in endings:
            raise ValueError(f"there is no file '{data}'.")
        try:
            return load_dataset(data)
        except (OSError, DatasetsError) as error:
            raise ValueError(
                f"'{data}' is neither a local file or folder nor a data set on the Hub that can be loaded: {error}"
            ) from error
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        saved = load_from_disk(data)
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    if path.is_file():
        if path.suffix.lower() not in endings:
            raise ValueError(f"'{path}' is of an unknown format; known ones are {', '.join(endings)}.")
        return {"train": [str(path)]}
    named: dict[str, list[str]] = {}
    unnamed: list[str] = []
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    for ending in endings:
        new: dict[str, list[str]] = {}
        for file in files:
            if file.suffix.lower() == ending:
                split = split_named(file.relative_to(path).as_posix())
                new.setdefault(split or "", []).append(str(file))
        unnamed = unnamed or new.pop("", [])
        new.pop("", None)
        named = new | named
    if not named and not unnamed:
        raise ValueError(f"'{path}' has no file of a known format; known ones are {', '.join(endings)}.")
    return named or {"train": unnamed}


def split_named(name: str) -> str | None:
    """The split in the name of a file, if it has one."""
    words = set(re.split("[^a-z]+", name.lower()))
    return next((split for split, names in SPLITS.items() if words & names), None)


def held_out(rows: Dataset, share: float, group: str | None, seed: int) -> tuple[Dataset, Dataset]:
    """
    Divides rows into those to train on and a random share to hold out; rows with the same value in the column `group` stay
    together.

    Raises:
        ValueError: there is only one row or group.
    """
    keys = rows[group][:] if group is not None else list(range(len(rows)))
    groups = sorted(set(keys))
    if len(groups) < 2:
        kind = "row" if group is None else group
        raise ValueError(f"there is only one {kind}, too few to hold some out: add a split for validation.")
    np.random.default_rng(seed).shuffle(groups)
    held = set(groups[: min(max(round(share * len(groups)), 1), len(groups) - 1)])
    numbers: tuple[list[int], list[int]] = ([], [])
    for number, key in enumerate(keys):
        numbers[key in held].append(number)
    return rows.select(numbers[0]), rows.select(numbers[1])


def whole_questions(rows: Dataset, most: int, seed: int) -> Dataset:
    """The passages of random questions, as many as have at most `most` passages in total, but at least one question."""
    passages = Counter(rows["id"][:])
    names = sorted(passages)
    np.random.default_rng(seed).shuffle(names)
    kept: set[str] = set()
    total = 0
    for name in names:
        total += passages[name]
        if kept and total > most:
            break
        kept.add(name)
    return rows.select([number for number, name in enumerate(rows["id"][:]) if name in kept])


def _without_report(file: str, rows: Dataset, report: Report) -> Dataset:
    if report.dropped:
        logger.warning(f"'{file}': dropped rows: {report.reasons()}")
    return rows


def _without_problems(rows: Dataset, schema: Schema, name: str) -> Dataset:
    report, kept = Report(), []
    for number, row in enumerate(rows):
        problem = schema.problem(row)
        if problem:
            report.drop(problem, f"row {number}")
        else:
            kept.append(number)
    return _without_report(name, rows.select(kept) if report.dropped else rows, report)
