"""Progress bars, which transformers' `disable_progress_bar` turns off."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from transformers.utils import logging


T = TypeVar("T")


def progress(items: Sequence[T], name: str | Path) -> Iterable[T]:
    """The items, with a bar that says `name`, or the name of a file."""
    return logging.tqdm(items, desc=Path(name).name, leave=False, dynamic_ncols=True)
