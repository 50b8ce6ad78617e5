"""What a knowledge adapter can learn from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..corpora import Schema
from ..modeling.modeling_kadapter import KAdapterPreTrainedModel


@dataclass(frozen=True)
class Objective:
    """
    What a knowledge adapter learns from.

    Args:
        schema: the columns of a row and which of them holds its labels, as in `kadapter_hf.corpora`; None takes any
            columns, for an objective without labels.
        features: `features(batch, tokenizer, labels=…, max_length=…)`, as those in `kadapter_hf.features`; without
            `labels` if there are none.
        model_class: the head that is trained with the adapter and thrown away afterwards.
        collator: makes a batch's collator of the tokenizer.
        metrics: makes Trainer's `compute_metrics` of the list of labels; None measures the loss alone.
        preprocess_logits: Trainer's `preprocess_logits_for_metrics`.
    """

    features: Callable[..., dict[str, list]]
    model_class: type[KAdapterPreTrainedModel]
    collator: Callable[[PreTrainedTokenizerBase], Callable[[list[dict]], Any]]
    schema: Schema | None = None
    metrics: Callable[[list[str]], Callable] | None = None
    preprocess_logits: Callable | None = None

    def labels_of(self, rows: Dataset) -> list[str]:
        """The labels that occur, sorted."""
        return sorted(label_set(rows, self.schema)) if self.schema else []


def row_labels(rows: Dataset, schema: Schema) -> Iterator[list[str]]:
    """Yields each row's labels as a list."""
    for value in rows[schema.labels]:
        yield [value] if isinstance(value, str) else value


def label_set(rows: Dataset, schema: Schema) -> set[str]:
    return {label for labels in row_labels(rows, schema) for label in labels}
