"""
Metrics for Trainer: `compute_metrics` functions, or factories for them where the names of the labels matter.

    Trainer(…, compute_metrics=typing_metrics)
    Trainer(…, compute_metrics=tacred_metrics(labels))
    Trainer(…, compute_metrics=dependency_metrics(labels), preprocess_logits_for_metrics=decode_for_metrics)

All values are between 0 and 1. Division by zero yields 0. A row whose logits are NaN has no prediction: it counts as missed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from .messages import needs
from .modeling.parsing_kadapter import decode_parse


Metrics = dict[str, float]

# Instead of the class of a row that has no prediction.
NO_CLASS = -1


# ---- Relations ------------------------------------------------------------------------------------------------------


def relation_metrics(prediction: EvalPrediction) -> Metrics:
    """
    `micro_f1` and `macro_f1` over all labels, and `accuracy`, which equals the micro-F1 if each row has a prediction.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    sklearn_metrics = require_scikit_learn()
    found, right = classes(prediction)
    labels = np.union1d(right, found[found != NO_CLASS])
    micro, macro = (
        float(sklearn_metrics.f1_score(right, found, labels=labels, average=average, zero_division=0))
        for average in ("micro", "macro")
    )
    return {
        "micro_f1": micro,
        "macro_f1": macro,
        "accuracy": float(sklearn_metrics.accuracy_score(right, found)),
    }


def require_scikit_learn() -> ModuleType:
    """
    Returns `sklearn.metrics`. Call it before a training whose metrics need it.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        import sklearn.metrics
    except ImportError as error:
        raise ImportError(needs("relation_metrics", "scikit-learn", "knowledge")) from error
    return sklearn.metrics


def tacred_metrics(labels: Sequence[str], no_relation: str = "no_relation") -> Callable[[EvalPrediction], Metrics]:
    """
    Returns TACRED's metrics: `micro_precision`, `micro_recall` and `micro_f1`. `no_relation` does not count as an answer:
    precision is over rows with another predicted label, recall over rows with another true label.

    Source: Zhang et al., EMNLP 2017, and its scorer; `micro_f1_tacred` in the original's `examples/utils_glue.py`.

    Raises:
        ValueError: `no_relation` is not among the labels.
    """
    nothing = list(labels).index(no_relation)

    def compute(prediction: EvalPrediction) -> Metrics:
        found, right = classes(prediction)
        correct = ((found == right) & (right != nothing)).sum()
        precision = _share(correct, ((found != nothing) & (found != NO_CLASS)).sum())
        recall = _share(correct, (right != nothing).sum())
        return {"micro_precision": precision, "micro_recall": recall, "micro_f1": _f1(precision, recall)}

    return compute


def semeval_metrics(labels: Sequence[str]) -> Callable[[EvalPrediction], Metrics]:
    """
    Returns the metrics of SemEval-2010 Task 8, for labels such as `Cause-Effect(e1,e2)` and `Other`.

    - `macro_f1`: the official metric, the mean F1 over all types except `Other`. A row is correct only if type and direction
      are correct; a wrong direction lowers both precision and recall.
    - `macro_f1_original`: as computed by `macro_f1_semeval` in the original's `examples/utils_glue.py`. `Other` is treated like
      any other type, and a wrong direction lowers precision but not recall.

    Source of the former: Hendrickx et al., SemEval 2010, and the task's scorer.
    """
    names = [label.partition("(")[0] for label in labels]
    types = sorted(set(names))
    type_of = np.array([types.index(name) for name in names])

    def compute(prediction: EvalPrediction) -> Metrics:
        found, right = classes(prediction)
        found_type, right_type = np.where(found == NO_CLASS, NO_CLASS, type_of[found]), type_of[right]
        official, original = [], []
        for index, name in enumerate(types):
            is_found, is_right = found_type == index, right_type == index
            correct = (is_found & (found == right)).sum()
            precision = _share(correct, is_found.sum())
            if name != "Other":
                official.append(_f1(precision, _share(correct, is_right.sum())))
            missed = (is_right & ~is_found).sum()
            original.append(_f1(precision, _share(correct, correct + missed)))
        return {"macro_f1": float(np.mean(official)), "macro_f1_original": float(np.mean(original))}

    return compute


# ---- Entity typing --------------------------------------------------------------------------------------------------


def typing_metrics(prediction: EvalPrediction) -> Metrics:
    """
    Metrics of entity typing, where an entity may have several types. Types with a logit above 0 are predicted.

    - `micro_precision`, `micro_recall`, `micro_f1`: over all types of all entities.
    - `macro_precision`, `macro_recall`: means over the entities; an entity without predicted (true) types counts as 0.
      `macro_f1` is the F1 of these two means.
    - `accuracy`: the share of entities whose predicted types are exactly the true ones.

    Source: the loose measures of Ling and Weld, AAAI 2012; `entity_typing_accuracy` in the original's
    `examples/utils_glue.py`.
    """
    found, right = _arrays(prediction)
    found, right = found > 0, right > 0
    correct = (found & right).sum(1)
    micro = _share(correct.sum(), found.sum()), _share(correct.sum(), right.sum())
    macro = [float(np.mean(correct / np.maximum(of.sum(1), 1))) for of in (found, right)]
    return {
        "micro_precision": micro[0],
        "micro_recall": micro[1],
        "micro_f1": _f1(*micro),
        "macro_precision": macro[0],
        "macro_recall": macro[1],
        "macro_f1": _f1(*macro),
        "accuracy": float((found == right).all(1).mean()),
    }


# ---- Dependency parsing ---------------------------------------------------------------------------------------------


def decode_for_metrics(
    logits: tuple[torch.Tensor, ...], labels: tuple[torch.Tensor, ...] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Decodes a parser's logits to trees; pass it to Trainer as `preprocess_logits_for_metrics`. Trainer then stores only two
    numbers per word, and can concatenate batches of different lengths.

    Args:
        logits: `arc_logits` and `relation_logits` of `DependencyParserOutput`; further items are ignored.
        labels: ignored.

    Returns:
        Heads and relations, both `(batch, words)`, padded with -100.
    """
    arc_logits, relation_logits = logits[:2]
    heads = torch.full(arc_logits.shape[:2], -100, device=arc_logits.device)
    relations = heads.clone()
    for row, words in enumerate(words_in(arc_logits)):
        parse = decode_parse(arc_logits[row, :words, : words + 1], relation_logits[row, :words])
        heads[row, :words], relations[row, :words] = (torch.tensor(part, device=heads.device) for part in parse)
    return heads, relations


