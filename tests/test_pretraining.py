"""Pre-training from rows to a repository: trained parts, saved files, cached activations, interruption and bad input."""

import csv
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_same_weights, contents, free_port
from datasets import Dataset
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    RobertaConfig,
    TrainerCallback,
)
from typer.testing import CliRunner, Result

from kadapter_cli import app
from kadapter_cli._names import METRICS
from kadapter_hf import KAdapterForDependencyParsing, KAdapterForRelationClassification, KAdapterModel, pretraining
from kadapter_hf.activations import KINDS
from kadapter_hf.corpora import read_conllu
from kadapter_hf.objectives import OBJECTIVES, Objective
from kadapter_hf.pretraining import main
from kadapter_hf.rows import load_rows


DATA = Path(__file__).parent.parent / "examples" / "data"
SMALL = (
    *("--adapter_hidden_size", "16", "--adapter_num_attention_heads", "2", "--adapter_intermediate_size", "24"),
    *("--adapter_num_hidden_layers", "1", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"),
    *("--learning_rate", "1e-2", "--dataloader_pin_memory", "false", "--logging_steps", "1"),
)


def small_without(*names: str) -> list[str]:
    """The flags of `SMALL` without some of them."""
    pairs = zip(SMALL[::2], SMALL[1::2], strict=True)
    return [word for name, value in pairs if name not in names for word in (name, value)]


def fact(subject: str, relation: str, other: str) -> dict:
    start = len(f"{subject} is {relation} ")
    spans = {"subject": [0, len(subject)], "object": [start, start + len(other)]}
    return {"text": f"{subject} is {relation} {other} .", "relation": relation} | spans


FACTS = [
    fact(subject, relation, other)
    for subject in ("rome", "paris", "vienna", "berlin")
    for other in ("italy", "france", "austria")
    for relation in ("by", "in", "of")
]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "facts.jsonl", FACTS)


def run(objective: str, data: str, backbone: str, output: Path, *flags: str) -> dict[str, float]:
    return main([objective, "--data", data, "--backbone", backbone, "--output_dir", str(output), *SMALL, *flags])


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def factual(facts, backbone, tmp_path_factory) -> Path:
    """A factual adapter's repository."""
    output = tmp_path_factory.mktemp("factual")
    run("factual", facts, backbone, output, "--max_steps", "12")
    return output


# ---- What comes out -------------------------------------------------------------------------------------------------


def test_the_adapter_learns_and_the_backbone_stays_as_it_was_bit_for_bit(factual, backbone):
    model = KAdapterModel.from_pretrained(factual)
    assert_same_weights(model.backbone, AutoModel.from_pretrained(backbone, add_pooling_layer=False))
    assert not (factual / "backbone.safetensors").exists()
    assert sum(losses(factual)[-4:]) < sum(losses(factual)[:4])


def test_the_repository_says_where_the_knowledge_came_from(factual, facts):
    provenance = KAdapterModel.from_pretrained(factual).config.knowledge_adapters["factual"].provenance
    assert (provenance["objective"], provenance["corpus"]) == ("factual", Path(facts).name)
    assert (provenance["rows"], provenance["held_out_rows"], provenance["labels"]) == (32, 4, 3)
    assert provenance["seed"] == 42 and set(provenance["metrics"]) == {
        "eval_loss",
        *(f"eval_{name}" for name in METRICS["factual"]),
    }
    assert provenance["versions"]["transformers"] and provenance["command"]


def test_the_head_is_there_for_evaluation_and_left_behind_when_the_adapter_is_loaded(factual, build):
    whole = KAdapterForRelationClassification.from_pretrained(factual)
    assert whole.config.id2label == {0: "by", 1: "in", 2: "of"}
    other = build(KAdapterForRelationClassification, adapters=[], num_labels=5)
    assert other.load_knowledge_adapter(factual) == "factual"
    assert other.out_proj.out_features == 5
    assert_same_weights(other.adapters, whole.adapters)


