"""Answers from passages: windows, positions, aggregation and the metrics, with values worked out by hand."""

import json

import numpy as np
import pytest
from datasets import Dataset
from transformers import EvalPrediction

from kadapter_hf.tasks import TASKS
from kadapter_hf.tasks.extractive_qa import (
    ExtractiveQAOptions,
    aggregated,
    best_spans,
    exact_match,
    extractive_qa_features,
    normalized,
    token_f1,
)


LONG = "the cat sat on the mat . " * 20 + "dante was born in rome ."


def batch(context: str, *answers: str, question: str = "where was dante born ?") -> dict:
    starts = [context.find(answer) for answer in answers]
    return {"question": [question], "context": [context], "answers": [{"text": list(answers), "answer_start": starts}]}


def answers_in(encoded: dict, tokenizer) -> list[str]:
    """The labelled span of each window, as words."""
    return [
        tokenizer.decode(ids[start : end + 1])
        for ids, start, end in zip(
            encoded["input_ids"], encoded["start_positions"], encoded["end_positions"], strict=True
        )
    ]


@pytest.mark.parametrize(
    "context, answer", [("rome is old", "rome"), ("in rome", "rome"), ("dante was born in rome .", "born in rome")]
)
def test_the_labelled_tokens_are_those_of_the_answer(context, answer, tokenizer):
    encoded = extractive_qa_features(batch(context, answer), tokenizer)
    assert answers_in(encoded, tokenizer) == [answer]


def test_a_long_text_becomes_windows_that_cover_it_and_share_tokens(tokenizer):
    encoded = extractive_qa_features(batch(LONG, "rome"), tokenizer, max_length=32, stride=8)
    assert len(encoded["row"]) > 5 and set(encoded["row"]) == {0}
    assert max(map(len, encoded["input_ids"])) == 32
    ends = [max(end for _, end in offsets) for offsets in encoded["offsets"]]
    starts = [min(start for start, _ in offsets if start >= 0) for offsets in encoded["offsets"]]
    assert starts[0] == 0 and ends[-1] == len(LONG)
    assert all(after < before for after, before in zip(starts[1:], ends[:-1], strict=True))
    labelled = answers_in(encoded, tokenizer)
    assert labelled[-1] == "rome" and set(labelled[:-1]) == {"<s>"}


def test_a_passage_without_the_answer_points_at_the_first_token(tokenizer):
    encoded = extractive_qa_features(batch("the cat sat", "rome"), tokenizer)
    assert (encoded["start_positions"], encoded["end_positions"]) == ([0], [0])


def test_a_question_that_leaves_no_room_is_truncated_and_counted(tokenizer):
    encoded = extractive_qa_features(batch("in rome", "rome", question="where " * 60), tokenizer, max_length=32)
    assert encoded["truncated"] == [True] and answers_in(encoded, tokenizer) == ["rome"]


def test_rows_to_be_predicted_have_no_positions(tokenizer):
    encoded = extractive_qa_features({"question": ["where ?"], "context": ["in rome"]}, tokenizer)
    assert not encoded.keys() & {"start_positions", "end_positions"}


# ---- From scores to answers -----------------------------------------------------------------------------------------

OFFSETS = [(-1, -1), (0, 2), (3, 7), (8, 12), (-1, -1)]


def test_the_best_span_has_the_highest_sum_and_starts_before_it_ends():
    starts, ends = np.array([9.0, 0, 3, 1, 9]), np.array([9.0, 2, 0, 1, 9])
    spans = best_spans(starts, ends, OFFSETS, max_answer_length=30)
    assert spans[0] == (4.0, 3, 12)  # the start at 2 (3.0) and the end at 3 (1.0); the end at 1 would be before it
    assert (2.0, 0, 2) in spans and all(score <= 4.0 for score, _, _ in spans)
    assert best_spans(starts, ends, OFFSETS, max_answer_length=1)[0] == (3.0, 3, 7)


def test_padding_behind_a_window_is_no_answer():
    starts = np.array([0.0, 0, 1, 0, 0, 99, 99])
    assert best_spans(starts, starts, OFFSETS, 30)[0][1:] == (3, 7)


def test_a_window_without_context_has_no_answer():
    assert best_spans(np.zeros(2), np.zeros(2), [(-1, -1), (-1, -1)], 30) == []
    assert aggregated([], "best") == ("", 0.0, None)


