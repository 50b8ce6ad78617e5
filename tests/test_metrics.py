"""Metrics compared with the original's values and with examples counted by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from kadapter_hf.metrics import (
    attachment_scores,
    decode_for_metrics,
    dependency_metrics,
    relation_metrics,
    semeval_metrics,
    tacred_metrics,
    typing_metrics,
)


SEMEVAL = ["Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Message-Topic(e1,e2)", "Message-Topic(e2,e1)", "Other"]


@pytest.fixture(scope="module")
def reference():
    path = Path(__file__).parent / "fixtures" / "reference" / "reference_features.json"
    return json.loads(path.read_text())["features"]


def of(found, right) -> EvalPrediction:
    return EvalPrediction(predictions=np.array(found), label_ids=np.array(right))


# ---- The original's values ------------------------------------------------------------------------------------------


def test_typing_is_as_the_original_computes_it(reference):
    wanted = reference["metric_typing"]
    found = typing_metrics(of(wanted["logits"], wanted["labels"]))
    for kind in ("micro", "macro"):
        values = [found[f"{kind}_{name}"] for name in ("precision", "recall", "f1")]
        assert values == pytest.approx(wanted[kind], abs=1e-12)
    assert found["accuracy"] == wanted["exact"] == 0


def test_tacred_is_as_the_original_computes_it(reference):
    wanted = reference["metric_tacred"]
    found = tacred_metrics(reference["tacred_labels"])(of(wanted["predictions"], wanted["labels"]))
    values = [found[f"micro_{name}"] for name in ("precision", "recall", "f1")]
    assert values == pytest.approx(wanted["micro"], abs=1e-12)


def test_semeval_has_the_originals_value_beside_the_official_one(reference):
    wanted = reference["metric_semeval"]
    found = semeval_metrics(reference["semeval_labels"])(of(wanted["predictions"], wanted["labels"]))
    assert found["macro_f1_original"] == pytest.approx(wanted["macro"], abs=1e-12)
    assert found["macro_f1"] != pytest.approx(wanted["macro"], abs=1e-3)


# ---- Counted by hand ------------------------------------------------------------------------------------------------


def test_typing_counts():
    logits = [[1.0, 1.0, -1.0], [-1.0, -2.0, -0.5], [-1.0, 2.0, -1.0]]
    found = typing_metrics(of(logits, [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))
    assert found["micro_precision"] == pytest.approx(2 / 3) and found["micro_recall"] == pytest.approx(2 / 4)
    assert found["macro_precision"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert found["macro_recall"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert found["accuracy"] == pytest.approx(1 / 3)


def test_tacred_leaves_out_no_relation():
    """Of 3 that are given a relation 1 is right, of 2 that have one 1 is found."""
    found = tacred_metrics(["no_relation", "a", "b"])(of([1, 2, 2, 0, 0], [1, 0, 0, 2, 0]))
    assert found == pytest.approx({"micro_precision": 1 / 3, "micro_recall": 1 / 2, "micro_f1": 0.4})


def test_rows_without_a_prediction_are_missed_and_lower_no_precision():
    """Their logits are NaN. Of 3 rows of label 1, the only one with a prediction is right."""
    logits = np.array([[0.0, 1.0, 0.0]] + [[np.nan] * 3] * 2)
    right = np.array([1, 1, 1])
    wanted = {"micro_f1": 2 * 1 / (1 + 3), "macro_f1": 2 * 1 / (1 + 3), "accuracy": 1 / 3}
    assert relation_metrics(of(logits, right)) == pytest.approx(wanted)
    wanted = {"micro_precision": 1.0, "micro_recall": 1 / 3, "micro_f1": 0.5}
    assert tacred_metrics(["no_relation", "a", "b"])(of(logits, right)) == pytest.approx(wanted)
    wanted = {"macro_f1": 0.5, "macro_f1_original": 0.5}
    assert semeval_metrics(["Cause-Effect(e1,e2)"] * 3)(of(logits, right)) == pytest.approx(wanted)
    found = typing_metrics(of(logits, np.eye(3)[right]))
    assert (found["micro_precision"], found["micro_recall"]) == pytest.approx((1.0, 1 / 3))


def test_tacred_needs_the_label_that_stands_for_none():
    with pytest.raises(ValueError, match="no_relation"):
        tacred_metrics(["a", "b"])


def test_semeval_counts_directions_and_leaves_out_other():
    """
    Cause-Effect: 3 given, 2 had, 1 right, 1 in the wrong direction. Message-Topic: 1 given, 2 had, 1 right.
    """
    found = semeval_metrics(SEMEVAL)(of([0, 1, 0, 2, 4, 4], [0, 0, 4, 2, 3, 4]))
    assert found["macro_f1"] == pytest.approx((2 * 1 / (3 + 2) + 2 * 1 / (1 + 2)) / 2)
    # The wrong direction isn't missed; Other: 2 given, 2 had, 1 right.
    assert found["macro_f1_original"] == pytest.approx((2 * 1 / (3 + 1) + 2 * 1 / (1 + 2) + 2 * 1 / (2 + 2)) / 3)


def test_relations_count_all_labels_and_take_logits():
    logits = np.eye(3)[[0, 1, 1, 2]]
    found = relation_metrics(EvalPrediction(predictions=logits, label_ids=np.array([0, 0, 1, 2])))
    assert found == pytest.approx({"micro_f1": 3 / 4, "macro_f1": (2 / 3 + 2 / 3 + 1) / 3, "accuracy": 3 / 4})
    with_states = EvalPrediction(predictions=(logits, np.zeros((4, 2))), label_ids=np.array([0, 0, 1, 2]))
    assert relation_metrics(with_states) == found


def test_relations_name_the_extra_that_brings_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*kadapter-hf\[knowledge\]"):
        relation_metrics(of([0], [0]))


@pytest.mark.parametrize("make", [tacred_metrics, semeval_metrics])
def test_nothing_found_is_0(make):
    labels = [*SEMEVAL, "no_relation"]
    assert set(make(labels)(of([5, 5], [0, 2])).values()) == {0.0}


# ---- Dependency parsing ---------------------------------------------------------------------------------------------


def parsed(heads, relations, head_labels, relation_labels) -> EvalPrediction:
    arrays = [np.array(values) for values in (heads, relations, head_labels, relation_labels)]
    return EvalPrediction(predictions=tuple(arrays[:2]), label_ids=tuple(arrays[2:]))


def test_attachment_scores_with_and_without_punctuation():
    """Six words count, one of them punctuation; the second row has one word less."""
    prediction = parsed(
        heads=[[2, 0, 2, 1], [2, 0, 1, -100]],
        relations=[[0, 1, 2, 2], [0, 1, 0, -100]],
        head_labels=[[2, 0, 2, 2], [2, 0, -100, -100]],
        relation_labels=[[0, 1, 0, 2], [1, 1, -100, -100]],
    )
    wanted = {"uas": 5 / 6, "las": 3 / 6, "uas_without_punctuation": 5 / 5, "las_without_punctuation": 3 / 5}
    assert dependency_metrics(["det", "root", "punct"])(prediction) == pytest.approx(wanted)
    assert attachment_scores(prediction) == pytest.approx({"uas": 5 / 6, "las": 3 / 6})
    assert dependency_metrics(["det", "root"])(prediction) == pytest.approx({"uas": 5 / 6, "las": 3 / 6})


def test_logits_are_decoded_to_trees_that_end_where_the_sentence_does():
    lowest = torch.finfo(torch.float32).min
    arcs = torch.full((2, 3, 4), lowest)
    arcs[0] = torch.tensor([[5.0, lowest, 4.0, 0.0], [5.1, 0.0, lowest, 0.0], [0.0, 0.0, 1.0, lowest]])
    arcs[1, 0, 0] = 1.0  # one word
    relations = torch.zeros(2, 3, 4, 2)
    relations[0, 0, 2, 1] = relations[1, 0, 0, 1] = 1.0
    heads, labels = decode_for_metrics((arcs, relations, torch.zeros(1)), None)
    assert heads.tolist() == [[2, 0, 2], [0, -100, -100]]  # greedily, two words would hang on the root
    assert labels.tolist() == [[1, 0, 0], [1, -100, -100]]
