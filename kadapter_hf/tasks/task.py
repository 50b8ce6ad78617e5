"""The base class of downstream tasks, their registry, and reading of their files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase
from transformers.utils import logging

from kadapter_cli._names import did_you_mean

from ..corpora.schema import Record, Report, Row, Schema, as_labels, build, label_set
from ..features import encode
from ..messages import shortened
from ..modeling.modeling_kadapter import KAdapterPreTrainedModel
from ..rows import find_splits
from .records import TABLES, Records, RowProblem, dataset_records, records


logger = logging.get_logger(__name__)

TASKS: dict[str, "Task"] = {}
T = TypeVar("T", bound="type[Task]")


def register_task(name: str) -> Callable[[T], T]:
    """Class decorator that makes a task known to `kadapter finetune` and the others by this name."""

    def register(task: T) -> T:
        TASKS[name] = task(name)
        return task

    return register


def find_task(name: str) -> "Task":
    """
    The task of this name.

    Raises:
        ValueError: there is none; the message lists all.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task '{name}'; there are {', '.join(TASKS)}.{did_you_mean(name, TASKS)}")
    return TASKS[name]


@dataclass
class Options:
    """Flags of a task besides those of Trainer and of `FinetuningArguments`; saved in the model's configuration."""


class Task:
    """
    A downstream task: how its files are read, its features, head and metrics, and the settings of the paper.

    Subclasses set the attributes and override `row`, or `records` if they have a format of their own. Everything also works
    with a stock Trainer:

        task = TASKS["open-entity"]
        rows, report = task.read("train.json")
        data = task.encode(rows, tokenizer, labels)
        Trainer(model, train_dataset=data, data_collator=task.collator(tokenizer), compute_metrics=task.metrics(labels))

    Attributes:
        schema: the columns of a row.
        endings: those of its files.
        features: `features(batch, tokenizer, labels=…, max_length=…)`, like those in `kadapter_hf.features`, which also takes
            the task's options; called without `labels` if there are none. A static method.
        model_class: the class with the head.
        collator: the class of the collator, which takes the tokenizer.
        options: the class of its flags.
        feature_options: the names of those that `features` takes; by default all.
        has_labels: whether the head has an output for each of a set of labels.
        labels: all labels in a fixed order, or None if they are those in the data.
        fewest_labels: how many of them the rows to train on must have at least.
        metric: the metric by which the best checkpoint is chosen.
        paper: flags of TrainingArguments, and `max_length`. A dict instead of a value has one for each combination of
            adapters: `F` (factual), `L` (linguistic), `F+L`.
        published: the paper's `metric` on the test set, in percent, by combination of adapters; the empty string is the
            backbone alone.
        reproduced: what others got with public forks of the original's code, single runs each.
        group: a column whose values must not be divided between training and held-out rows.
    """

    schema: ClassVar[Schema]
    endings: ClassVar[tuple[str, ...]] = TABLES
    features: ClassVar[Callable[..., dict[str, list]]]
    model_class: ClassVar[type[KAdapterPreTrainedModel]]
    collator: ClassVar[type[Any]] = DataCollatorWithPadding
    options: ClassVar[type[Options]] = Options
    feature_options: ClassVar[Sequence[str] | None] = None
    has_labels: ClassVar[bool] = True
    labels: ClassVar[Sequence[str] | None] = None
    fewest_labels: ClassVar[int] = 2
    metric: ClassVar[str] = "accuracy"
    paper: ClassVar[Mapping[str, Any]] = {}
    published: ClassVar[Mapping[str, float]] = {}
    reproduced: ClassVar[Mapping[str, str]] = {}
    group: ClassVar[str | None] = None

    def __init__(self, name: str):
        self.name = name

    # ---- Reading ----------------------------------------------------------------------------------------------------

    def records(self, path: Path) -> Records:
        """Yields the name and the content of each record of a file, or what is wrong with it; by default rows of a table."""
        return records(path)

    def row(self, record: dict[str, Any]) -> Row:
        """
        The row of a record; without the column of the labels if the record has none.

        Raises:
            RowProblem: the record lacks something; the message says what.
        """
        raise NotImplementedError

    def read(
        self, source: str | Path | Dataset, *, labelled: bool = True, skip_bad_rows: bool = False
    ) -> tuple[Dataset, Report]:
        """
        Reads a file, or the rows of a data set.

        Args:
            labelled: whether rows must have labels; otherwise the column is left out.
            skip_bad_rows: skip and count rows that can't be used, instead of raising an error.

        Raises:
            ValueError: a row can't be used; the message names the file, the row and the field.
        """
        return self._built(source, self._records_of(source), labelled, skip_bad_rows)

    def _records_of(self, source: str | Path | Dataset) -> Records:
        return dataset_records(source) if isinstance(source, Dataset) else self.records(Path(source))

    def _built(
        self, source: str | Path | Dataset, found: Records, labelled: bool, skip_bad_rows: bool
    ) -> tuple[Dataset, Report]:
        schema = self.schema if labelled else self.schema.without_labels()
        checked = (self._checked(*record, labelled) for record in found)
        return build(source_name(source), schema, checked, not skip_bad_rows)

    def _is_labelled(self, record: dict[str, Any] | str) -> bool:
        """Whether a record has labels. One that can't be used counts as labelled: `_checked` reports it."""
        try:
            return isinstance(record, str) or self.row(record).get(self.schema.labels) is not None
        except RowProblem:
            return True

    def _checked(self, name: str, record: dict[str, Any] | str, labelled: bool) -> Record:
        if isinstance(record, str):
            return name, record
        try:
            row = dict(self.row(record))
        except RowProblem as problem:
            return name, str(problem)
        if not labelled:
            row.pop(self.schema.labels, None)
        elif row.get(self.schema.labels) is None:
            return name, f"no {self.schema.labels}; the columns are {shortened(', '.join(map(str, record)), 200)}"
        elif self.labels is not None:
            unknown = next((label for label in as_labels(row[self.schema.labels]) if label not in self.labels), None)
            if unknown is not None:
                return name, f"the label '{shortened(unknown)}' is not one of the task's {len(self.labels)}"
        return name, row

    def read_splits(self, data: str, *, skip_bad_rows: bool = False) -> DatasetDict:
        """
        Reads a file, a folder whose files name their splits (train, dev or validation, test), a folder of `save_to_disk`, or
        a data set on the Hub. A test split whose labels are not public is left out, with a warning.

        Raises:
            ValueError: nothing can be read there, or a row can't be used.
        """
        sources: dict[str, list[Any]] = {
            split: [parts] if isinstance(parts, Dataset) else list(parts)
            for split, parts in find_splits(data, self.endings).items()
        }
        splits = DatasetDict()
        for split, parts in sources.items():
            records = [self._records_of(part) for part in parts]
            if split == "test":
                first = list(islice(records[0], 1))
                if first and not self._is_labelled(first[0][1]):
                    logger.warning(
                        f"The test rows of '{data}' have no labels and are left out; `kadapter predict` takes them."
                    )
                    continue
                records[0] = chain(first, records[0])
            read = [self._built(part, found, True, skip_bad_rows) for part, found in zip(parts, records, strict=True)]
            for part, (_, report) in zip(parts, read, strict=True):
                warn_of_dropped(part, report)
            splits[split] = concatenate_datasets([rows for rows, _ in read])
        return splits

    # ---- Labels and features ----------------------------------------------------------------------------------------

    def labels_in(self, splits: Mapping[str, Dataset]) -> list[str]:
        """The labels, in the order of the model's outputs: the task's, or those in the data, sorted."""
        if not self.has_labels:
            return []
        if self.labels is not None:
            return list(self.labels)
        return sorted(set().union(*(label_set(rows, self.schema) for rows in splits.values())))

    def encode(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int | None = None,
        options: Options | None = None,
    ) -> Dataset:
        """The features of all rows, with a column `row`: the number of the row that they belong to."""
        given = asdict(options or self.options())
        taken = self.feature_options
        kwargs = {name: value for name, value in given.items() if taken is None or name in taken}
        if labels:
            kwargs["labels"] = labels
        return encode(rows, self.features, tokenizer, max_length=max_length, keep_numbers=True, **kwargs)

    def used_rows(self, rows: Dataset, options: Options, training: bool) -> Dataset:
        """The rows to train or to evaluate on; by default all."""
        return rows

    # ---- Results ----------------------------------------------------------------------------------------------------

    def metrics(self, labels: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
        """Trainer's `compute_metrics`, if the metrics need no more than logits and labels."""
        raise NotImplementedError

    def metrics_on(
        self, rows: Dataset, features: Dataset, labels: Sequence[str], options: Options
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        """Trainer's `compute_metrics` for these rows. Rows without features have no prediction, and count as missed."""
        compute = self.metrics(labels)
        missed = sorted(set(range(len(rows))).difference(features["row"][:]))
        if not missed:
            return compute
        right = np.array([self._target(value, labels) for value in rows.select(missed)[self.schema.labels][:]])

        def with_missed(prediction: EvalPrediction) -> dict[str, float]:
            logits = prediction.predictions
            logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
            nothing = np.full((len(missed), *logits.shape[1:]), np.nan)
            return compute(
                EvalPrediction(np.concatenate([logits, nothing]), np.concatenate([prediction.label_ids, right]))
            )

        return with_missed

    @staticmethod
    def _target(value: Any, labels: Sequence[str]) -> Any:
        """The label of a row as in its features."""
        if isinstance(value, list):
            return [float(label in value) for label in labels]
        return labels.index(value) if isinstance(value, str) else value

    def predictions(
        self,
        logits: Any,
        rows: Dataset,
        features: Dataset,
        labels: Sequence[str],
        options: Options,
    ) -> dict[int, dict[str, Any]]:
        """
        The predictions by the numbers of their rows, as JSON values. Rows that don't fit into the maximum length have none.

        Args:
            logits: what `Trainer.predict` returned for `features`.
        """
        logits = logits[0] if isinstance(logits, tuple) else logits
        return {
            number: self.prediction(np.asarray(of_row), labels)
            for number, of_row in zip(features["row"][:], logits, strict=True)
        }

    def prediction(self, logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
        """The prediction from one row's logits: by default the most probable label and its probability."""
        probabilities = softmax(logits)
        best = int(probabilities.argmax())
        return {"prediction": labels[best], "score": float(probabilities[best])}

    def cases(self, value: Any) -> set[tuple[str, ...]] | None:
        """
        The cases in a label or a prediction, each with its class first, to be counted by class; None for tasks without
        classes.
        """
        if not self.has_labels:
            return None
        return {(value,)} if isinstance(value, str) else {(label,) for label in value}

    def submission(self, rows: Dataset, found: Mapping[int, dict[str, Any]]) -> tuple[str, str] | None:
        """The name and the content of the file that the task's leaderboard or scorer takes, if it has one."""
        return None

    def settings(self, adapters: str) -> dict[str, Any]:
        """The paper's settings for a combination of adapters; for those that it does not have, the ones for `F`."""
        return {
            name: value.get(adapters, value["F"]) if isinstance(value, Mapping) else value
            for name, value in self.paper.items()
        }


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last dimension."""
    powers = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits, axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def source_name(source: str | Path | Dataset) -> str:
    """The name of a file or a data set in messages."""
    if not isinstance(source, Dataset):
        return str(source)
    return f"split '{source.split}'" if source.split else "the data set"


def warn_of_dropped(source: str | Path | Dataset, report: Report) -> None:
    if report.dropped:
        logger.warning(f"{source_name(source)}: {sum(report.dropped.values())} rows are skipped: {report.reasons()}")
