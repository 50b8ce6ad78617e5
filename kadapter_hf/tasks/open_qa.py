"""SearchQA and Quasar-T (paper, section 4.2) in the format of thunlp/OpenQA; the original's code has neither."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..corpora.schema import Row
from .extractive_qa import NOWHERE, ExtractiveQATask
from .records import Records, RowProblem, find, needed
from .task import register_task


@register_task("search-qa")
class SearchQA(ExtractiveQATask):
    """
    `train.txt`, `dev.txt` and `test.txt` with a question and its answers a line, and beside each a `.json` file with the
    passages for the question a line. All of it is tokenised.

    The span to learn is the first occurrence of an answer in a passage; in a passage without the answer it is the first token.
    Questions whose answer is in no passage are not trained on, but count in the evaluation.
    """

    endings = (".txt",)
    group = "id"
    paper: ClassVar[Mapping[str, Any]] = {
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-6,
        "warmup_steps": 0,
        "num_train_epochs": 2,
        "max_length": 128,
    }
    published: ClassVar[Mapping[str, float]] = {"": 65.62, "multitask": 66.67, "F": 67.17, "L": 66.82, "F+L": 67.31}

    def records(self, path: Path) -> Records:
        beside = path.with_suffix(".json")
        if not beside.is_file():
            raise ValueError(f"'{path}' has no passages beside it: '{beside.name}' is missing.")
        questions, passages = _lines(path), _lines(beside)
        if len(questions) != len(passages):
            raise ValueError(
                f"'{path}' has {len(questions)} questions, but '{beside.name}' has {len(passages)} lines."
            )
        for number, (question, documents) in enumerate(zip(questions, passages, strict=True), start=1):
            name = f"question {number}"
            if not isinstance(question, dict) or not isinstance(documents, list):
                yield name, "not in the format of OpenQA: an object with question and answers, and a list of passages"
                continue
            for place, passage in enumerate(documents, start=1):
                document = passage.get("document") if isinstance(passage, dict) else None
                yield (
                    f"{name}, passage {place}",
                    {"id": f"{path.stem}-{number}", "document": document} | question,
                )

    def row(self, record: dict[str, Any]) -> Row:
        context = _joined(needed(record, ("document",)), "document")
        answers = find(record, ("answers",))
        if answers is not None:
            texts = [_joined(answer, "answers") for answer in answers]
            answers = {"text": texts, "answer_start": [_first(context, text) for text in texts]}
            # The answer as it is written in the passage has the same number of characters.
            answers["text"] = [
                context[start : start + len(text)] if start != NOWHERE else text
                for text, start in zip(texts, answers["answer_start"], strict=True)
            ]
        return {
            "id": str(record["id"]),
            "question": _joined(needed(record, ("question",)), "question"),
            "context": context,
            "answers": answers,
        }


@register_task("quasar-t")
class QuasarT(SearchQA):
    """As `SearchQA`."""

    paper = {
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-5,
        "warmup_steps": 0,
        "num_train_epochs": 5,
        "max_length": 256,
    }
    published = {"": 48.84, "multitask": 51.17, "F": 52.86, "L": 52.39, "F+L": 53.00}


def _lines(path: Path) -> list[Any]:
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            lines.append(json.loads(line.decode("utf-8-sig")))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
    return lines


def _joined(tokens: Any, name: str) -> str:
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise RowProblem(f"{name} is not a list of tokens")
    return " ".join(tokens)


def _first(context: str, answer: str) -> int:
    """Where an answer first occurs in a passage as whole tokens, whatever its case."""
    found = re.search(rf"(?<!\S){re.escape(answer)}(?!\S)", context, re.IGNORECASE)
    return found.start() if found and len(found.group()) == len(answer) else NOWHERE
