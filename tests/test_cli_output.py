"""What long commands print, with --quiet, --verbose and --log_file, and where standard error is a terminal or is none."""

import csv
import json
import logging
import os
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import small_adapter
from transformers import pipeline
from transformers.utils.logging import is_progress_bar_enabled
from typer.testing import CliRunner

from kadapter_cli import app
from kadapter_hf import KAdapterModel


sys.path.append(str(Path(__file__).parent / "tasks"))
from samples import write_sample  # noqa: E402


Trained = namedtuple("Trained", "done log model data")
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
LABELS = {"capital": "P36", "birthplace": "P19"}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


def finetune(data: Path, adapter: Path, model: Path) -> list:
    flags = ["--data", data, "--adapters", adapter, "--output_dir", model, "--max_steps", 2, "--logging_steps", 1]
    return ["finetune", "relation", *flags, "--eval_strategy", "epoch", "--use_cpu", "true", "--report_to", "none"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, backbone) -> Trained:
    """A model that was fine-tuned on relations with Wikidata's numbers, which a relations.json beside the rows names."""
    folder = tmp_path_factory.mktemp("output")
    KAdapterModel.from_backbone(backbone, {"factual": small_adapter()}).save_pretrained(folder / "adapter")
    data = write_sample("relation", folder / "data")
    for file in data.glob("*.csv"):
        file.write_text(re.sub("capital$|birthplace$", lambda label: LABELS[label[0]], file.read_text(), flags=re.M))
    (data / "relations.json").write_text(json.dumps({"P36": ["capital", "seat of government"], "P19": "birthplace"}))
    log = folder / "log.txt"
    done = run("--log_file", log, *finetune(data, folder / "adapter", folder / "model"))
    assert done.exit_code == 0, done.output
    return Trained(done, log.read_text(), folder / "model", data)


def predict(trained: Trained, output: Path, *options):
    file = trained.data / "test.csv"
    return run(*options, "predict", "relation", "--model", trained.model, "--input", file, "--output", output)


@pytest.fixture(scope="module")
def predicted(trained):
    """Predictions with --quiet: the result of the command, and the file."""
    file = trained.model.parent / "rows.jsonl"
    return predict(trained, file, "--quiet"), file


# ---- Progress and logs ----------------------------------------------------------------------------------------------


def test_without_a_terminal_progress_is_a_line_for_each_log(trained):
    # transformers 5.5 says more, which nothing can be done about.
    others = ("The backbone computes in", "The tokenizer has new PAD/BOS/EOS tokens")
    steps = [line for line in trained.done.stderr.splitlines() if not line.startswith(others)]
    patterns = [
        r"Step 1 of 2: loss [\d.]+, .*; \d\d:\d\d left",
        r"Step 1 of 2: eval_loss [\d.]+, eval_micro_f1 .*",
        r"Step 2 of 2: loss [\d.]+, .*; 00:00 left",
        r"Step 2 of 2: eval_loss [\d.]+, eval_micro_f1 .*",
    ]
    assert len(steps) == len(patterns) and all(map(re.fullmatch, patterns, steps)), trained.done.stderr


def test_the_last_line_says_what_was_written_and_what_to_do_next(trained):
    last = trained.done.stdout.splitlines()[-1]
    command = f"kadapter predict relation --model {trained.model} --input FILE"
    assert last == f"The model is in {trained.model}. Predict with it: `{command}`."


def test_quiet_leaves_only_the_last_line(predicted):
    done, file = predicted
    assert (done.stdout, done.stderr) == (f"4 predictions for 4 rows are in {file}.\n", "")


def test_quiet_leaves_errors(tmp_path):
    done = run("--quiet", "predict", "relation", "--model", tmp_path, "--input", __file__)
    assert done.exit_code == 1 and done.stdout == "" and done.stderr.startswith("Error: ")


def test_verbose_adds_the_logs_of_the_libraries(trained, tmp_path):
    assert "***** Running Prediction *****" in predict(trained, tmp_path / "rows.jsonl", "--verbose").stderr
    assert "***** Running" not in trained.done.stderr


def test_the_log_file_has_everything_with_time_stamps(trained):
    lines = [line for line in trained.log.splitlines() if re.match(TIME, line)]
    for said in (*trained.done.stdout.splitlines(), *trained.done.stderr.splitlines(), "***** Running training *****"):
        assert said in trained.log
    assert any(re.fullmatch(rf"{TIME} INFO kadapter: test micro_f1: .*", line) for line in lines)


