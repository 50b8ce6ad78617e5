"""Every task end to end: fine-tuning, resuming, evaluation of what was saved, and predictions without labels."""

import csv
import json
import re
import shutil
from collections import namedtuple

import psutil
import pytest
import torch
from conftest import assert_same_weights, small_adapter
from samples import FACTS, SAMPLES, files_of, write_sample
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
from typer.testing import CliRunner

from kadapter_cli import _names, app
from kadapter_hf import KAdapterModel
from kadapter_hf.finetuning import main, parser
from kadapter_hf.named_adapters import named_adapters
from kadapter_hf.predicting import labels_of, load_finetuned, options_of, predict
from kadapter_hf.runs import schedule
from kadapter_hf.tasks import TASKS


STEPS = (
    *("--max_steps", "4", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    *("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"),
    *("--learning_rate", "1e-3", "--warmup_steps", "0", "--save_total_limit", "4", "--max_length", "64"),
    *("--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true", "--load_best_model_at_end", "false"),
)

# What depends on the model alone is tested with one task for each class.
ONE_FOR_EACH_CLASS = {task.model_class: name for name, task in TASKS.items()}.values()


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
    assert set(metrics["validation"]) == {"loss", *_names.METRICS[task]}
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


@pytest.mark.parametrize("task", ONE_FOR_EACH_CLASS)
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


def test_a_model_that_may_answer_nothing_does_so_after_loading(backbones, tmp_path):
    rows = [{"question": "where ?", "context": text, "answer": other} for text, _, other, _ in FACTS[:3]]
    rows.append({"question": "where ?", "context": FACTS[3][0], "answer": []})
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--null_score_diff_threshold", "-1000", "--output_dir", str(tmp_path / "model"), *STEPS)
    metrics = main(["extractive-qa", "--data", str(tmp_path), "--backbone", backbones["roberta"], *flags])
    assert metrics["test"].items() >= {"exact_match": 0.25, "HasAns_f1": 0.0, "NoAns_f1": 1.0}.items()
    model, tokenizer = load_finetuned(str(tmp_path / "model"), TASKS["extractive-qa"])
    (answer,) = predict(model, tokenizer, [{"question": "where ?", "context": "dante was born in rome ."}])
    assert answer["prediction"] == ""


LONG = "cat " * 70
TOO_LONG = {  # for 64 tokens
    "relation": {"text": f"rome {LONG}italy", "subject": "rome", "object": "italy", "relation": "capital"},
    "typing": {"text": f"rome {LONG}", "entity": f"rome {LONG}".strip(), "types": ["place"]},
    "multiple-choice": {"context": "c", "question": "q", "choices": [LONG] * 4, "label": 0},
}


@pytest.mark.parametrize("task", TOO_LONG)
def test_a_row_that_does_not_fit_counts_as_missed(task, trained, tmp_path):
    data, folder, _ = trained(task)
    rows = [{key: row[key] for key in TOO_LONG[task]} for row in TASKS[task].read(files_of(task, data, "test"))[0]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, TOO_LONG[task]]))
    result = run("evaluate", task, "--model", folder, "--data", path, "--output", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(found) == len(rows)
    labels = TASKS[task].schema.labels
    right = sum(
        sorted(row["prediction"]) == sorted(row[labels]) if task == "typing" else row["prediction"] == row[labels]
        for row in found
    )
    metrics = json.loads(result.stdout)
    assert metrics["accuracy"] == pytest.approx(right / (len(rows) + 1))
    if task != "multiple-choice":
        with open(tmp_path / "per_class.csv", newline="") as file:
            table = {row["class"]: row for row in csv.DictReader(file)}
        support = sum(int(row["support"]) for row in table.values())
        correct = sum(float(row["recall"]) * int(row["support"]) for row in table.values())
        guessed = sum(len(row["prediction"]) if task == "typing" else 1 for row in found)
        assert metrics["micro_f1"] == pytest.approx(2 * correct / (guessed + support), abs=1e-3)


def test_cosmos_qa_has_the_leaderboards_file(trained):
    _, folder, _ = trained("cosmos-qa")
    predictions = [json.loads(line)["prediction"] for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert (folder / "predictions.lst").read_text().split() == [str(number) for number in predictions]


@pytest.mark.parametrize("task", ["relation", "ner", "multiple-choice"])
def test_the_mean_weights_of_the_adapters_are_recorded_and_shown(task, adapter, tmp_path):
    data, folder = write_sample(task, tmp_path / "data"), tmp_path / "model"
    flags = ("--adapters", adapter, f"second={adapter}", "--fusion", "gate", "--output_dir", str(folder))
    main([task, "--data", str(data), *flags, "--fusion_config", '{"activation": "softmax"}', *STEPS])
    assert json.loads((folder / "config.json").read_text())["fusion_config"] == {"activation": "softmax"}
    weights = json.loads((folder / "config.json").read_text())["task"]["fusion_weights"]
    model, tokenizer = load_finetuned(str(folder), TASKS[task])
    rows = TASKS[task].read_splits(str(data))["validation"]
    features = TASKS[task].encode(rows, tokenizer, labels_of(model, TASKS[task]), 64, options_of(model, TASKS[task]))
    columns = ("input_ids", "attention_mask", "subject_start", "object_start")
    found = []
    with torch.no_grad():
        for row in features:  # one by one, so that there is no padding
            inputs = {name: torch.tensor([row[name]]) for name in columns if name in row}
            output = model(**inputs, output_fusion_weights=True).fusion_weights
            found.append(torch.stack([output[name].flatten() for name in ("factual", "second")]))
    expected = torch.cat(found, dim=1).mean(dim=1).tolist()
    assert weights == pytest.approx(dict(zip(["factual", "second"], expected, strict=True)), abs=1e-4)
    assert json.loads(run("info", folder, "--json").stdout)["fusion_weights"] == weights
    assert re.search(
        f"factual █+ {weights['factual']:.2f}, second █+ {weights['second']:.2f}", run("info", folder).stdout
    )


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


@pytest.mark.parametrize("task", TASKS)
def test_rows_with_the_columns_for_data_of_ones_own_suit_models_of_every_task(task, trained):
    _, folder, _ = trained(task)
    text, subject, other, _ = FACTS[0]
    row = {"text": text, "subject": subject, "object": other, "entity": subject, "tokens": text.split()}
    row |= {"context": text, "question": "where ?", "choices": ["in rome", "in paris", "here", "there"]}
    model_class = TASKS[task].model_class
    (found,) = predict(model_class.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), [row])
    assert "prediction" in found


def test_a_model_of_another_kind_is_refused(trained):
    _, folder, _ = trained("extractive-qa")
    data, _, _ = trained("typing")
    result = run("evaluate", "typing", "--model", folder, "--data", data)
    assert result.exit_code == 1 and "is a KAdapterForQuestionAnswering" in result.output


def test_a_label_that_the_model_does_not_know_is_an_error_that_names_it(trained, tmp_path):
    _, folder, _ = trained("relation")
    (tmp_path / "a.csv").write_text("text,subject,object,label\nrome is in italy .,rome,italy,country\n")
    result = run("evaluate", "relation", "--model", folder, "--data", tmp_path / "a.csv")
    assert (
        result.exit_code == 1
        and "does not know 1 of the labels: country. It was fine-tuned on 2: birthplace" in result.output
    )


def test_a_folder_without_a_k_adapter_is_refused(backbones, trained):
    data, _, _ = trained("relation")
    for model, said in (
        (backbones["bert"], "is no K-Adapter, but a model of the type bert"),
        ("none", "'none' is neither"),
    ):
        result = run("predict", "relation", "--model", model, "--input", data / "test.csv")
        assert result.exit_code == 1 and said in result.output


def test_predictions_are_written_into_a_new_folder(trained, tmp_path):
    data, folder, _ = trained("relation")
    output = tmp_path / "new" / "found.jsonl"
    assert (
        run("predict", "relation", "--model", folder, "--input", data / "test.csv", "--output", output).exit_code == 0
    )
    assert len(output.read_text().splitlines()) == len(FACTS)


# ---- What is said before the training -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, text, said",
    [
        (
            "classification",
            "text,label\n" + "rome,city\n" * 9,
            "have 1 different labels: city; the task needs at least 2",
        ),
        (
            "typing",
            "text,entity,types\n" + "in rome,rome,[]\n" * 9,
            "have 0 different labels; the task needs at least 1",
        ),
        ("classification", "text,label\nrome,city\n", "there is only one row, too few to hold some out"),
    ],
)
def test_data_that_nothing_can_be_learned_from_is_an_error(task, text, said, adapter, tmp_path):
    (tmp_path / "data.csv").write_text(text)
    flags = ("--data", tmp_path / "data.csv", "--adapters", adapter, "--output_dir", tmp_path / "out")
    result = run("finetune", task, *flags, *STEPS)
    assert result.exit_code == 1 and said in result.output