def test_aggregation_takes_the_best_span_or_the_string_with_the_highest_sum():
    log = np.log
    candidates = [(log(0.4), "Paris", 0), (log(0.3), "Rome", 1), (log(0.3), "the rome", 2)]
    assert aggregated(candidates, "best") == ("Paris", pytest.approx(0.4), 0)
    assert aggregated(candidates, "sum") == ("Rome", pytest.approx(0.6), 1)


def test_of_equal_answers_the_first_is_taken():
    assert aggregated([(1.0, "a1", 0), (1.0, "b2", 1)], "best")[0] == "a1"


# ---- Metrics, by the definitions of SQuAD v1.1 ------------------------------------------------------------------------


def test_normalisation_removes_case_punctuation_and_articles():
    assert normalized("The  Danube, a river!") == "danube river"


@pytest.mark.parametrize(
    "found, answers, em, f1",
    [
        ("the Danube", ["Danube"], 1, 1),
        ("Danube river", ["Danube"], 0, 2 / 3),
        ("Vienna", ["Rome", "old Vienna"], 0, 2 / 3),
        ("", ["Rome"], 0, 0),
        ("the", ["a"], 1, 1),  # both are nothing but articles
        ("b b", ["b"], 0, 2 / 3),
    ],
)
def test_exact_match_and_f1(found, answers, em, f1):
    assert exact_match(found, answers) == em
    assert token_f1(found, answers) == pytest.approx(f1)


def test_metrics_count_each_question_once_however_many_passages_it_has(tokenizer):
    task = TASKS["search-qa"]
    passages = [("q1", "the cat sat"), ("q1", "in rome"), ("q2", "in paris"), ("q3", "on the mat")]
    answers = {"q1": ["rome"], "q2": ["vienna"], "q3": []}
    rows = Dataset.from_list(
        [
            {
                "id": name,
                "question": "where ?",
                "context": text,
                "answers": {"text": answers[name], "answer_start": [text.find(answer) for answer in answers[name]]},
            }
            for name, text in passages
        ]
    )
    options = ExtractiveQAOptions()
    features = task.encode(rows, tokenizer, [], 32, options)
    length = max(map(len, features["input_ids"]))
    logits = np.full((4, length), -9.0)
    last = [max(place for place, span in enumerate(offsets) if span[0] >= 0) for offsets in features["offsets"]]
    for window, place in enumerate(last):
        logits[window, place] = (
            5.0 if window == 1 else 1.0
        )  # the last word of each passage; "rome" is the surest for q1
    compute = task.metrics_on(rows, features, [], options)
    metrics = compute(EvalPrediction(predictions=(logits, logits), label_ids=None))
    assert metrics == {"exact_match": 0.5, "f1": 0.5}  # q1 is right, q2 is wrong, and q3 has no answer


def test_questions_without_an_answer_are_not_trained_on(caplog):
    rows = Dataset.from_list(
        [
            {"id": "q1", "answers": {"text": ["rome"], "answer_start": [-1]}},
            {"id": "q1", "answers": {"text": ["rome"], "answer_start": [3]}},
            {"id": "q2", "answers": {"text": ["rome"], "answer_start": [-1]}},
        ]
    )
    task = TASKS["quasar-t"]
    assert task.used_rows(rows, ExtractiveQAOptions(), training=True)["id"] == ["q1", "q1"]
    assert task.used_rows(rows, ExtractiveQAOptions(), training=False)["id"] == ["q1", "q1", "q2"]
    assert task.used_rows(rows, ExtractiveQAOptions(max_passages=1), training=False)["id"] == ["q1", "q2"]


# ---- No answer, by the definitions of SQuAD 2.0 -------------------------------------------------------------------------

MAY_HAVE_NONE = ExtractiveQAOptions(null_score_diff_threshold=0.0)
CITIES = ["rome", "paris", "vienna", "the"]


def cities(answers: list[list[str]], tokenizer):
    """A question about each city; its text is the name alone. Returns the rows and their features."""
    rows = Dataset.from_list(
        [
            {
                "id": f"q{number}",
                "question": "where ?",
                "context": city,
                "answers": {"text": right, "answer_start": [0] * len(right)},
            }
            for number, (city, right) in enumerate(zip(CITIES, answers, strict=False))
        ],
        features=TASKS["extractive-qa"].schema.features,
    )
    return rows, TASKS["extractive-qa"].encode(rows, tokenizer, [], 32)


