"""The right one of several answers to a question about a text, from tables of your own."""

import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import EvalPrediction

from ..collators import DataCollatorForChoices
from ..corpora.schema import Row, Schema, is_list, text_problem
from ..features import multiple_choice_features
from ..metrics import classes
from ..modeling.heads_kadapter import KAdapterForMultipleChoice
from .records import RowProblem, find, needed, parsed
from .task import Options, Task, register_task, softmax


def multiple_choice_problem(row: Row) -> str | None:
    """The problem with a row of the multiple-choice schema, or None."""
    choices = row.get("choices") or ()
    if not is_list(choices, lambda choice: isinstance(choice, str)) or len(choices) < 2:
        return "choices is not a list of at least two texts"
    if "label" in row and not (type(row["label"]) is int and 0 <= row["label"] < len(choices)):
        return f"label is not the number of a choice, 0 to {len(choices) - 1}, its letter or its text"
    return text_problem(row, "context") or text_problem(row, "question")


MULTIPLE_CHOICE = Schema(
    "multiple-choice",
    Features(
        {
            "id": Value("string"),
            "context": Value("string"),
            "question": Value("string"),
            "choices": List(Value("string")),
            "label": Value("int32"),
        }
    ),
    multiple_choice_problem,
    "label",
)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of questions whose highest score is that of the right choice."""
    found, right = classes(prediction)
    return {"accuracy": float((found == right).mean())}


@register_task("multiple-choice")
class MultipleChoiceTask(Task):
    """
    Rows with `context`, `question`, `choices` (a list, or columns `choice0`, `choice1`, …) and `label`: the number of the right
    choice, from 0, its letter, or its text.
    """

    schema = MULTIPLE_CHOICE
    has_labels = False
    features = staticmethod(multiple_choice_features)
    model_class = KAdapterForMultipleChoice
    collator = DataCollatorForChoices
    group = "context"
    # For data of your own: as for CosmosQA.
    paper: ClassVar[Mapping[str, Any]] = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-5,
        "warmup_steps": 0,
        "num_train_epochs": 3,
        "max_length": 256,
    }

    def row(self, record: dict[str, Any]) -> Row:
        choices = parsed(find(record, ("choices", "answers", "options")))
        if choices is None:
            choices = _columns(record)
        return {
            "id": _text(find(record, ("id",))),
            "context": needed(record, ("context", "passage", "text", "article")),
            "question": needed(record, ("question",)),
            "choices": choices,
            "label": _number(find(record, ("label", "answer", "answer_index")), choices),
        }

    def used_rows(self, rows: Dataset, options: Options, training: bool) -> Dataset:
        numbers = sorted({len(choices) for choices in rows["choices"][:]})
        if len(numbers) > 1:
            raise ValueError(f"all rows must have the same number of choices, but there are rows with {numbers}.")
        return rows

    def metrics(self, labels: Sequence[str]):
        return accuracy

    def prediction(self, logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
        probabilities = softmax(logits)
        return {"prediction": int(probabilities.argmax()), "scores": probabilities.tolist()}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


# Prefixes of the columns with one choice each, before a number or a letter; a name may also be a letter alone.
PREFIXES = ("choice", "answer", "ending", "option", "")


def _columns(record: Mapping[str, Any]) -> list[str]:
    """The choices in columns such as `choice0`, `choice1`, … or `option_a`, `option_b`, …"""
    for prefix in PREFIXES:
        for first, names in (("0", [str(n) for n in range(26)]), ("a", list(string.ascii_lowercase))):
            if first == "0" and not prefix:
                continue
            found = [find(record, (f"{prefix}{name}",)) for name in names]
            while found and found[-1] is None:
                found.pop()
            if first == "0" and found and found[0] is None:  # numbered from 1
                found.pop(0)
            if len(found) < 2:
                continue
            if None in found:
                raise RowProblem(f"choice {found.index(None) + 1} is empty")
            return found
    raise RowProblem("no choices: a list, or columns choice0, choice1, …")


def _number(value: Any, choices: Any) -> Any:
    """The number of a choice that is given as such, in a text, as a letter, or as the text of the choice."""
    if isinstance(value, str):
        value = value.strip()
        if value.isdecimal():
            return int(value)
        if len(value) == 1 and value.isascii() and value.isalpha():
            return ord(value.upper()) - ord("A")
        if isinstance(choices, list) and choices.count(value) == 1:
            return choices.index(value)
    return None if value == -1 else value  # data sets on the Hub have -1 where labels are not public
