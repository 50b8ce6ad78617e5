"""Fine-tuning on data sets on the Hub, over HTTP: one process with an empty cache runs all commands."""

import io
import json
from pathlib import Path

import pytest
from conftest import small_adapter
from datasets import ClassLabel, Dataset, Features, Value
from hub_server import HubServer
from test_hub_cli import COMMANDS, Done

from kadapter_hf import KAdapterModel


FACTS = [
    ("rome is the capital city of italy .", "rome", "italy", "capital"),
    ("paris is the capital city of france .", "paris", "france", "capital"),
    ("dante was born in rome .", "dante", "rome", "birthplace"),
    ("mozart was born in vienna .", "mozart", "vienna", "birthplace"),
]
NAMES = ["birthplace", "capital"]
REFUSALS = {  # by repository, what the error says
    "user/nowhere": "'user/nowhere' is neither a local file or folder nor a data set on the Hub that can be loaded",
    "user/secret": "'user/secret' is neither a local file or folder nor a data set on the Hub that can be loaded",
    "user/empty": "'user/empty' is neither a local file or folder nor a data set on the Hub that can be loaded",
    "user/bad": "split 'train', row 2: the subject 'madrid' does not occur in the text",
    "user/test-only": "'user/test-only' has no split named train; it has test.",
}


def table(rows=FACTS) -> bytes:
    return "".join(f"{','.join(row)}\n" for row in [("sentence", "head", "tail", "label"), *rows]).encode()


def parquet() -> bytes:
    """The facts with their relations as numbers, as in most data sets for classification."""
    features = Features({name: Value("string") for name in ("sentence", "head", "tail")})
    columns = dict(zip(features, zip(*FACTS, strict=True), strict=False))
    columns["label"] = [NAMES.index(label) for *_, label in FACTS]
    file = io.BytesIO()
    Dataset.from_dict(columns, features=Features({**features, "label": ClassLabel(names=NAMES)})).to_parquet(file)
    return file.getvalue()


@pytest.fixture(scope="module")
def done(backbone, tmp_path_factory) -> tuple[Path, dict[str, Done]]:
    """The folder with a run for each data set, in a folder of its name, and the results of the commands."""
    folder = tmp_path_factory.mktemp("hub-data")
    KAdapterModel.from_backbone(backbone, {"factual": small_adapter()}).save_pretrained(folder / "factual")
    flags = ["--adapters", str(folder / "factual"), "--max_steps", "1", "--max_length", "64", "--use_cpu", "true"]
    flags += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    with HubServer() as hub:
        hub.put("user/facts", {f"{name}.csv": table() for name in ("train", "dev", "test")})
        hub.put("user/classes", {"data/train-00000-of-00001.parquet": parquet()})
        hub.put("user/secret", {"train.csv": table()}, private=True)
        hub.put("user/empty", {"README.md": b"Nothing yet."})
        hub.put("user/bad", {"train.csv": table([FACTS[0], ("paris is old .", "madrid", "old", "capital")])})
        hub.put("user/test-only", {"test.csv": table()})
        names = ["user/facts", "user/classes", *REFUSALS]
        runs = [
            ["finetune", "relation", "--data", name, *flags, "--output_dir", str(folder / "runs" / name)]
            for name in names
        ]
        found = hub.run(["-c", COMMANDS, json.dumps(runs)], folder / "home")
        assert not hub.errors
        results = [Done(*result) for result in json.loads(found.stdout.splitlines()[-1])]
    return folder / "runs", dict(zip(names, results, strict=True))


def test_a_data_set_on_the_hub_is_trained_and_evaluated_on(done):
    folder, results = done
    assert results["user/facts"].exit_code == 0, results["user/facts"].stderr
    assert json.loads((folder / "user/facts/metrics.json").read_text()).keys() == {"validation", "test"}
    rows = [json.loads(line) for line in (folder / "user/facts/predictions.jsonl").read_text().splitlines()]
    read = [
        (row["text"], row["text"][slice(*row["subject"])], row["text"][slice(*row["object"])], row["relation"])
        for row in rows
    ]
    assert read == FACTS


def test_its_classes_become_their_names(done):
    folder, results = done
    assert results["user/classes"].exit_code == 0, results["user/classes"].stderr
    labels = json.loads((folder / "user/classes/config.json").read_text())["id2label"]
    assert list(labels.values()) == NAMES


@pytest.mark.parametrize("name", REFUSALS)
def test_what_can_not_be_trained_on_is_an_error_of_one_sentence(name, done):
    folder, results = done
    refused = results[name]
    assert refused.exit_code == 1
    said = refused.stderr.splitlines()[-1]
    assert said.startswith("Error: ") and REFUSALS[name] in said, said
    assert not (folder / name / "config.json").exists()