def test_labels_that_are_not_in_training_and_a_long_warm_up_are_warned_of(adapter, tmp_path, caplog):
    (tmp_path / "train.csv").write_text("text,label\n" + "rome,city\ndante,person\n" * 4)
    (tmp_path / "test.csv").write_text("text,label\nrome,town\n")
    flags = ("--data", str(tmp_path), "--adapters", adapter, "--output_dir", str(tmp_path / "out"), *STEPS)
    main(["classification", *flags, "--warmup_steps", "500"])
    assert "1 of the labels for test do not occur in training and count as errors: town" in caplog.text
    assert "The warm-up of 500 steps is as long as the whole training (4 steps)" in caplog.text


def test_a_small_sample_keeps_all_labels_of_the_data(adapter, tmp_path):
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(f"rome,city{number}\n" for number in range(9)))
    flags = (
        "--data",
        str(tmp_path / "data.csv"),
        "--adapters",
        adapter,
        "--output_dir",
        str(tmp_path / "out"),
        *STEPS,
    )
    main(["classification", *flags, "--max_train_samples", "2", "--max_eval_samples", "1"])
    assert len(KAdapterModel.from_pretrained(tmp_path / "out").config.id2label) == 9


def test_a_source_with_several_adapters_stands_for_all_of_them(tmp_path, backbones):
    adapters = {"factual": small_adapter(), "linguistic": small_adapter()}
    KAdapterModel.from_backbone(backbones["roberta"], adapters).save_pretrained(tmp_path)
    assert named_adapters([str(tmp_path)]).keys() == {"factual", "linguistic"}
    assert named_adapters([f"linguistic={tmp_path}"]).keys() == {"linguistic"}


