"""Answers that are spans of a text: SQuAD's format and tables of your own."""

import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from kadapter_cli._source import flag

from ..corpora.schema import Row, Schema, is_list, text_problem
from ..features import most_tokens
from ..messages import shortened
from ..modeling.heads_kadapter import KAdapterForQuestionAnswering
from .records import Records, RowProblem, find, needed, parsed, records
from .task import Options, Task, register_task


logger = logging.get_logger(__name__)

# How many of the best starts and ends of a window are combined to spans.
BEST = 20
NOWHERE = -1


def extractive_qa_problem(row: Row) -> str | None:
    """The problem with a row of the schema of extractive question answering, or None."""
    problem = text_problem(row, "question") or text_problem(row, "context")
    if problem or "answers" not in row:
        return problem
    texts, starts = row["answers"].get("text"), row["answers"].get("answer_start")
    if not is_list(texts, lambda text: isinstance(text, str)) or not is_list(starts, lambda start: type(start) is int):
        return "answers does not have lists text and answer_start"
    if len(texts) != len(starts):
        return "answers has another number of texts than of starts"
    return None


# Rows with the same id are passages for the same question. `answer_start` is -1 for an answer that is not in the passage.
EXTRACTIVE_QA = Schema(
    "extractive-qa",
    Features(
        {
            "id": Value("string"),
            "question": Value("string"),
            "context": Value("string"),
            "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
        }
    ),
    extractive_qa_problem,
    "answers",
)


