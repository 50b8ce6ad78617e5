"""The rows that a fine-tuning trains and evaluates on, as `FinetuningArguments` name them."""

from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, DatasetDict
from transformers.utils import logging

from .corpora.schema import label_set
from .messages import shortened
from .rows import held_out, whole_questions
from .runs import sample
from .tasks import Options, Task
from .tasks.task import warn_of_dropped


if TYPE_CHECKING:
    from .finetuning import FinetuningArguments

logger = logging.get_logger(__name__)


def load_data(
    task: Task, arguments: "FinetuningArguments", options: Options, seed: int
) -> tuple[list[str], dict[str, Dataset]]:
    """
    The labels in the order of the model's outputs, and the rows of each split to train or to evaluate on.

    Raises:
        ValueError: the data does not fit the task.
    """
    splits = _splits(task, arguments, seed)
    _check_labels(task, splits)
    return task.labels_in(splits), _used(task, splits, arguments, options, seed)


def _splits(task: Task, arguments: "FinetuningArguments", seed: int) -> DatasetDict:
    if arguments.data is not None:
        source = arguments.data
        splits = task.read_splits(source, skip_bad_rows=arguments.skip_bad_rows)
    else:
        source = str(arguments.train_file)
        files = {"train": source, "validation": arguments.validation_file, "test": arguments.test_file}
        splits = DatasetDict()
        for name, file in files.items():
            if file is None:
                continue
            if not Path(file).is_file():
                raise ValueError(f"there is no file '{file}'.")
            splits[name], report = task.read(file, skip_bad_rows=arguments.skip_bad_rows)
            warn_of_dropped(file, report)
    if "train" not in splits:
        raise ValueError(f"'{source}' has no split named train; it has {', '.join(splits)}.")
    if "validation" not in splits:
        splits["train"], splits["validation"] = held_out(splits["train"], arguments.eval_size, task.group, seed)
    return splits


def _used(
    task: Task, splits: DatasetDict, arguments: "FinetuningArguments", options: Options, seed: int
) -> dict[str, Dataset]:
    """The rows of each split that are trained or evaluated on."""
    used = {}
    for name, rows in splits.items():
        rows = task.used_rows(rows, options, training=name == "train")
        most = arguments.max_train_samples if name == "train" else arguments.max_eval_samples
        if task.group == "id" and most is not None:
            rows = whole_questions(rows, most, seed)
        used[name] = sample(rows, seed, most)
        if not len(used[name]):
            raise ValueError(f"no row is left for {name}.")
    return used


def _check_labels(task: Task, splits: DatasetDict) -> None:
    """Refuses rows with too few labels to learn from; warns of labels that can't be learned."""
    if not task.has_labels:
        return
    known = label_set(splits["train"], task.schema)
    if len(known) < task.fewest_labels:
        names = f": {', '.join(map(shortened, known))}" if known else ""
        raise ValueError(
            f"the rows to train on have {len(known)} different labels{names}; the task needs at least "
            f"{task.fewest_labels}."
        )
    for name, rows in splits.items():
        unknown = sorted(label_set(rows, task.schema) - known)
        if unknown:
            logger.warning(
                f"{len(unknown)} of the labels for {name} do not occur in training and count as errors: "
                f"{', '.join(map(shortened, unknown[:5]))}{', …' if len(unknown) > 5 else ''}"
            )
