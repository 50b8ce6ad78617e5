"""Every task end to end: fine-tuning, resuming, evaluation of what was saved, and predictions without labels."""

import csv
import json
import re
import shutil

import pytest
import torch
from conftest import assert_same_weights, small_adapter
from samples import FACTS, SAMPLES, files_of, write_sample
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
from typer.testing import CliRunner

from kadapter_hf import KAdapterModel
from kadapter_hf.cli import app
from kadapter_hf.finetuning import main, predict
from kadapter_hf.tasks import TASKS


STEPS = (
    *("--max_steps", "4", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    *("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"),
    *("--learning_rate", "1e-3", "--warmup_steps", "0", "--save_total_limit", "4", "--max_length", "64"),
    *("--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true", "--load_best_model_at_end", "false"),
)


def run(*arguments: str):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, backbones) -> str:
    """A folder with an untrained adapter called factual."""
    folder = tmp_path_factory.mktemp("adapter") / "factual"
    KAdapterModel.from_backbone(backbones["roberta"], {"factual": small_adapter()}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, adapter):
    """`trained(task)`: the folders of its data and of a model that was fine-tuned on it, and the metrics."""
    made = {}

    def trained(task: str):
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            data = write_sample(task, folder / "data")
            metrics = main(
                [task, "--data", str(data), "--adapters", adapter, "--output_dir", str(folder / "model"), *STEPS]
            )
            made[task] = data, folder / "model", metrics
        return made[task]

    return trained


def test_there_is_a_sample_of_every_task():
    assert SAMPLES.keys() == TASKS.keys()


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_a_model_its_metrics_and_its_predictions(task, trained):
    data, folder, metrics = trained(task)
    assert metrics.keys() == {"validation", "test"} and TASKS[task].metric in metrics["test"]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == len(FACTS)
    assert all("prediction" in row and row.keys() & {"text", "context", "tokens"} for row in predictions)
    recorded = json.loads((folder / "config.json").read_text())["task"]
    assert recorded["name"] == task and recorded["results"] == metrics and recorded["max_length"] == 64


@pytest.mark.parametrize("task", TASKS)
def test_the_backbone_trains_and_the_adapter_stays_as_it_was(task, trained, adapter, backbones):
    _, folder, _ = trained(task)
    model, before = KAdapterModel.from_pretrained(folder), KAdapterModel.from_pretrained(adapter)
    assert_same_weights(model.adapters, before.adapters)
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(model.backbone.state_dict()[name], before.backbone.state_dict()[name])


@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(task, trained, adapter, tmp_path):
    data, folder, metrics = trained(task)
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    flags = ("--output_dir", str(tmp_path), "--resume_from_checkpoint", "true")
    resumed = main([task, "--data", str(data), "--adapters", adapter, *flags, *STEPS])
    assert resumed["test"] == pytest.approx(metrics["test"], rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_of_the_saved_model_gives_the_same_metrics(task, trained, tmp_path):
    data, folder, metrics = trained(task)
    result = run("evaluate", task, "--model", folder, "--data", data, "--output", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == pytest.approx(metrics["test"], rel=1e-4, abs=1e-6)
    assert (tmp_path / "predictions.jsonl").exists()


@pytest.mark.parametrize("task", TASKS)
def test_predictions_need_no_labels(task, trained, tmp_path):
    data, folder, _ = trained(task)
    path = files_of(task, data, "test")
    for file in path.parent.glob(f"{path.stem}.*"):
        shutil.copy(file, tmp_path)
    result = run("predict", task, "--model", folder, "--input", tmp_path / path.name)
    assert result.exit_code == 0, result.output
    written = (tmp_path / f"{path.name}.predictions.jsonl").read_text().splitlines()
    labels = TASKS[task].schema.labels
    with_labels = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    for line, expected in zip(written, with_labels, strict=True):
        row = json.loads(line)
        assert labels not in row and row["prediction"] == expected["prediction"]


def test_the_table_by_class_counts_as_the_predictions_do(trained):
    _, folder, _ = trained("relation")
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    with open(folder / "per_class.csv", newline="") as file:
        table = {row["class"]: row for row in csv.DictReader(file)}
    assert {name: int(row["support"]) for name, row in table.items()} == {"capital": 2, "birthplace": 2}
    right = sum(row["prediction"] == row["relation"] == "capital" for row in predictions)
    assert float(table["capital"]["recall"]) == right / 2
    assert (folder / "confusion_matrix.png").stat().st_size > 1000


def test_cosmos_qa_has_the_leaderboards_file(trained):
    _, folder, _ = trained("cosmos-qa")
    predictions = [json.loads(line)["prediction"] for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert (folder / "predictions.lst").read_text().split() == [str(number) for number in predictions]


def test_the_card_has_the_results(trained):
    _, folder, metrics = trained("open-entity")
    card = (folder / "README.md").read_text()
    assert "open-entity" in card and f"{metrics['test']['micro_f1']:.4f}" in card


@pytest.mark.parametrize("task", ["open-entity", "tacred"])
def test_the_card_shows_how_to_predict(task, trained, capsys, monkeypatch):
    _, folder, _ = trained(task)
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(folder)
    capsys.readouterr()  # the training's
    exec(snippet, {})
    assert capsys.readouterr().out.startswith("[")


def test_a_question_is_answered_by_a_function(trained):
    _, folder, _ = trained("extractive-qa")
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text, subject, _, _ = FACTS[0]
    (found,) = predict(model, tokenizer, [{"question": f"where is {subject} ?", "context": text}])
    written = json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])
    assert found["prediction"] == written["prediction"] and found["prediction"] in text
    with pytest.raises(ValueError, match="row 1: no context"):
        predict(model, tokenizer, [{"question": "where ?"}])


def test_a_model_of_another_kind_is_refused(trained):
    _, folder, _ = trained("extractive-qa")
    data, _, _ = trained("typing")
    result = run("evaluate", "typing", "--model", folder, "--data", data)
    assert result.exit_code == 1 and "is a KAdapterForQuestionAnswering" in result.output
