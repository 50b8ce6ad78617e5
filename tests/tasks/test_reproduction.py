"""The comparison of models over tasks and seeds: what is run, what is not run again, and the tables."""

import csv
import json
import re

import pytest
from conftest import small_adapter
from samples import write_sample
from typer.testing import CliRunner

from kadapter_cli import app
from kadapter_hf import KAdapterForMaskedLM, KAdapterModel
from kadapter_hf.reproduction import parser, planned, published_names, write_tables


FLAGS = (
    *("--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"),
    *("--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true", "--max_length", "64"),
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, backbones):
    """The flags of a comparison, and the result of running it."""
    folder = tmp_path_factory.mktemp("comparison")
    for name in ("factual", "linguistic"):
        model = KAdapterModel.from_backbone(backbones["roberta"], {name: small_adapter()})
        model.save_pretrained(folder / name)
    data = [f"{task}={write_sample(task, folder / task)}" for task in ("open-entity", "cosmos-qa")]
    adapters = [str(folder / name) for name in ("factual", "linguistic")]
    flags = [
        "reproduce",
        "--output_dir",
        str(folder / "runs"),
        "--seeds",
        "1",
        "2",
        "--data",
        *data,
        "--adapters",
        *adapters,
    ]
    flags += ["--models", "backbone", "untrained", "factual+linguistic", *FLAGS]
    return flags, folder / "runs", CliRunner().invoke(app, flags)


def test_each_task_model_and_seed_has_a_run(compared):
    _, folder, result = compared
    assert result.exit_code == 0, result.output
    found = {path.parent.relative_to(folder).as_posix() for path in folder.rglob("metrics.json")}
    assert found == {
        f"{task}/{model}/seed-{seed}"
        for task in ("open-entity", "cosmos-qa")
        for model in ("backbone", "untrained", "factual+linguistic")
        for seed in (1, 2)
    }


def test_the_models_differ_in_their_adapters_alone(compared):
    _, folder, _ = compared
    adapters = {}
    for model in ("backbone", "untrained", "factual+linguistic"):
        config = json.loads((folder / "open-entity" / model / "seed-1" / "config.json").read_text())
        adapters[model] = config["knowledge_adapters"]
    assert adapters["backbone"] == {}
    assert set(adapters["untrained"]) == {"untrained1", "untrained2"}
    assert set(adapters["factual+linguistic"]) == {"factual", "linguistic"}
    sizes = {
        name: [of_one[name] for part in adapters.values() for of_one in part.values()] for name in ("hidden_size",)
    }
    assert set(sizes["hidden_size"]) == {16}


