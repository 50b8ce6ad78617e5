"""Validation of rows, and custom JSON Lines files."""

import json
from pathlib import Path

import pytest

from kadapter_hf.corpora import (
    DEPENDENCY,
    RELATION,
    TYPING,
    Report,
    check_columns,
    dependency_problem,
    read_jsonl,
    relation_problem,
    typing_problem,
)


EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
FACT = {"text": "Rome is in Italy.", "subject": [0, 4], "object": [11, 16], "relation": "located_in"}
ENTITY = {"text": "Rome is old.", "entity": [0, 4], "types": ["place", "city"]}
TREE = {
    "text": "She didn't sleep",
    "tokens": ["She", "did", "n't", "sleep"],
    "heads": [4, 4, 4, 0],
    "labels": ["nsubj", "aux", "advmod", "root"],
}


@pytest.mark.parametrize(
    "problem, row", [(relation_problem, FACT), (typing_problem, ENTITY), (dependency_problem, TREE)]
)
def test_nothing_is_wrong_with_a_good_row(problem, row):
    assert problem(row) is None


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"text": " "}, "the text is empty"),
        ({"text": None}, "text is not a string"),
        ({"text": "Rome is in \ud800 Italy"}, "the text is not Unicode"),
        ({"object": [11, 18]}, "the object is outside the text"),
        ({"subject": [-1, 4]}, "the subject is outside the text"),
        ({"subject": [4, 4]}, "the subject is empty"),
        ({"subject": [4, 5]}, "the subject is empty"),
        ({"subject": [4, 0]}, "the subject is empty"),
        ({"subject": [0]}, "subject is not [start, end]"),
        ({"subject": ["0", "4"]}, "subject is not [start, end]"),
        ({"object": [3, 7]}, "subject and object overlap"),
        ({"relation": ""}, "relation is not a name"),
    ],
)
def test_the_problem_of_a_relation_row(change, problem):
    assert relation_problem(FACT | change) == problem


def test_subject_and_object_may_touch():
    assert relation_problem(FACT | {"subject": [0, 4], "object": [4, 7]}) is None


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"entity": [8, 13]}, "the entity is outside the text"),
        ({"types": [""]}, "types is not a list of names"),
        ({"types": "place"}, "types is not a list of names"),
    ],
)
def test_the_problem_of_a_typing_row(change, problem):
    assert typing_problem(ENTITY | change) == problem


def test_an_entity_may_have_none_of_the_types():
    assert typing_problem(ENTITY | {"types": []}) is None


@pytest.mark.parametrize(
    "problem, row, labels", [(relation_problem, FACT, "relation"), (typing_problem, ENTITY, "types")]
)
def test_a_row_without_labels_is_valid_as_it_is_to_be_predicted(problem, row, labels):
    assert problem({name: value for name, value in row.items() if name != labels}) is None


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"heads": [4, 4, 4, 5]}, "a head is outside the sentence"),
        ({"heads": [4, 4, 4, -1]}, "a head is outside the sentence"),
        ({"heads": [4, 4, 4, 1]}, "no root"),
        ({"heads": [4, 0, 4, 0]}, "several roots"),
        ({"heads": [2, 1, 4, 0]}, "a cycle"),
        ({"heads": [1, 4, 4, 0]}, "a cycle"),
        ({"heads": [4, 4, 0]}, "tokens, heads and labels differ in length"),
        ({"labels": ["nsubj"]}, "tokens, heads and labels differ in length"),
        ({"tokens": ["She", "did", "not", "sleep"]}, "a token does not occur in the text"),
        ({"tokens": ["did", "She", "n't", "sleep"]}, "a token does not occur in the text"),
        ({"tokens": []}, "tokens is not a list of words"),
        ({"tokens": ["She", "", "n't", "sleep"]}, "tokens is not a list of words"),
        ({"heads": ["4", 4, 4, 0]}, "heads is not a list of integers"),
        ({"labels": [None, "aux", "advmod", "root"]}, "labels is not a list of names"),
    ],
)
def test_the_problem_of_a_dependency_row(change, problem):
    assert dependency_problem(TREE | change) == problem


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="missing: subject, relation"):
        check_columns(["text", "object", "more"], RELATION)
    check_columns(["more", *TYPING.features], TYPING)


def test_the_example_facts_are_of_the_relation_schema():
    dataset, report = read_jsonl(EXAMPLES / "facts.jsonl", RELATION)
    assert dataset.features == RELATION.features
    assert (report.kept, report.dropped.total(), len(report.labels)) == (360, 0, 12)
    assert report.labels["author_of"] == 30


@pytest.mark.parametrize(("file", "rows", "persons"), [("typing.jsonl", 420, 105), ("typing_more.jsonl", 1664, 384)])
def test_the_example_entities_are_of_the_typing_schema(file, rows, persons):
    _, report = read_jsonl(EXAMPLES / file, TYPING)
    assert (report.kept, report.dropped.total()) == (rows, 0)
    assert report.labels["person"] == persons


def test_other_columns_are_left_out(write_file):
    dataset, _ = read_jsonl(write_file({**TREE, "genre": "news"}), DEPENDENCY)
    assert dataset.column_names == list(DEPENDENCY.features)
    assert dataset[0] == TREE


def test_unusable_lines_are_counted_and_named(write_file):
    good = json.dumps(FACT)
    lines = [good, "", "{", '["a"]', '{"text": "a"}', json.dumps(FACT | {"text": ""}), good]
    path = write_file("\n".join(lines).encode() + b'\n{"text": "\xff"}\nnull')
    dataset, report = read_jsonl(path, RELATION)
    assert len(dataset) == report.kept == 2
    assert report.first_dropped == {
        "not JSON; a file has a list of objects, or an object in each line": ["line 3"],
        "not a JSON object": ["line 4", "line 9"],
        "no column subject, object, relation": ["line 5"],
        "the text is empty": ["line 6"],
        "not UTF-8": ["line 8"],
    }


def test_strict_names_file_and_line(write_file):
    path = write_file(json.dumps(FACT) + "\n{")
    with pytest.raises(ValueError, match=f"{path.name}, line 2: not JSON"):
        read_jsonl(path, RELATION, strict=True)


def test_an_empty_file_is_an_error(write_file):
    with pytest.raises(ValueError, match="no usable record"):
        read_jsonl(write_file(""), RELATION)


def test_a_byte_order_mark_is_no_content(write_file):
    dataset, _ = read_jsonl(write_file(b"\xef\xbb\xbf" + json.dumps(FACT).encode()), RELATION)
    assert dataset[0] == FACT


def test_a_report_names_the_first_five_and_survives_saving(tmp_path):
    report = Report()
    report.keep(["a", "b"])
    for number in range(7):
        report.drop("bad", str(number))
    other = Report()
    other.drop("worse", "x", count=3)
    report.add(other)
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert report.first_dropped == {"bad": ["0", "1", "2", "3", "4"], "worse": ["x"]}
    assert report.dropped == {"bad": 7, "worse": 3}
