"""The definition of a training objective for knowledge adapters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..corpora.schema import Schema, label_set
from ..modeling.modeling_kadapter import KAdapterPreTrainedModel


# See docs/knowledge.md. warmup_steps is a share of all steps.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 32,
    "warmup_steps": 0.1,
    "train_sampling_strategy": "group_by_length",  # little padding
}
# The paper's for roberta-large (section 3.3), for backbones of at least this width.
LARGE_WIDTH = 1024
LARGE_DEFAULTS = {"learning_rate": 2e-5, "per_device_train_batch_size": 128, "num_train_epochs": 5}


@dataclass(frozen=True)
class Objective:
    """
    A training objective for knowledge adapters.

    Args:
        features: `features(batch, tokenizer, labels=…, max_length=…)`, like those in `kadapter_hf.features`; called
            without `labels` if there are none.
        model_class: the class of the head, which is trained with the adapter and discarded afterwards.
        collator: creates the collator from the tokenizer.
        schema: the columns of a row, including its labels, as in `kadapter_hf.corpora`; None for an objective without
            labels, which accepts any columns.
        metrics: creates Trainer's `compute_metrics` from the list of labels; None for the loss only. Called before the
            training, so this is the place to look for packages that the metrics need.
        preprocess_logits: Trainer's `preprocess_logits_for_metrics`.
        defaults: the default values of flags of TrainingArguments; transformers' are for fine-tuning a whole model.
        large_defaults: those that differ for a large backbone, of width `LARGE_WIDTH` or more.
    """

    features: Callable[..., dict[str, list]]
    model_class: type[KAdapterPreTrainedModel]
    collator: Callable[[PreTrainedTokenizerBase], Callable[[list[dict]], Any]]
    schema: Schema | None = None
    metrics: Callable[[list[str]], Callable] | None = None
    preprocess_logits: Callable | None = None
    defaults: Mapping[str, Any] = field(default_factory=lambda: DEFAULTS)
    large_defaults: Mapping[str, Any] = field(default_factory=dict)

    def defaults_for(self, width: int) -> dict[str, Any]:
        """The default values of flags for a backbone of this width."""
        return {**self.defaults, **(self.large_defaults if width >= LARGE_WIDTH else {})}

    def labels_of(self, rows: Dataset) -> list[str]:
        """The labels in these rows, sorted."""
        return sorted(label_set(rows, self.schema)) if self.schema else []