def words_in(arc_logits: torch.Tensor) -> list[int]:
    """The number of words in each row of a parser's `arc_logits`: words that are not padding can have the root as head."""
    # Scores above the lowest number of float16, which has the smallest range.
    is_word = arc_logits[:, : arc_logits.shape[2] - 1, 0] > torch.finfo(torch.float16).min / 2
    return is_word.sum(1).tolist()


def attachment_scores(prediction: EvalPrediction, punctuation: int | None = None) -> Metrics:
    """
    The share of words with the correct head (`uas`), and with the correct head and relation (`las`). If `punctuation` is
    given, also without punctuation (`uas_without_punctuation`, …).

    Args:
        prediction: heads and relations as returned by `decode_for_metrics`, and both kinds of labels. Words with a label
            of -100 are ignored.
        punctuation: the index of the relation of punctuation.
    """
    heads, relations = (np.asarray(part) for part in prediction.predictions)
    head_labels, relation_labels = (np.asarray(part) for part in prediction.label_ids)
    right_head = heads == head_labels
    right = right_head & (relations == relation_labels)
    counted = {"": (head_labels != -100) & (relation_labels != -100)}
    if punctuation is not None:
        counted["_without_punctuation"] = counted[""] & (relation_labels != punctuation)
    scores = {}
    for name, words in counted.items():
        scores[f"uas{name}"] = _share((right_head & words).sum(), words.sum())
        scores[f"las{name}"] = _share((right & words).sum(), words.sum())
    return scores


def dependency_metrics(labels: Sequence[str], punctuation: str = "punct") -> Callable[[EvalPrediction], Metrics]:
    """Returns `attachment_scores` with the index of `punctuation`, if it is one of the labels."""
    labels = list(labels)
    return partial(attachment_scores, punctuation=labels.index(punctuation) if punctuation in labels else None)


# ---- Shared ---------------------------------------------------------------------------------------------------------


def _arrays(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels. If there are several outputs, e.g. hidden states, the first are the logits."""
    found: Any = prediction.predictions
    return np.asarray(found[0] if isinstance(found, tuple) else found), np.asarray(prediction.label_ids)


def classes(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """The predicted and the correct class of each row; predictions may be classes, or logits: `NO_CLASS` if they are NaN."""
    found, right = _arrays(prediction)
    if found.ndim > right.ndim:
        found = np.where(np.isnan(found).any(-1), NO_CLASS, found.argmax(-1))
    return found, right


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0


def _f1(precision: float, recall: float) -> float:
    return _share(2 * precision * recall, precision + recall)
