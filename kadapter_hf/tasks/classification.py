"""Classes of texts, or of pairs of texts, from tables of your own."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Features, Value
from transformers import PreTrainedTokenizerBase

from ..corpora.schema import Row, Schema, is_name, text_problem
from ..features import index_of, most_tokens
from ..metrics import relation_metrics, require_scikit_learn
from ..modeling.heads_kadapter import KAdapterForSequenceClassification
from .records import find, label_in, needed
from .relation import TEXT
from .task import Task, register_task


def classification_problem(row: Row) -> str | None:
    """The problem with a row of the classification schema, or None."""
    if row.get("text_pair") is not None and not isinstance(row["text_pair"], str):
        return "text_pair is not a string"
    if "label" in row and not is_name(row["label"]):
        return "label is not a name"
    return text_problem(row)


CLASSIFICATION = Schema(
    "classification",
    Features({"text": Value("string"), "text_pair": Value("string"), "label": Value("string")}),
    classification_problem,
    "label",
)


def classification_features(
    batch: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    *,
    max_length: int | None = None,
) -> dict[str, list]:
    """
    Features for `KAdapterForSequenceClassification` from rows with `text`, perhaps `text_pair`, and `label` if it is known.

    Returns:
        What the tokenizer returns, `labels`, `truncated` (whether a text is too long and was cut at its end), and `row`.
    """
    most = most_tokens(tokenizer, max_length)
    pairs = [pair or "" for pair in batch.get("text_pair") or [""] * len(batch["text"])]
    second = pairs if any(pairs) else None
    whole = tokenizer(list(batch["text"]), second, add_special_tokens=True, verbose=False)["input_ids"]
    encoded = dict(tokenizer(list(batch["text"]), second, truncation=True, max_length=most))
    encoded["truncated"] = [len(ids) > most for ids in whole]
    encoded["row"] = list(range(len(batch["text"])))
    if "label" in batch:
        encoded["labels"] = [index_of(labels, label, "label") for label in batch["label"]]
    return encoded


@register_task("classification")
class ClassificationTask(Task):
    """Rows with `text`, `label` and perhaps `text_pair`."""

    schema = CLASSIFICATION
    features = staticmethod(classification_features)
    model_class = KAdapterForSequenceClassification
    # Not in the paper: common values for RoBERTa.
    paper = {
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-5,
        "warmup_steps": 0.06,
        "num_train_epochs": 5,
        "max_length": 256,
    }

    def row(self, record: dict[str, Any]) -> Row:
        return {
            "text": needed(record, (*TEXT, "sentence1")),
            "text_pair": find(record, ("text_pair", "sentence2", "text2")),
            "label": label_in(record, ("label", "class", "category")),
        }

    def metrics(self, labels: Sequence[str]):
        require_scikit_learn()
        return relation_metrics