@dataclass
class ExtractiveQAOptions(Options):
    stride: int = flag(64, "How many tokens two windows of a long text share; at most a quarter of max_length.")
    max_answer_length: int = flag(30, "Maximum number of tokens of an answer.")
    aggregation: Literal["best", "sum"] = flag(
        "best",
        "How a question is answered from several passages or windows: best (the span with the highest score) or "
        "sum (the string whose occurrences have the highest sum of probabilities).",
    )
    max_passages: int | None = flag(None, "Use only the first passages of each question. Default: all.")
    null_score_diff_threshold: float | None = flag(
        None,
        "For questions that may have no answer, as in SQuAD 2: the answer is empty if the score of the first token "
        "exceeds that of the best span by more than this; 0 is a good start. Default: every question has an answer.",
    )

    def __post_init__(self):
        for name, least in (("stride", 0), ("max_answer_length", 1), ("max_passages", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, not {value}")


def extractive_qa_features(
    batch: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    stride: int = 64,
) -> dict[str, list]:
    """
    Features for `KAdapterForQuestionAnswering` from rows with `question`, `context` and, if known, `answers` as in SQuAD.

    A context that is too long becomes several windows. A question that takes more than half of the tokens is truncated.

    Returns:
        `input_ids`, `attention_mask`; `start_positions` and `end_positions`, of the first answer that the window contains, or
        else the position of the first token; `offsets`, each token's span in the context, -1 for other tokens; `truncated`
        (the question), and `row`.
    """
    most = most_tokens(tokenizer, max_length)
    questions = tokenizer(
        list(batch["question"]), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    texts, truncated = [], []
    for question, offsets in zip(batch["question"], questions["offset_mapping"], strict=True):
        truncated.append(len(offsets) > most // 2)
        texts.append(question[: offsets[most // 2 - 1][1]] if truncated[-1] else question)
    windows = tokenizer(
        texts,
        list(batch["context"]),
        truncation="only_second",
        max_length=most,
        stride=min(stride, most // 4),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows = windows.pop("overflow_to_sample_mapping")
    offsets = [
        [
            span if sequence == 1 else (NOWHERE, NOWHERE)
            for span, sequence in zip(spans, windows.sequence_ids(number), strict=True)
        ]
        for number, spans in enumerate(windows.pop("offset_mapping"))
    ]
    encoded = dict(windows) | {"offsets": offsets, "row": list(rows), "truncated": [truncated[row] for row in rows]}
    if "answers" in batch:
        targets = [_target(batch["answers"][row], spans) for row, spans in zip(rows, offsets, strict=True)]
        encoded["start_positions"] = [start for start, _ in targets]
        encoded["end_positions"] = [end for _, end in targets]
    return encoded


def _target(answers: Mapping[str, Sequence[Any]], offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The positions of the first and last token of the first answer in the window; of the window's first token if none is."""
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if start == NOWHERE:
            continue
        inside = [
            position
            for position, (first, behind) in enumerate(offsets)
            if first < start + len(text) and behind > start
        ]
        # All of the answer has to be in the window.
        if inside and offsets[inside[0]][0] <= start and offsets[inside[-1]][1] >= start + len(text):
            return inside[0], inside[-1]
    return 0, 0


def normalized(answer: str) -> str:
    """An answer without case, punctuation, articles and repeated spaces, as in the official scorer of SQuAD v1.1."""
    kept = "".join(char for char in answer.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(found: str, answers: Iterable[str]) -> float:
    """1.0 if the answer equals one of the right ones after `normalized`, else 0.0."""
    return float(any(normalized(found) == normalized(answer) for answer in answers))


def token_f1(found: str, answers: Iterable[str]) -> float:
    """The highest F1 between the words of the answer and those of a right one, after `normalized`."""
    best = 0.0
    for answer in answers:
        words, right = normalized(found).split(), normalized(answer).split()
        if not words or not right:
            best = max(best, float(words == right))
            continue
        common = sum((Counter(words) & Counter(right)).values())
        best = max(best, 2 * common / (len(words) + len(right)))
    return best


@register_task("extractive-qa")
class ExtractiveQATask(Task):
    """
    SQuAD's JSON, or rows with `question`, `context` and `answers` (as in SQuAD) or `answer` (its text, whose first occurrence
    is taken). Metrics are over the questions that have an answer.

    With `null_score_diff_threshold`, questions without one (`is_impossible`, or an empty list) are trained towards the first
    token of each window, and count as in the official scorer of SQuAD 2.0.
    """

    schema = EXTRACTIVE_QA
    has_labels = False
    features = staticmethod(extractive_qa_features)
    model_class = KAdapterForQuestionAnswering
    options: ClassVar[type[Options]] = ExtractiveQAOptions
    feature_options = ("stride",)
    metric = "f1"
    group = "context"
    # Not in the paper for data of your own.
    paper: ClassVar[Mapping[str, Any]] = {
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-5,
        "warmup_steps": 0,
        "num_train_epochs": 2,
        "max_length": 384,
    }

    def records(self, path: Path) -> Records:
        if path.suffix.lower() == ".json":
            try:
                content = json.loads(path.read_bytes().decode("utf-8-sig"))
            except ValueError:
                content = None
            if isinstance(content, dict) and isinstance(content.get("data"), list):
                yield from _squad(content["data"])
                return
        yield from records(path)

    def row(self, record: dict[str, Any]) -> Row:
        context, question = needed(record, ("context", "passage", "text")), needed(record, ("question",))
        name = find(record, ("id",))
        # Questions about one text may have no names; the same question about two texts are two.
        name = str(name) if name is not None else f"{question}\n{context}"
        return {"id": name, "question": question, "context": context, "answers": _answers(record, context)}

    def used_rows(self, rows: Dataset, options: ExtractiveQAOptions, training: bool) -> Dataset:  # type: ignore[override]
        if options.max_passages is not None:
            seen: Counter[str] = Counter()
            kept = []
            for number, name in enumerate(rows["id"][:]):
                seen[name] += 1
                if seen[name] <= options.max_passages:
                    kept.append(number)
            rows = rows.select(kept)
        if training:
            pairs = list(zip(rows["id"][:], rows["answers"][:], strict=True))
            found = {name for name, answers in pairs if any(start != NOWHERE for start in answers["answer_start"])}
            nothing = {name for name, answers in pairs if not answers["text"]}
            if options.null_score_diff_threshold is not None:
                found |= nothing
            kept = [number for number, name in enumerate(rows["id"][:]) if name in found]
            if len(kept) < len(rows):
                total = len(set(rows["id"][:]))
                message = (
                    f"{total - len(found)} of {total} questions are not trained on, as no passage has their answer."
                )
                if nothing - found:
                    message += " For questions that have none, as in SQuAD 2, add --null_score_diff_threshold 0."
                logger.warning(message)
                rows = rows.select(kept)
        return rows

    def metrics_on(self, rows, features, labels, options: ExtractiveQAOptions):  # type: ignore[override]
        names = rows["id"][:]
        right: dict[str, set[str]] = defaultdict(set)
        for name, answers in zip(names, rows["answers"][:], strict=True):
            right[name].update(answers["text"])
        groups = {"HasAns": [name for name, answers in right.items() if answers]}
        if options.null_score_diff_threshold is not None:
            groups["NoAns"] = [name for name, answers in right.items() if not answers]
            right = {name: set(filter(normalized, answers)) or {""} for name, answers in right.items()}

        def compute(prediction) -> dict[str, float]:
            found = self.predictions(prediction.predictions, rows, features, labels, options)
            texts = {names[number]: answer["prediction"] for number, answer in found.items()}

            def means(questions: Sequence[str]) -> tuple[float, float]:
                scores = [
                    (exact_match(texts[name], right[name]), token_f1(texts[name], right[name])) for name in questions
                ]
                em, f1 = np.mean(scores, axis=0) if scores else (0.0, 0.0)
                return float(em), float(f1)

            em, f1 = means([name for group in groups.values() for name in group])
            metrics = {"exact_match": em, "f1": f1}
            for group, of_group in groups.items():
                if len(groups) > 1 and of_group:
                    metrics[f"{group}_exact"], metrics[f"{group}_f1"] = means(of_group)
            return metrics

        return compute

    def submission(self, rows: Dataset, found: Mapping[int, dict[str, Any]]) -> tuple[str, str]:
        """The answer to each question, as the scorer of SQuAD takes them."""
        names = rows["id"][:]
        answers = {names[number]: answer["prediction"] for number, answer in found.items()}
        return "answers.json", json.dumps(answers, ensure_ascii=False, indent=1) + "\n"

    def predictions(self, logits, rows, features, labels, options: ExtractiveQAOptions):  # type: ignore[override]
        """
        One for each question, at its first row: the answer, the row that it is from, and its probability. No answer competes as
        an empty text, with the lowest score of the first token in any window.
        """
        starts, ends = logits[:2]
        candidates: dict[str, list[tuple[float, str, int | None]]] = {}
        null_scores: dict[str, float] = defaultdict(lambda: float("inf"))
        first_row: dict[str, int] = {}
        names, contexts = rows["id"][:], rows["context"][:]
        for number, name in enumerate(names):
            first_row.setdefault(name, number)
            candidates.setdefault(name, [])
        for window, (row, offsets) in enumerate(zip(features["row"], features["offsets"], strict=True)):
            spans = best_spans(starts[window], ends[window], offsets, options.max_answer_length)
            candidates[names[row]] += [(score, contexts[row][start:end], row) for score, start, end in spans]
            null_scores[names[row]] = min(null_scores[names[row]], float(starts[window][0] + ends[window][0]))
        found = {}
        for name, row in first_row.items():
            if options.null_score_diff_threshold is not None:
                candidates[name].append((null_scores[name] - options.null_score_diff_threshold, "", None))
            answer, probability, source = aggregated(candidates[name], options.aggregation)
            found[row] = {"prediction": answer, "score": probability, "row": source}
        return found


def best_spans(
    start_logits: np.ndarray, end_logits: np.ndarray, offsets: Sequence[Sequence[int]], max_answer_length: int
) -> list[tuple[float, int, int]]:
    """The score (the sum of both logits), start and end in the context of the spans of the best starts and ends."""
    inside = np.array([first for first, _ in offsets]) != NOWHERE
    starts, ends = (
        np.where(inside, np.asarray(logits[: len(offsets)], dtype=np.float64), -np.inf)
        for logits in (start_logits, end_logits)
    )
    found = []
    for first in np.argsort(-starts, kind="stable")[:BEST]:
        for last in np.argsort(-ends, kind="stable")[:BEST]:
            if inside[first] and inside[last] and first <= last < first + max_answer_length:
                start, end = offsets[first][0], offsets[last][1]
                if end > start:
                    found.append((float(starts[first] + ends[last]), start, end))
    return sorted(found, key=lambda span: -span[0])[:BEST]


def aggregated(candidates: Sequence[tuple[float, str, int | None]], aggregation: str) -> tuple[str, float, int | None]:
    """
    The answer of all candidates (score, text and row), its probability among them, and its row; an empty text if there are
    none. With `sum`, candidates of the same `normalized` text count together.
    """
    if not candidates:
        return "", 0.0, None
    highest = max(score for score, _, _ in candidates)
    weights = [float(np.exp(score - highest)) for score, _, _ in candidates]
    total = sum(weights)
    keys = [
        normalized(text) if aggregation == "sum" else str(number) for number, (_, text, _) in enumerate(candidates)
    ]
    sums: dict[str, float] = defaultdict(float)
    for key, weight in zip(keys, weights, strict=True):
        sums[key] += weight
    best = max(range(len(candidates)), key=lambda number: (sums[keys[number]], candidates[number][0]))
    return candidates[best][1], sums[keys[best]] / total, candidates[best][2]


def _squad(articles: Sequence[Any]) -> Records:
    for number, article in enumerate(articles, start=1):
        try:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield str(question.get("id")), {"context": paragraph["context"], **question}
        except (KeyError, TypeError, AttributeError) as error:
            yield f"article {number}", f"not in SQuAD's format: {type(error).__name__} {error}"


def _answers(record: Mapping[str, Any], context: str) -> dict[str, list] | None:
    given = parsed(find(record, ("answers", "answer")))
    if str(find(record, ("is_impossible",))).lower() in ("true", "1"):
        given = []
    if given is None:
        return None
    if isinstance(given, Mapping):
        pairs = list(zip(given.get("text") or [], given.get("answer_start") or [], strict=False))
    elif isinstance(given, list) and all(isinstance(answer, Mapping) for answer in given):
        pairs = [(answer.get("text"), answer.get("answer_start")) for answer in given]
    else:
        pairs = [(answer, None) for answer in (given if isinstance(given, list) else [given])]
    texts, starts = [], []
    for text, start in pairs:
        if not isinstance(text, str):
            raise RowProblem("an answer is not a text")
        place = context.find(text) if start is None else start
        if place == NOWHERE or context[place : place + len(text)] != text:
            raise RowProblem(
                f"the answer '{shortened(text)}' is not in the context{'' if start is None else f' at {start}'}"
            )
        texts.append(text)
        starts.append(place)
    return {"text": texts, "answer_start": starts}