def test_beside_the_adapter_are_its_tokenizer_training_curve_and_trainers_state(factual):
    assert AutoTokenizer.from_pretrained(factual)("rome")["input_ids"]
    assert (factual / "training.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((factual / "trainer_state.json").read_text())["global_step"] == 12


@pytest.mark.skipif(torch.cuda.is_available(), reason="the run would use the GPU")
def test_a_run_on_the_cpu_gives_no_warnings(facts, backbone, tmp_path):
    small = small_without("--dataloader_pin_memory", "--use_cpu")
    flags = ["--data", facts, "--backbone", backbone, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    flags += ["--cache_activations", str(tmp_path / "cache")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main(["factual", *flags, *small])


def test_without_flags_the_training_curve_has_many_points(facts, backbone, tmp_path):
    small = small_without("--logging_steps")
    flags = ["--data", facts, "--backbone", backbone, "--output_dir", str(tmp_path), "--num_train_epochs", "10"]
    main(["factual", *flags, *small])
    assert len(losses(tmp_path)) == 10  # each of the steps, as there are fewer than 50


def test_a_linguistic_adapter_learns_heads_and_relations(backbone, tmp_path):
    trees, _ = read_conllu(DATA / "trees.conllu")
    trees.select(range(20)).to_parquet(tmp_path / "trees.parquet")
    metrics = run("linguistic", str(tmp_path / "trees.parquet"), backbone, tmp_path / "out", "--max_steps", "3")
    assert (
        {"eval_uas", "eval_las"} <= set(metrics) <= {"eval_loss", *(f"eval_{name}" for name in METRICS["linguistic"])}
    )
    assert KAdapterForDependencyParsing.from_pretrained(tmp_path / "out").config.knowledge_adapters.keys() == {
        "linguistic"
    }


def test_an_objective_of_ones_own_takes_a_few_lines(facts, backbone, tmp_path, monkeypatch):
    typed = OBJECTIVES["factual"]
    own = Objective(
        typed.features, typed.model_class, DataCollatorWithPadding, schema=typed.schema
    )  # without a metric
    monkeypatch.setitem(OBJECTIVES, "geography", own)
    metrics = run("geography", facts, backbone, tmp_path / "out", "--max_steps", "1", "--name", "maps")
    assert set(metrics) == {"eval_loss"}
    assert list(KAdapterModel.from_pretrained(tmp_path / "out").adapters) == ["maps"]


# ---- Cached states -------------------------------------------------------------------------------------------------


def test_with_cached_states_the_losses_are_the_same_and_the_backbone_runs_once(
    factual, facts, backbone, tmp_path, backbone_passes
):
    flags = ("--max_steps", "12", "--cache_activations", str(tmp_path / "cache"))
    run("factual", facts, backbone, tmp_path / "out", *flags)
    assert losses(tmp_path / "out") == pytest.approx(losses(factual), abs=1e-6)
    assert backbone_passes == [32, 4]
    before = contents(tmp_path / "cache")
    run("factual", facts, backbone, tmp_path / "again", *flags)
    assert backbone_passes == [32, 4] and contents(tmp_path / "cache") == before


def test_states_are_computed_for_the_rows_that_are_used_only(facts, backbone, tmp_path):
    used = {}
    for name, flags in {
        "steps": ("--max_steps", "2", "--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2"),
        "samples": ("--max_steps", "2", "--max_train_samples", "5", "--max_eval_samples", "1"),
    }.items():
        run(
            "factual",
            facts,
            backbone,
            tmp_path / name,
            *flags,
            *("--cache_activations", str(tmp_path / f"{name}-cache"), "--backbone_dtype", "float32"),
        )
        provenance = KAdapterModel.from_pretrained(tmp_path / name).config.knowledge_adapters["factual"].provenance
        used[name] = (provenance["rows"], provenance["held_out_rows"], provenance["labels"])
    assert used == {"steps": (12, 4, 3), "samples": (5, 1, 3)}
    # 11 tokens in each row: three states of each, and the last at the two markers, 32 wide, in float32.
    sizes = {kind: {file.stat().st_size for file in tmp_path.glob(f"steps-cache/*/{kind}.bin")} for kind in KINDS}
    assert sizes == {
        "backbone_states": {rows * 11 * 3 * 32 * 4 for rows in (12, 4)},
        "fusion_states": {12 * 256, 4 * 256},
    }


# ---- Interrupted and resumed ----------------------------------------------------------------------------------------


class InterruptAtStep(TrainerCallback):
    """Sends this process SIGINT, like Ctrl-C, during training."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("cache", [False, True], ids=["", "cached"])
def test_ctrl_c_leaves_a_checkpoint_from_which_training_ends_with_the_same_weights(
    facts, backbone, tmp_path, monkeypatch, cache
):
    flags = ("--max_steps", "5", "--save_strategy", "no")
    flags += ("--cache_activations", str(tmp_path / "cache")) if cache else ()
    run("factual", facts, backbone, tmp_path / "whole", *flags)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        init = pretraining.Trainer.__init__
        patch.setattr(
            pretraining.Trainer,
            "__init__",
            lambda self, *args, callbacks, **kwargs: init(
                self, *args, callbacks=[*callbacks, InterruptAtStep()], **kwargs
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            run("factual", facts, backbone, tmp_path / "parts", *flags)
    assert (tmp_path / "parts" / "checkpoint-3").is_dir()
    assert signal.getsignal(signal.SIGINT) is handler
    run("factual", facts, backbone, tmp_path / "parts", *flags, "--resume_from_checkpoint", "true")
    whole, parts = (KAdapterForRelationClassification.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert_same_weights(parts, whole)


def test_ctrl_c_among_the_activations_says_so_and_speaks_of_no_checkpoint(facts, backbone, tmp_path, interrupt_at):
    interrupt_at(1)
    flags = ["--data", facts, "--backbone", backbone, "--output_dir", tmp_path / "out", "--max_steps", "1", *SMALL]
    done = invoke("pretrain", "factual", *map(str, flags), "--cache_activations", str(tmp_path / "cache"))
    assert done.exit_code == 130
    assert "Stopped with the frozen states of 0 of " in done.stderr and "checkpoint" not in done.stderr


def start(data: str, backbone: str, output: Path, *flags: str, command: tuple[str, ...] = ("-c",)) -> subprocess.Popen:
    """Pre-training in one or several separate processes, which can be killed together."""
    script = "import sys; from kadapter_hf.pretraining import main; main(sys.argv[1:])"
    if command != ("-c",):
        (output.parent / "pretrain.py").write_text(script)
        script = str(output.parent / "pretrain.py")
    arguments = ["factual", "--data", data, "--backbone", backbone, "--output_dir", str(output), *SMALL, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command, script, *arguments], env=environment, start_new_session=True)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(facts, backbone, tmp_path):
    flags = ("--max_steps", "40", "--save_steps", "2")
    assert start(facts, backbone, tmp_path / "whole", *flags).wait() == 0
    process = start(facts, backbone, tmp_path / "parts", *flags)
    while not list((tmp_path / "parts").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "parts" / "config.json").exists()
    resumed = start(facts, backbone, tmp_path / "parts", *flags, "--resume_from_checkpoint", "true")
    assert resumed.wait() == 0
    whole, parts = (KAdapterForRelationClassification.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert_same_weights(parts, whole)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(facts, backbone, tmp_path):
    flags = ("--max_steps", "6", "--dropout", "0", "--optim", "sgd", "--learning_rate", "0.1")
    one = start(facts, backbone, tmp_path / "one", *flags, "--per_device_train_batch_size", "8")
    assert one.wait() == 0
    launch = (
        "-m",
        "accelerate.commands.launch",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    )
    launch += ("--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port()))
    two = start(facts, backbone, tmp_path / "two", *flags, "--per_device_train_batch_size", "4", command=launch)
    assert two.wait() == 0
    one, two = (KAdapterForRelationClassification.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def test_an_earlier_runs_checkpoint_is_neither_used_nor_replaced_unasked(factual, facts, backbone):
    before = contents(factual)
    with pytest.raises(ValueError, match="--resume_from_checkpoint true, replace it with --overwrite_output_dir, or"):
        run("factual", facts, backbone, factual, "--max_steps", "4")
    assert contents(factual) == before


def test_an_earlier_runs_adapter_is_not_replaced_unasked(facts, backbone, tmp_path):
    run("factual", facts, backbone, tmp_path, "--max_steps", "1", "--save_strategy", "no")
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match="has the results of an earlier run: replace it with --overwrite_output_dir, or"
    ):
        run("factual", facts, backbone, tmp_path, "--max_steps", "1", "--save_strategy", "no")
    assert contents(tmp_path) == before


def test_overwriting_replaces_the_adapter_and_removes_old_checkpoints(facts, backbone, tmp_path):
    run("factual", facts, backbone, tmp_path, "--max_steps", "4", "--save_steps", "4")
    run("factual", facts, backbone, tmp_path, "--max_steps", "2", "--save_steps", "2", "--overwrite_output_dir")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2


# ---- Defaults -------------------------------------------------------------------------------------------------------


def chosen(objective: str, width: int, folder: Path, *flags: str) -> tuple[float, int, float]:
    """The learning rate, batch size and number of epochs for a backbone of this width, of which there are no weights."""
    RobertaConfig(hidden_size=width, num_attention_heads=16).save_pretrained(folder)
    required = ["--data", "x", "--output_dir", "y", "--backbone", str(folder)]
    _, training = pretraining.parser(objective).parse([*required, *flags])
    return training.learning_rate, training.per_device_train_batch_size, training.num_train_epochs


@pytest.mark.parametrize(
    ("objective", "width", "expected"),
    [
        ("factual", 768, (5e-4, 32, 3)),
        ("factual", 1024, (2e-5, 128, 5)),
        ("linguistic", 768, (1e-3, 32, 3)),
        ("linguistic", 1024, (1e-5, 256, 10)),
    ],
)
def test_a_large_backbone_has_the_papers_defaults(objective, width, expected, tmp_path):
    assert chosen(objective, width, tmp_path) == expected


def test_flags_win_over_the_defaults_of_a_large_backbone(tmp_path):
    flags = ("--learning_rate", "1e-4", "--num_train_epochs=2")
    assert chosen("factual", 1024, tmp_path, *flags) == (1e-4, 128, 2)


def test_the_first_line_says_how_the_adapter_is_trained(facts, backbone, tmp_path):
    flags = ["--data", facts, "--backbone", backbone, "--output_dir", str(tmp_path), *small_without("--learning_rate")]
    done = invoke("pretrain", "factual", *flags, "--num_train_epochs", "1")
    said = f"Training on the backbone {backbone}: learning rate 0.0005, 32 rows per device and step, 1 epoch."
    assert done.stdout.splitlines()[0] == said


# ---- Bad input ------------------------------------------------------------------------------------------------------


def refused(rows: list[dict], backbone: str, tmp_path: Path, objective: str = "factual") -> str:
    with pytest.raises(ValueError) as error:
        run(objective, write_rows(tmp_path / "rows.jsonl", rows), backbone, tmp_path / "out", "--max_steps", "1")
    assert not (tmp_path / "out" / "config.json").exists()
    return str(error.value)


def test_one_relation_only_is_refused(backbone, tmp_path):
    rows = [row for row in FACTS if row["relation"] == "in"]
    assert "only the label ['in']" in refused(rows, backbone, tmp_path)


def test_an_error_quotes_little_of_the_rows(backbone, tmp_path):
    assert len(refused([row | {"relation": "x" * 100_000} for row in FACTS], backbone, tmp_path)) < 1000


def test_a_backbone_without_a_tokenizer_is_refused(facts, tmp_path):
    AutoModel.from_config(TINY["roberta"]).save_pretrained(tmp_path / "backbone")
    with pytest.raises(OSError, match="backbone' has no tokenizer: save one there"):
        run("factual", facts, str(tmp_path / "backbone"), tmp_path / "out", "--max_steps", "1")


def test_an_empty_corpus_is_refused(backbone, tmp_path):
    assert "rows.jsonl" in refused([], backbone, tmp_path)


def test_a_backbone_that_is_nowhere_is_named(facts, tmp_path):
    with pytest.raises(OSError, match="the backbone 'nix/da' can't be loaded"):
        run("factual", facts, "nix/da", tmp_path / "out")


def test_an_unknown_objective_is_refused(backbone, tmp_path):
    assert "there is no objective 'factul'; there are ['factual'" in refused(FACTS, backbone, tmp_path, "factul")


def test_a_missing_column_is_named(tmp_path):
    Dataset.from_list([{"text": "a b", "subject": [0, 1]}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="missing: object, relation"):
        load_rows(str(tmp_path / "rows.parquet"), OBJECTIVES["factual"].schema)


def test_rows_that_break_the_schema_are_left_out_and_named(tmp_path, caplog):
    bad = FACTS[0] | {"subject": [0, 999]}
    Dataset.from_list([*FACTS[:5], bad]).to_parquet(tmp_path / "train.parquet")
    rows = load_rows(str(tmp_path), OBJECTIVES["factual"].schema)["train"]
    assert rows["text"][:] == [row["text"] for row in FACTS[:5]]
    assert "dropped rows: 1 × " in caplog.text and "row 5" in caplog.text


def test_held_out_rows_with_a_label_that_training_lacks_are_left_out(backbone, tmp_path, caplog):
    Dataset.from_list(FACTS[:12]).to_parquet(tmp_path / "train.parquet")
    odd = [row | {"relation": f"above{'x' * 100_000}"} for row in FACTS[12:15]]
    Dataset.from_list([*FACTS[12:18], *odd]).to_parquet(tmp_path / "test.parquet")
    run("factual", str(tmp_path), backbone, tmp_path / "out", "--max_steps", "2")
    provenance = KAdapterModel.from_pretrained(tmp_path / "out").config.knowledge_adapters["factual"].provenance
    assert (provenance["rows"], provenance["held_out_rows"]) == (12, 6)
    assert "3 held-out rows are dropped" in caplog.text and len(caplog.text) < 1000


# ---- Formats --------------------------------------------------------------------------------------------------------


def as_csv(rows: list[dict], delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow({name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in row.items()})
    return text.getvalue()


FORMATS = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "json": lambda rows: json.dumps(rows, indent=1),
    "csv": lambda rows: as_csv(rows, ","),
    "tsv": lambda rows: as_csv(rows, "\t"),
}
TREES = [{"text": "Sit !", "tokens": ["Sit", "!"], "heads": [0, 1], "labels": ["root", "punct"]}] * 2
TYPED = [{"text": "Rome, Italy", "entity": [0, 4], "types": ["city", "place"]}] * 2


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(("objective", "rows"), [("factual", FACTS), ("linguistic", TREES), ("typing", TYPED)])
def test_each_schema_is_read_from_each_format_in_a_file_and_in_a_folder(objective, rows, ending, write_file):
    file = write_file(FORMATS[ending](rows), f"rows.{ending}")
    folder = write_file(FORMATS[ending](rows), f"folder/train-0.{ending}").parent
    write_file(FORMATS[ending](rows[:1]), f"folder/train-1.{ending}")
    write_file(FORMATS[ending](rows[1:]), f"folder/dev.{ending}")
    schema = OBJECTIVES[objective].schema
    assert list(load_rows(str(file), schema)["train"]) == rows
    assert {name: list(split) for name, split in load_rows(str(folder), schema).items()} == {
        "train": rows + rows[:1],
        "validation": rows[1:],
    }


@pytest.mark.parametrize("ending", FORMATS)
def test_without_a_schema_each_format_keeps_its_columns(ending, write_file):
    rows = [{"title": "the river", "number": 1}, {"title": "the city", "number": 2}]
    assert list(load_rows(str(write_file(FORMATS[ending](rows), f"rows.{ending}")), None)["train"]) == rows


def test_rows_are_read_from_a_folder_of_save_to_disk(tmp_path):
    Dataset.from_list(FACTS).save_to_disk(tmp_path / "saved")
    assert list(load_rows(str(tmp_path / "saved"), OBJECTIVES["factual"].schema)["train"]) == FACTS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.txt", "a", r"rows.txt' is of an unknown format; known ones are .parquet, .jsonl, .csv, .tsv, .json"),
        ("rows/a.txt", "a", r"rows' has no file of a known format"),
        ("rows.csv", "text,subject\na,b\n", r"rows.csv: the relation schema has .*missing: object, relation"),
        ("rows.csv", "text,subject,object,relation\na b,0-1,2-3,r\n", r"1 × subject is not \[start, end\] \(line 2\)"),
        ("rows.tsv", b"text\tsubject\tobject\trelation\n\xff\n", "rows.tsv is not UTF-8"),
        ("rows.json", "[1, 2]", r"2 × not a JSON object \(row 1, row 2\)"),
        ("rows/dev.csv", as_csv(FACTS, ","), r"rows' has no split named train; it has \['validation'\]"),
    ],
)
def test_what_can_not_be_read_is_named(name, content, said, write_file, tmp_path):
    write_file(content, name)
    with pytest.raises(ValueError, match=said):
        load_rows(str(tmp_path / name.split("/")[0]), OBJECTIVES["factual"].schema)


def test_a_source_that_is_nowhere_is_named():
    with pytest.raises(ValueError, match="'fewrell' is neither a local file or folder nor a data set on the Hub"):
        load_rows("fewrell", OBJECTIVES["factual"].schema)


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub():
    with pytest.raises(ValueError, match="there is no file 'triples.csv'"):
        load_rows("triples.csv", OBJECTIVES["factual"].schema)


# ---- Missing packages -----------------------------------------------------------------------------------------------


def test_scikit_learn_is_looked_for_before_the_training(facts, backbone, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*kadapter-hf\[knowledge\]"):
        run("factual", facts, backbone, tmp_path / "out", "--max_steps", "1")
    assert not (tmp_path / "out").exists()


def test_a_package_for_report_to_is_looked_for_before_the_data(backbone, tmp_path):
    if importlib.util.find_spec("comet_ml"):
        pytest.skip("comet_ml is installed")
    with pytest.raises(ImportError, match="--report_to: .*comet"):
        run("factual", "nowhere", backbone, tmp_path / "out", "--report_to", "comet_ml")


def test_without_matplotlib_there_is_an_adapter_and_no_figure(facts, backbone, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run("factual", facts, backbone, tmp_path / "out", "--max_steps", "1")
    assert caplog.records[0].message.startswith("training.png is left out, as a figure needs matplotlib: pip install ")
    assert KAdapterModel.from_pretrained(tmp_path / "out").active_knowledge_adapters == ["factual"]
    assert not (tmp_path / "out" / "training.png").exists()


def test_held_out_rows_without_a_label_of_the_training_are_refused_as_such(backbone, tmp_path):
    Dataset.from_list(FACTS[:12]).to_parquet(tmp_path / "train.parquet")
    Dataset.from_list([row | {"relation": "above"} for row in FACTS]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="no held-out row is left, as their labels don't occur in training. Use more"):
        run("factual", str(tmp_path), backbone, tmp_path / "out", "--max_steps", "1")


def test_several_data_sets_are_joined_by_split(facts, backbone, tmp_path):
    Dataset.from_list(FACTS[:12]).to_parquet(tmp_path / "maps" / "train.parquet")
    Dataset.from_list(FACTS[12:18]).to_parquet(tmp_path / "maps" / "test.parquet")
    flags = ["--data", facts, str(tmp_path / "maps"), "--backbone", backbone, "--output_dir", str(tmp_path / "out")]
    main(["factual", *flags, *SMALL, "--num_train_epochs", "1"])
    provenance = KAdapterModel.from_pretrained(tmp_path / "out").config.knowledge_adapters["factual"].provenance
    assert (provenance["rows"], provenance["held_out_rows"]) == (len(FACTS) + 12, 6)
    assert provenance["corpus"] == f"{Path(facts).name}, maps" and "dataset" not in provenance


# ---- The command ----------------------------------------------------------------------------------------------------


def kadapter(*arguments: str) -> subprocess.CompletedProcess:
    """Runs the command in a separate process."""
    command = [sys.executable, "-c", "from kadapter_cli import app; app(prog_name='kadapter')", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def invoke(*arguments: str) -> Result:
    """Runs the command in this process."""
    return CliRunner().invoke(app, arguments, prog_name="kadapter", env={"COLUMNS": "200"})


def test_the_command_trains_and_combines_and_both_adapters_give_what_each_gave_alone(
    factual, facts, backbone, tmp_path
):
    flags = ["--data", facts, "--backbone", backbone, "--output_dir", str(tmp_path / "maps"), "--name", "maps"]
    done = kadapter("pretrain", "factual", *flags, *SMALL, "--max_steps", "2", "--seed", "7")
    assert done.returncode == 0, done.stderr
    assert "micro_f1: " in done.stdout
    said = f"The adapter 'maps' is in {tmp_path / 'maps'}. Fine-tune with it: `kadapter finetune TASK --data DATA "
    assert done.stdout.splitlines()[-1] == f"{said}--adapters {tmp_path / 'maps'} --output_dir MODEL`."
    combined = invoke("combine", str(factual), str(tmp_path / "maps"), "--output", str(tmp_path / "both"))
    assert combined.exit_code == 0, combined.output
    both = KAdapterModel.from_pretrained(tmp_path / "both")
    inputs = {"input_ids": torch.tensor([[0, 7, 8, 9, 2]])}
    with torch.no_grad():
        together = both(**inputs).knowledge_states
        for name, folder in (("factual", factual), ("maps", tmp_path / "maps")):
            alone = KAdapterModel.from_pretrained(folder)(**inputs).knowledge_states
            assert torch.equal(together[name], alone[name])


def test_help_teaches_with_an_example_and_lists_trainers_flags_for_each_objective():
    done = invoke("pretrain", "--help")
    assert done.exit_code == 0 and "Example: kadapter pretrain factual --data" in " ".join(done.stdout.split())
    for objective in OBJECTIVES:
        done = invoke("pretrain", objective, "--help")
        assert done.exit_code == 0 and "--cache_activations" in done.stdout and "--num_train_epochs" in done.stdout


def test_each_objective_has_defaults_of_its_own_which_help_shows():
    rates = {}
    for objective in OBJECTIVES:
        said = " ".join(invoke("pretrain", objective, "--help").stdout.split())
        rates[objective] = re.search(r"--learning-rate LEARNING_RATE .*?\(default: (.*?)\)", said)[1]
        assert "For a backbone of width 1024 or more, the default is " in said
    assert rates == {"factual": "0.0005", "linguistic": "0.001", "typing": "0.0005"}


def test_wrong_arguments_say_what_was_expected(tmp_path):
    done = invoke("pretrain", "factul", "--data", "x", "--output_dir", str(tmp_path))
    assert done.exit_code == 2 and "'factul' is not one of factual, linguistic" in done.stderr
    done = invoke("combine", str(tmp_path), "--output", str(tmp_path / "out"))
    assert done.exit_code == 1 and "has no knowledge adapter: " in done.stderr


def test_a_missing_flag_is_named_and_ends_the_process_with_exit_code_2():
    done = kadapter("pretrain", "factual")
    assert done.returncode == 2 and "required: --data, --output_dir" in done.stderr