def test_the_table_has_the_mean_the_deviation_and_the_papers_figure(compared):
    _, folder, result = compared
    with open(folder / "results.csv", newline="") as file:
        rows = {(row["task"], row["model"]): row for row in csv.DictReader(file)}
    both = rows["open-entity", "factual+linguistic"]
    values = [
        100
        * json.loads((folder / f"open-entity/factual+linguistic/seed-{seed}/metrics.json").read_text())["test"][
            "micro_f1"
        ]
        for seed in (1, 2)
    ]
    assert float(both["mean"]) == pytest.approx(sum(values) / 2, abs=0.01)
    assert float(both["standard_deviation"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=0.01)
    assert (both["paper"], rows["open-entity", "backbone"]["paper"]) == ("77.61", "76.23")
    assert rows["open-entity", "untrained"]["paper"] == "76.17" and rows["cosmos-qa", "untrained"]["paper"] == ""
    row = (
        r"\| open-entity \| micro f1 \| factual\+linguistic \| 2 \| \d+\.\d ± \d+\.\d+ \| 77\.61 \| 76\.0 to 76\.2 \|"
    )
    assert re.search(row, result.output)
    assert (folder / "results.png").exists()


@pytest.fixture(scope="module")
def probed(compared, backbones):
    """The flags of a comparison on LAMA with the paper's protocol, its folder, and the result of running it."""
    folder = compared[1].parent
    (folder / "lama" / "TREx").mkdir(parents=True)
    (folder / "lama" / "relations.jsonl").write_text(
        '{"relation": "P36", "template": "the capital of [X] is [Y] ."}\n'
    )
    facts = {"italy": "rome", "france": "paris", "austria": "vienna"}
    lines = [json.dumps({"sub_label": country, "obj_label": city}) for country, city in facts.items()]
    (folder / "lama" / "TREx" / "P36.jsonl").write_text("\n".join(lines))
    text = folder / "text.txt"
    text.write_text("the capital of france is paris .\nthe cat sat on the mat .\n")
    flags = ["reproduce", "--data", f"lama={folder / 'lama'}", "--output_dir", str(folder / "probes")]
    flags += ["--adapters", str(folder / "factual"), str(folder / "linguistic"), "--multitask", backbones["roberta"]]
    flags += ["--probe_flags", f"--protocol new-head --train_text {text} --epochs 1"]
    return flags, folder / "probes", CliRunner().invoke(app, flags)


def test_lama_is_one_of_the_tasks(probed):
    _, folder, result = probed
    assert result.exit_code == 0, result.output
    with open(folder / "results.csv", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["backbone", "multitask", "untrained", "factual", "linguistic", "factual+linguistic"]
    assert {(row["task"], row["metric"], row["runs"]) for row in rows.values()} == {("lama TREx", "P@1", "1")}
    assert {model: row["paper"] for model, row in rows.items() if row["paper"]} == {
        "backbone": "27.1",
        "factual": "29.1",
    }


def test_lama_runs_are_those_of_the_probe(probed, backbones, tmp_path):
    flags, folder, _ = probed
    model = KAdapterForMaskedLM.from_backbone(backbones["roberta"], {"factual": str(folder.parent / "factual")})
    model.save_pretrained(tmp_path / "model")
    own = ["--model", str(tmp_path / "model"), "--data", str(folder.parent / "lama"), "--json"]
    result = CliRunner().invoke(app, ["probe", *own, *flags[-1].split()])
    expected = json.loads(result.stdout)["relations"][0]
    found = {
        model: json.loads((folder / "lama" / model / "seed-42" / "metrics.json").read_text())["relations"][0]
        for model in ("backbone", "factual")
    }
    assert found["backbone"]["backbone"] == expected["backbone"]
    assert found["factual"]["kadapter"] == expected["kadapter"]


def test_a_bad_file_of_a_later_task_is_reported_before_the_first_run(compared, tmp_path):
    flags, folder, _ = compared
    bad = tmp_path / "lama.jsonl"
    bad.write_text("no JSON")
    first = flags[flags.index("--data") + 1]
    others = ["--output_dir", str(tmp_path / "runs"), "--data", first, f"lama={bad}"]
    result = CliRunner().invoke(app, [*flags, *others])
    assert result.exit_code == 1 and f"{bad}, line 1 is not JSON." in result.output
    assert "Run " not in result.output


def test_finished_runs_are_not_repeated(compared):
    flags, folder, _ = compared
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.json")}
    changed = folder / "open-entity" / "backbone" / "seed-2" / "metrics.json"
    changed.unlink()
    for path in changed.parent.iterdir():
        path.unlink()
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0 and "Run 2 of 12: open-entity, backbone, seed 2" in result.output
    assert result.output.count("Run ") == 1
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.json")}
    assert {path for path in before if before[path] != after[path]} == {changed}


def test_a_damaged_adapter_is_reported_before_the_first_run(compared, tmp_path):
    flags, folder, _ = compared
    damaged = tmp_path / "linguistic.safetensors"
    content = bytearray((folder.parent / "linguistic" / "adapters" / "linguistic.safetensors").read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    others = ["--output_dir", str(tmp_path / "runs"), "--adapters", str(folder.parent / "factual"), str(damaged)]
    result = CliRunner().invoke(app, [*flags, *others])
    assert result.exit_code == 1 and f"'{damaged}' does not hold what was saved" in result.output
    assert "Run " not in result.output


def test_tables_are_replaced_whole(compared, tmp_path):
    """Whoever reads one meanwhile, e.g. another process, has all of the earlier one."""
    arguments, flags = parser().parse_known(compared[0][1:])
    runs, names = planned(arguments, flags), published_names(arguments)
    write_tables(runs, names, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results.md", "results.png"}
    for name in ("results.csv", "results.md"):
        before = (tmp_path / name).read_text()
        with open(tmp_path / name) as file:
            write_tables(runs[:2], names, tmp_path)
            assert file.read() == before != (tmp_path / name).read_text()
        write_tables(runs, names, tmp_path)


def test_weights_of_finished_runs_are_deleted(compared):
    assert not list(compared[1].rglob("*.safetensors"))


@pytest.mark.parametrize(
    "flags, said, code",
    [
        (["--models", "linguist"], "there are backbone, untrained, factual, linguistic, factual+linguistic", 1),
        (["--data", "open-entity"], "--data takes TASK=SOURCE, but there is no source for 'open-entity'", 2),
        (["--data", "open-entitty=x"], "Did you mean 'open-entity'?", 2),
        (["--data", "lama=x"], "--max_steps 2", 1),
        (["--probe_flags", "--protocol fusion"], "--probe_flags are for lama, which is not among the tasks", 2),
    ],
)
def test_wrong_flags_are_one_sentence(flags, said, code, compared):
    result = CliRunner().invoke(app, [*compared[0], *flags])
    assert result.exit_code == code and said in result.output
