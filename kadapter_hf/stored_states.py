"""
The states of frozen parts, in memory or in a folder.

In a folder, each kind of states has one file with the states and one with the number of positions of each row, in the order in
which they are computed. The index says how many rows are complete, and how the states are stored.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
import torch
from transformers.utils import logging

from .corpora.files import read_json, write_json


if TYPE_CHECKING:
    from .activations import Computation

logger = logging.get_logger(__name__)

INDEX = "index.json"
BATCHES_PER_NOTE = 100  # how often the progress is saved, in case the process is killed
Block = tuple[np.ndarray, torch.Tensor]  # the number of positions of each row, and their states


class States:
    """
    The states of each row, `(positions, states, width)`.

    Args:
        blocks: `(positions, states, width)` each.
        places: `(rows, 3)`: the block that has a row's states, where they start, and where they end.
    """

    def __init__(self, blocks: Sequence[torch.Tensor], places: np.ndarray):
        self.blocks, self.places = blocks, places

    def __getitem__(self, row: int) -> torch.Tensor:
        block, start, end = self.places[row].tolist()
        return self.blocks[block][start:end]


def places_of(counts: np.ndarray, block: int = 0) -> np.ndarray:
    """The `places` of rows in a block, from the number of positions of each, `(rows,)`."""
    ends = np.cumsum(counts)
    return np.stack([np.full(len(counts), block), ends - counts, ends], axis=1)


def by_row(places: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The `places` in the order of the rows, from those in the order in which the rows were computed."""
    arranged = np.empty_like(places)
    arranged[order] = places
    return arranged


@dataclass
class Index:
    """
    The content of a folder.

    Args:
        rows: the number of complete rows.
        kinds: the number of states, their width and their dtype, by kind.
    """

    rows: int = 0
    kinds: dict[str, tuple[int, int, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, place: Path) -> "Index | None":
        """The index of a folder; None if it can't be read, or if a file is shorter than it says."""
        try:
            index = cls(**read_json(place / INDEX, dict))
            sizes = index.sizes(place)
            return index if all(path.stat().st_size >= size for path, size in sizes.items()) else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def sizes(self, place: Path) -> dict[Path, int]:
        """The bytes that the complete rows take in each file."""
        found: dict[Path, int] = {}
        for kind, (number, width, dtype) in self.kinds.items():
            states, counts = _files(place, kind)
            positions = int(np.fromfile(counts, np.int64, self.rows).sum())
            found |= {counts: 8 * self.rows, states: positions * number * width * getattr(torch, dtype).itemsize}
        return found


def _files(place: Path, kind: str) -> tuple[Path, Path]:
    return place / f"{kind}.bin", place / f"{kind}.counts"


def is_complete(place: Path, rows: int) -> bool:
    index = Index.read(place)
    return index is not None and index.rows == rows


def read_states(place: Path, order: np.ndarray) -> dict[str, States]:
    """The states by kind, memory-mapped. `order` is the order in which the rows were computed."""
    found = {}
    for kind, (number, width, dtype) in Index(**read_json(place / INDEX, dict)).kinds.items():
        states, counts = _files(place, kind)
        places = places_of(np.fromfile(counts, np.int64))
        size = int(places[-1, -1]) * number * width
        block = torch.from_file(str(states), size=size, dtype=getattr(torch, dtype)).view(-1, number, width)
        found[kind] = States([block], by_row(places, order))
    return found


def _resume(place: Path) -> Index:
    """The index of an earlier run, if there is one; truncates the files to the rows that it says are complete."""
    index = Index.read(place)
    if index is None:
        if (place / INDEX).exists():
            logger.warning(f"'{place}' is damaged, and is computed again.")
            (place / INDEX).unlink()
        return Index()
    for path, size in index.sizes(place).items():
        os.truncate(path, size)
    return index


def write_states(computed: "Computation", place: Path) -> None:
    """Computes and writes the states that the folder lacks. If it is interrupted, the complete batches are kept."""
    index, total = _resume(place), len(computed.rows)
    mode: Literal["ab", "wb"] = "ab" if index.rows else "wb"
    files: dict[Path, BinaryIO] = {}

    def note_progress() -> None:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())  # first, so that the states that are counted are on the disk
        write_json(place / INDEX, asdict(index))

    try:
        for number, batch in enumerate(computed.batches(index.rows), start=1):
            if number == 1:
                _check_space(computed.size(batch, index.rows), place, index.rows, total)
                for kind, (_, block) in batch.items():
                    index.kinds[kind] = (*block.shape[1:], str(block.dtype).removeprefix("torch."))
                    for path in _files(place, kind):
                        files[path] = open(path, mode)
            for kind, (counts, block) in batch.items():
                states_file, counts_file = _files(place, kind)
                files[states_file].write(block.contiguous().view(torch.uint8).numpy().data)
                files[counts_file].write(counts.astype(np.int64).tobytes())
            index.rows += len(counts)
            if number % BATCHES_PER_NOTE == 0:
                note_progress()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Stopped with the frozen states of {index.rows} of {total} examples in '{place}'. The same command continues from "
            "there."
        ) from None
    finally:
        if files:
            note_progress()
        for file in files.values():
            file.close()


def _check_space(size: int, place: Path, done: int, total: int) -> None:
    free = shutil.disk_usage(place).free
    earlier = f", in addition to {done} from an earlier run" if done else ""
    logger.warning(f"The frozen states of {total - done} examples need {size / 1e9:.2f} GB in '{place}'{earlier}.")
    if size > free:
        if not done:
            shutil.rmtree(place, ignore_errors=True)
        raise OSError(
            f"'{place.parent}' has {free / 1e9:.2f} GB left, and the frozen states need {size / 1e9:.2f} GB. Choose a larger "
            "disk, cache them in bfloat16, or train without a cache."
        )
