"""The types of one marked entity, from tables of your own; OpenEntity and FIGER have the same features and head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kadapter_cli._source import flag

from ..corpora.schema import TYPING, Row
from ..features import typing_features
from ..metrics import typing_metrics
from ..modeling.heads_kadapter import KAdapterForEntityTyping
from .records import find, names_in, needed, span
from .relation import TEXT
from .task import Options, Task, register_task


@dataclass
class TypingOptions(Options):
    marker: str = flag(" @", "The token around the entity, with a leading space if the tokenizer should see one.")


@register_task("typing")
class TypingTask(Task):
    """
    Rows with `text`, `entity` (a span, or its text) and `types`: a list, or names separated by commas. An entity may have
    several types, or none.
    """

    schema = TYPING
    features = staticmethod(typing_features)
    model_class = KAdapterForEntityTyping
    options: ClassVar[type[Options]] = TypingOptions
    metric = "micro_f1"
    fewest_labels = 1
    # For data of your own: as for OpenEntity.
    paper: ClassVar[Mapping[str, Any]] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-6,
        "warmup_steps": 0.05,
        "num_train_epochs": 24,
        "max_length": 256,
    }

    def row(self, record: dict[str, Any]) -> Row:
        text = needed(record, TEXT)
        types = find(record, ("types", "type", "labels", "label"))
        return {
            "text": text,
            "entity": span(record, text, ("entity", "mention", "name")),
            "types": None if types is None else names_in(types),
        }

    def metrics(self, labels: Sequence[str]):
        return typing_metrics

    def prediction(self, logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
        """The types with a logit above 0, and the probability of each type."""
        return {
            "prediction": [label for label, logit in zip(labels, logits, strict=True) if logit > 0],
            "scores": dict(zip(labels, (1 / (1 + np.exp(-logits.astype(np.float64)))).tolist(), strict=True)),
        }