def logits_with(features, spans: list[float], nulls: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends that sum up to these scores for the only span and for the first token of each window."""
    scores = np.full((len(features), max(map(len, features["input_ids"]))), -99.0)
    for window, offsets in enumerate(features["offsets"]):
        scores[window, 0] = nulls[window] / 2
        scores[window, [place for place, (start, _) in enumerate(offsets) if start >= 0]] = spans[window] / 2
    return scores, scores


def test_squad_2_and_tables_say_that_a_question_has_no_answer(tmp_path):
    impossible = {"id": "1", "question": "where ?", "answers": [], "is_impossible": True}
    impossible["plausible_answers"] = [{"text": "rome", "answer_start": 3}]
    possible = {"id": "2", "question": "where ?", "answers": [{"text": "rome", "answer_start": 3}]}
    paragraph = {"context": "in rome", "qas": [impossible, possible | {"is_impossible": False}]}
    (tmp_path / "a.json").write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": [paragraph]}]}))
    table = "id,question,context,answer,is_impossible\n1,where ?,in rome,,True\n2,where ?,in rome,rome,False\n"
    (tmp_path / "b.csv").write_text(table)
    wanted = [{"text": [], "answer_start": []}, {"text": ["rome"], "answer_start": [3]}]
    for name in ("a.json", "b.csv"):
        assert TASKS["extractive-qa"].read(tmp_path / name)[0]["answers"][:] == wanted


def test_questions_without_an_answer_are_trained_towards_the_first_token(tokenizer, caplog):
    rows, features = cities([["rome"], []], tokenizer)
    assert features["start_positions"][1] == features["end_positions"][1] == 0
    used = TASKS["extractive-qa"].used_rows
    assert used(rows, MAY_HAVE_NONE, training=True)["id"] == ["q0", "q1"]
    assert not caplog.messages
    assert used(rows, ExtractiveQAOptions(), training=True)["id"] == ["q0"]
    assert "1 of 2 questions are not trained on" in caplog.text and "--null_score_diff_threshold 0" in caplog.text


@pytest.mark.parametrize("aggregation", ["best", "sum"])
@pytest.mark.parametrize("threshold, found", [(0.0, ["rome", "", ""]), (1.5, ["rome", "paris", ""]), (-1.5, [""] * 3)])
def test_the_answer_is_empty_if_the_first_token_exceeds_the_best_span_by_more_than_the_threshold(
    threshold, found, aggregation, tokenizer
):
    rows, features = cities([[]] * 3, tokenizer)
    logits = logits_with(features, spans=[4.0, 4.0, 4.0], nulls=[3.0, 5.0, 6.0])
    options = ExtractiveQAOptions(null_score_diff_threshold=threshold, aggregation=aggregation)
    predictions = TASKS["extractive-qa"].predictions(logits, rows, features, [], options)
    assert [predictions[number]["prediction"] for number in range(3)] == found


def test_the_window_whose_first_token_scores_least_decides(tokenizer):
    """The first window is sure that it has no answer, the last one that it has."""
    rows = Dataset.from_dict({"id": ["q"], "question": ["where ?"], "context": [LONG]})
    features = TASKS["extractive-qa"].encode(rows, tokenizer, [], 32)
    windows = len(features)
    logits = logits_with(features, spans=[1.0] * windows, nulls=[9.0] * (windows - 1) + [0.5])
    found = TASKS["extractive-qa"].predictions(logits, rows, features, [], MAY_HAVE_NONE)
    assert found[0]["prediction"] != ""


def test_metrics_are_those_of_the_official_scorer(tokenizer):
    """An empty prediction is right for a question without an answer, and for one whose answers are articles alone."""
    rows, features = cities([["rome"], [], [], ["the"]], tokenizer)
    logits = logits_with(features, spans=[5.0, 1.0, 5.0, 1.0], nulls=[1.0, 5.0, 1.0, 5.0])  # rome, "", vienna, ""
    compute = TASKS["extractive-qa"].metrics_on(rows, features, [], MAY_HAVE_NONE)
    assert compute(EvalPrediction(predictions=logits, label_ids=None)) == {
        "exact_match": 0.75,
        "f1": 0.75,
        "HasAns_exact": 1.0,
        "HasAns_f1": 1.0,
        "NoAns_exact": 0.5,
        "NoAns_f1": 0.5,
    }
