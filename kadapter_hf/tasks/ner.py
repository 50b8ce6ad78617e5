"""Named entities as tags of words: CoNLL's format and tables of your own."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import DataCollatorForTokenClassification, EvalPrediction, PreTrainedTokenizerBase

from ..corpora.files import read_text
from ..corpora.schema import Row, Schema, is_list, is_name
from ..features import index_of, most_tokens, special_tokens, tokenize
from ..modeling.heads_kadapter import KAdapterForTokenClassification
from .records import TABLES, Records, find, needed, parsed, records
from .task import Options, Task, register_task


OUTSIDE = "O"


def tagging_problem(row: Row) -> str | None:
    """The problem with a row of the tagging schema, or None."""
    if not is_list(row.get("tokens"), is_name) or not row["tokens"]:
        return "tokens is not a list of words"
    if "tags" not in row:
        return None
    if not is_list(row["tags"], lambda tag: isinstance(tag, str) and bool(re.fullmatch(r"[\w.:/&-]+", tag))):
        return "tags is not a list of names such as O, B-PER, I-PER"
    return None if len(row["tags"]) == len(row["tokens"]) else "tokens and tags differ in length"


TAGGING = Schema(
    "tagging", Features({"tokens": List(Value("string")), "tags": List(Value("string"))}), tagging_problem, "tags"
)


def tagging_features(
    batch: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    *,
    max_length: int | None = None,
) -> dict[str, list]:
    """
    Features for `KAdapterForTokenClassification` from rows with `tokens` and, if known, `tags`. A word's tag is that of its
    first token. A row that is too long becomes several windows.

    Returns:
        `input_ids`, `attention_mask`, `words` (each token's word; -1 if it is not the first of one), `labels` (-100 where
        there is none), and `row`.
    """
    before, after = special_tokens(tokenizer)
    most = most_tokens(tokenizer, max_length) - len(before) - len(after)
    pieces = iter(tokenize([f" {word}" for words in batch["tokens"] for word in words], tokenizer))
    encoded: dict[str, list] = {"input_ids": [], "attention_mask": [], "words": [], "row": []}
    for row, words in enumerate(batch["tokens"]):
        windows: list[tuple[list[int], list[int]]] = [([], [])]
        for number, ids in enumerate(next(pieces)[:most] for _ in words):
            if len(windows[-1][0]) + len(ids) > most:
                windows.append(([], []))
            windows[-1][0].extend(ids)
            windows[-1][1].extend([number, *[-1] * (len(ids) - 1)] if ids else [])
        for ids, numbers in windows:
            encoded["input_ids"].append([*before, *ids, *after])
            encoded["attention_mask"].append([1] * len(encoded["input_ids"][-1]))
            encoded["words"].append([*[-1] * len(before), *numbers, *[-1] * len(after)])
            encoded["row"].append(row)
    if "tags" in batch:
        encoded["labels"] = [
            [index_of(labels, batch["tags"][row][word], "tag") if word >= 0 else -100 for word in words]
            for row, words in zip(encoded["row"], encoded["words"], strict=True)
        ]
    return encoded


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """
    The entities as (type, first word, word after the last). Tags are `O`, `B-type` or `I-type`; an `I-` after another type or
    after `O` begins an entity, as in the scorer of CoNLL-2000 (`conlleval`).
    """
    found, start, kind = set(), 0, ""
    for number, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, name = tag.partition("-")
        name = name or prefix
        begins = tag != OUTSIDE and (prefix == "B" or name != kind)
        if kind and (tag == OUTSIDE or begins):
            found.add((kind, start, number))
            kind = ""
        if begins:
            start, kind = number, name
    return found


@register_task("ner")
class NERTask(Task):
    """
    CoNLL's format (a word a line, its tag in the last column, a blank line between sentences), or rows with `tokens` and
    `tags`.
    """

    schema = TAGGING
    endings = (".conll", ".bio", ".iob2", ".txt", *TABLES)
    features = staticmethod(tagging_features)
    model_class = KAdapterForTokenClassification
    collator = DataCollatorForTokenClassification
    metric = "f1"
    # Not in the paper: common values for RoBERTa.
    paper = {
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-5,
        "warmup_steps": 0.06,
        "num_train_epochs": 5,
        "max_length": 256,
    }

    def records(self, path: Path) -> Records:
        return records(path) if path.suffix.lower() in TABLES else _conll(path)

    def row(self, record: dict[str, Any]) -> Row:
        tags = parsed(find(record, ("tags", "ner_tags", "labels")))
        return {"tokens": parsed(needed(record, ("tokens", "words"))), "tags": tags}

    def metrics_on(self, rows: Dataset, features: Dataset, labels: Sequence[str], options: Options):
        def compute(prediction: EvalPrediction) -> dict[str, float]:
            logits = prediction.predictions
            logits = logits[0] if isinstance(logits, tuple) else logits
            found = self.predictions(logits, rows, features, labels, options)
            pairs = [(spans(found[number]["prediction"]), spans(row["tags"])) for number, row in enumerate(rows)]
            correct = sum(len(entities & right) for entities, right in pairs)
            predicted = sum(len(entities) for entities, _ in pairs)
            true = sum(len(right) for _, right in pairs)
            return {
                "precision": correct / predicted if predicted else 0.0,
                "recall": correct / true if true else 0.0,
                "f1": 2 * correct / (predicted + true) if predicted + true else 0.0,
            }

        return compute

    def cases(self, value: Sequence[str]) -> set[tuple]:
        return spans(value)

    def predictions(self, logits, rows, features, labels, options):
        """For each row the tag of each word, and the entities."""
        tags = [[OUTSIDE] * len(tokens) for tokens in rows["tokens"][:]]
        for row, words, window in zip(features["row"][:], features["words"][:], np.asarray(logits), strict=True):
            for word, scores in zip(words, window, strict=False):
                if word >= 0:
                    tags[row][word] = labels[int(scores.argmax())]
        return {
            number: {
                "prediction": predicted,
                "entities": [
                    {"text": " ".join(tokens[start:end]), "label": kind, "start": start, "end": end}
                    for kind, start, end in sorted(spans(predicted), key=lambda span: span[1:])
                ],
            }
            for number, (predicted, tokens) in enumerate(zip(tags, rows["tokens"][:], strict=True))
        }


def _conll(path: Path) -> Records:
    words: list[list[str]] = []
    for number, line in enumerate([*read_text(path).splitlines(), ""], start=1):
        if line.strip() and not line.startswith("-DOCSTART-"):
            words.append(line.split())
        elif words:
            first = number - len(words)
            columns = {len(columns) for columns in words}
            if len(columns) != 1:
                yield f"line {first}", "the words of the sentence have different numbers of columns"
            else:
                tokens = [columns[0] for columns in words]
                yield (
                    f"line {first}",
                    {"tokens": tokens} | ({"tags": [columns[-1] for columns in words]} if len(words[0]) > 1 else {}),
                )
            words = []