def test_an_unknown_metric_for_the_best_model_is_an_error_that_names_the_known_ones(trained, adapter, tmp_path):
    data, _, _ = trained("relation")
    flags = ("--data", data, "--adapters", adapter, "--output_dir", tmp_path, *STEPS[:-2])
    flags = [*map(str, flags), "--metric_for_best_model", "f1"]
    result = run("finetune", "relation", *flags)
    assert (
        result.exit_code == 2 and "relation has no metric f1, only loss, accuracy, macro_f1, micro_f1" in result.output
    )
    with pytest.raises(ValueError, match="eval_micro_f1"):
        main(["relation", *flags])


def test_the_rows_of_a_step_include_those_that_are_accumulated(tmp_path):
    flags = ["--data", "x", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    _, _, training = parser("figer").parse(flags)
    assert schedule(training) == "learning rate 5e-06, 2048 rows per device and step, 3 epochs"


def test_without_evaluation_the_last_checkpoint_is_the_model(adapter):
    flags = ["--data", "x", "--adapters", adapter, "--output_dir", "x", "--use_cpu", "true"]
    assert parser("relation").parse(flags)[2].load_best_model_at_end
    assert not parser("relation").parse([*flags, "--eval_strategy", "no"])[2].load_best_model_at_end


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--max_length", "0"], "--max_length must be at least 1, not 0"),
        (["--max_lenght", "64"], "there is no flag --max_lenght. Did you mean '--max_length'?"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, said):
    result = run("finetune", "relation", "--data", "x", "--output_dir", "x", *flags)
    assert result.exit_code == 2 and said in result.output


FROZEN = ("--freeze_backbone", "true", "--learning_rate", "1e-2")


def losses(folder) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry]


@pytest.mark.parametrize("task", ["relation", "typing", "multiple-choice", "ner"])
def test_frozen_parts_run_once_for_each_row_and_the_result_is_the_same(
    task, adapter, tmp_path, backbone_passes, monkeypatch, caplog
):
    data = write_sample(task, tmp_path / "data")
    common = (task, "--data", str(data), "--adapters", adapter, *STEPS, *FROZEN, "--logging_steps", "1")
    cached = main([*common, "--output_dir", str(tmp_path / "cached")])
    assert len(backbone_passes) == 3  # one batch of each split
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("memory", "available")(100))
    plain = main([*common, "--output_dir", str(tmp_path / "plain")])
    assert len(backbone_passes) > 10 and "The frozen parts run in every epoch" in caplog.text
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    for split, metrics in plain.items():
        assert cached[split] == pytest.approx(metrics, abs=1e-5)
    predictions = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("cached", "plain")]
    assert [json.loads(line)["prediction"] for line in predictions[0].splitlines()] == [
        json.loads(line)["prediction"] for line in predictions[1].splitlines()
    ]


@pytest.mark.parametrize("freeze_adapters", ["true", "false"])
def test_runs_with_other_seeds_share_the_states_in_a_folder(freeze_adapters, adapter, tmp_path, backbone_passes):
    data = write_sample("relation", tmp_path / "data")
    flags = ("--cache_activations", str(tmp_path / "cache"), "--freeze_adapters", freeze_adapters)
    computed = []
    for seed in ("1", "2"):
        more = ("--output_dir", str(tmp_path / seed), "--seed", seed)
        main(["relation", "--data", str(data), "--adapters", adapter, *STEPS, *FROZEN, *flags, *more])
        computed.append(len(backbone_passes))
    assert computed == [1, 1]  # the splits have the same rows


@pytest.mark.parametrize(
    ("task", "flags", "said"),
    [
        ("relation", ("--cache_activations", "cache"), "--cache_activations belongs to --freeze_backbone"),
        ("relation", (*FROZEN, "--cache_activations", "setup.cfg"), "--cache_activations must be a folder"),
        ("extractive-qa", (*FROZEN, "--cache_activations", "cache"), "whose loss counts the padding"),
    ],
)
def test_states_that_can_not_be_cached_are_an_error(task, flags, said, adapter, tmp_path):
    data = write_sample(task, tmp_path / "data")
    result = run(
        "finetune", task, "--data", data, "--adapters", adapter, "--output_dir", tmp_path / "out", *STEPS, *flags
    )
    assert result.exit_code != 0 and said in " ".join(result.stderr.split())
