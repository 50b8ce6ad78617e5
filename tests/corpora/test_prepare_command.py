"""The command `kadapter prepare`."""

import json
import re

import pytest
from conftest import contents
from datasets import load_dataset
from typer.testing import CliRunner

from kadapter_cli import app
from kadapter_hf.corpora import RELATION


FEWREL = {"P403": [{"tokens": ["Po", "to", "sea"], "h": ["po", "Q1", [[0]]], "t": ["sea", "Q2", [[2]]]}] * 3}
FEWREL["P1"] = [*FEWREL["P403"][:1], {"tokens": []}]
COMMANDS = ["trex", "fewrel", "docred", "tacred", "semeval", "conllu"]
TREE = "1\tSit\t_\t_\t_\t_\t0\troot\t_\tSpaceAfter=No\n2\t!\t_\t_\t_\t_\t1\tpunct\t_\t_\n"


def run(*arguments):
    return CliRunner().invoke(app, ["prepare", *map(str, arguments)], terminal_width=120)


def test_a_corpus_becomes_parquet_labels_and_a_report(write_file, tmp_path):
    out = tmp_path / "made" / "out"
    result = run("fewrel", write_file(FEWREL), "--output", out)
    assert result.exit_code == 0, result.output
    assert "4 rows kept, 1 dropped" in result.output
    dataset = load_dataset(str(out), cache_dir=str(tmp_path / "cache"), split="train")
    assert dataset.features == RELATION.features
    assert dataset[3] == {"text": "Po to sea", "subject": [0, 2], "object": [6, 9], "relation": "P1"}
    assert json.loads((out / "relations.json").read_text()) == ["P1", "P403"]
    assert json.loads((out / "report.json").read_text()) == {
        "kept": 4,
        "dropped": {"the record is incomplete": 1},
        "first_dropped": {"the record is incomplete": ["P1 record 1"]},
        "labels": {"P403": 3, "P1": 1},
    }


def test_trees_have_labels_json(write_file, tmp_path):
    assert run("conllu", write_file(TREE), "--output", tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == ["punct", "root"]


def test_trex_prints_its_report(write_file, tmp_path, real):
    result = run("trex", real("t-rex/sample-output.json"), "--output", tmp_path / "out", "--min-examples", 10)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "relations.json").read_text()) == ["P17", "P37", "P47"]
    assert "72 rows kept, 40 dropped" in result.output


@pytest.mark.parametrize(
    "arguments",
    [["fewrel", "--strict"], ["tacred"], ["trex"]],
    ids=["a bad record", "another format", "nothing usable"],
)
def test_an_error_is_one_sentence_and_exit_code_1(write_file, tmp_path, arguments):
    command, *options = arguments
    result = run(command, write_file(FEWREL, "corpus.json"), "--output", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_several_files_become_one_data_set(write_file, tmp_path):
    first, second = write_file(FEWREL, "a.json"), write_file({"P9": FEWREL["P1"]}, "b.json")
    result = run("fewrel", first, second, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    dataset = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), split="train")
    assert dataset["relation"][:] == ["P403"] * 3 + ["P1", "P9"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["first_dropped"] == {
        "the record is incomplete": ["a.json: P1 record 1", "b.json: P9 record 1"]
    }


def test_several_files_of_trees_become_one_data_set(write_file, tmp_path):
    files = [write_file(TREE, name) for name in ("a.conllu", "b.conllu")]
    assert "2 rows kept" in run("conllu", *files, "--output", tmp_path / "out").output


def test_a_split_gets_a_file_of_its_own_beside_the_others(write_file, tmp_path):
    out = tmp_path / "out"
    run("fewrel", write_file({"P5": FEWREL["P1"]}), "--output", out, "--split", "validation")
    assert json.loads((out / "report.json").read_text()).keys() == {"validation"}
    run("fewrel", write_file(FEWREL), "--output", out)
    run("tacred", write_file([]), "--output", out, "--split", "test")  # an error, which changes nothing
    splits = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {name: rows["relation"][:] for name, rows in splits.items()} == {
        "train": ["P403"] * 3 + ["P1"],
        "validation": ["P5"],
    }
    assert json.loads((out / "relations.json").read_text()) == ["P1", "P403", "P5"]
    report = json.loads((out / "report.json").read_text())
    assert (report["kept"], report["validation"]["kept"]) == (4, 1)


def test_rows_of_an_earlier_run_are_replaced_with_overwrite_only(write_file, tmp_path):
    out = tmp_path / "out"
    for split, relation in (("train", "P5"), ("validation", "P6")):
        run("fewrel", write_file({relation: FEWREL["P1"]}), "--output", out, "--split", split)
    before = contents(out)
    again = ["fewrel", write_file({"P7": FEWREL["P1"]}), "--output", out, "--split", "validation"]
    result = run(*again)
    assert result.exit_code == 1 and "validation.parquet' exists: replace it with --overwrite" in result.stderr
    assert contents(out) == before
    assert run(*again, "--overwrite").exit_code == 0
    assert json.loads((out / "relations.json").read_text()) == ["P5", "P7"]


@pytest.mark.parametrize("command", ["trex", "conllu"])
def test_every_corpus_has_overwrite(command, write_file, tmp_path):
    (tmp_path / "train.parquet").write_text("mine")
    result = run(command, write_file(TREE, "corpus.json"), "--output", tmp_path)
    assert result.exit_code == 1 and "exists: replace it with --overwrite" in " ".join(result.stderr.split())
    assert (tmp_path / "train.parquet").read_text() == "mine"


LONG = "x" * 100_000


@pytest.mark.parametrize("strict", [[], ["--strict"]], ids=["", "strict"])
@pytest.mark.parametrize(
    ("command", "content"),
    [
        ("fewrel", {LONG: [{}]}),
        ("docred", [{"title": LONG, "labels": []}, {"title": LONG, "labels": [{"h": LONG, "r": LONG, "t": LONG}]}]),
        ("tacred", [{"id": LONG}]),
        ("semeval", LONG),
        ("conllu", f"# sent_id = {LONG}\n{TREE.replace('root', '_')}".replace("0\t_", "1\t_")),
        ("trex", [{"docid": LONG}]),
    ],
)
def test_an_error_quotes_little_of_a_wrong_file(command, content, strict, write_file, tmp_path):
    result = run(command, write_file(content, "corpus.json"), "--output", tmp_path / "out", *strict)
    assert result.exit_code == 1
    assert "x" * 20 in result.stderr and "…" in result.stderr
    assert len(result.stderr) < 1000


def test_tables_quote_little_of_long_labels_and_show_brackets(write_file, tmp_path):
    content = {"[bold]P1[/bold]": FEWREL["P403"], LONG: FEWREL["P403"], "P2": {LONG: 1}, LONG[1:]: [{}]}
    result = run("fewrel", write_file(content), "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert "[bold]P1[/bold]" in result.stdout and len(result.stdout) < 5000


@pytest.mark.parametrize("command", [["fewrel"], ["semeval"], ["conllu"], ["conllu", "--pipeline", "any"]])
def test_a_file_that_is_not_utf_8_is_named(write_file, tmp_path, command):
    result = run(*command, write_file(b"caf\xe9", "corpus.txt"), "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "corpus.txt" in result.stderr and "not UTF-8" in result.stderr


def test_a_file_that_does_not_exist_is_named(tmp_path):
    result = run("semeval", tmp_path / "nowhere.txt", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "nowhere.txt" in re.sub(r"[\s│]", "", result.stderr)  # the message is in a box, broken into lines


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"kadapter prepare {command}" in result.output