def test_a_log_file_grows_and_has_the_traceback_of_an_error(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("earlier\n")
    assert run("--log_file", log, "predict", "relation", "--model", tmp_path, "--input", __file__).exit_code == 1
    assert log.read_text().startswith("earlier\n") and "Traceback (most recent call last)" in log.read_text()


def test_a_log_file_that_can_not_be_written_is_told(trained, tmp_path):
    done = predict(trained, tmp_path / "rows.jsonl", "--log_file", tmp_path / "no" / "log.txt")
    assert done.exit_code == 2 and "there is no folder" in done.stderr


def test_quiet_and_verbose_exclude_each_other():
    done = run("--quiet", "--verbose", "doctor")
    assert done.exit_code == 2 and "either --quiet or --verbose" in done.stderr


def test_afterwards_logs_and_bars_are_as_before(trained, tmp_path):
    loggers = [
        logging.getLogger(name) for name in (None, "transformers", "datasets", "huggingface_hub", "kadapter_hf")
    ]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    predict(trained, tmp_path / "rows.jsonl", "--verbose", "--log_file", tmp_path / "log.txt")
    assert [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers] == before
    assert is_progress_bar_enabled()


@pytest.mark.slow
def test_on_a_terminal_a_bar_has_the_rate_the_time_left_and_the_loss(trained, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    command = finetune(trained.data, trained.model.parent / "adapter", tmp_path / "model")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "kadapter_cli", *map(str, command)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the end
            break
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = shown.decode()
    assert "Step 2 of 2: eval_loss " in text and "Step 2 of 2: loss" not in text and "{'" not in text
    assert re.search(r"Training: 100%\|█+\| 2/2 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(step/s|s/step), loss=[\d.]+\]", text)


# ---- Names of labels ------------------------------------------------------------------------------------------------


def test_predictions_have_the_names_of_labels_that_are_numbers(predicted):
    rows = [json.loads(line) for line in predicted[1].read_text().splitlines()]
    names = {"P36": "capital", "P19": "birthplace"}
    assert len(rows) == 4 and all(row["name"] == names[row["prediction"]] for row in rows)


def test_the_table_by_class_has_the_names(trained):
    with open(trained.model / "per_class.csv", newline="") as file:
        table = {row["class"]: row["name"] for row in csv.DictReader(file)}
    assert table == {"P36": "capital", "P19": "birthplace"}


def test_a_pipeline_returns_the_names(trained):
    pipe = pipeline("relation-classification", str(trained.model))
    found = pipe({"text": "rome is in italy", "subject": [0, 4], "object": [11, 16]}, top_k=None)
    assert {label["label"]: label["name"] for label in found} == {"P36": "capital", "P19": "birthplace"}


def test_info_shows_the_names(trained):
    assert "P19 (birthplace), P36 (capital)" in run("info", trained.model).stdout
    found = json.loads(run("info", trained.model, "--json").stdout)
    assert (found["task"], found["labels"]) == ("relation", ["P19", "P36"])
    assert found["label_names"] == {"P36": "capital", "P19": "birthplace"}


def test_a_file_beside_the_model_names_its_labels(trained, tmp_path):
    model = Path(shutil.copytree(trained.model, tmp_path / "model"))
    (model / "relations.json").write_text(json.dumps({"P36": "capital of", "P19": "born in"}))
    predict(trained._replace(model=model), tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["name"] for row in rows} <= {"capital of", "born in"}


@pytest.mark.parametrize(("content", "said"), [('{"P36": []}', "has no name for 'P36'"), ("{", "is not JSON")])
def test_a_file_of_names_that_is_none_is_refused(content, said, trained, tmp_path):
    model = Path(shutil.copytree(trained.model, tmp_path / "model"))
    (model / "relations.json").write_text(content)
    done = predict(trained._replace(model=model), tmp_path / "rows.jsonl")
    assert done.exit_code == 1 and said in done.stderr


def test_the_list_of_labels_that_prepare_writes_has_no_names(trained, tmp_path):
    model = Path(shutil.copytree(trained.model, tmp_path / "model"))
    (model / "relations.json").write_text('["P19", "P36"]')
    assert predict(trained._replace(model=model), tmp_path / "rows.jsonl").exit_code == 0
