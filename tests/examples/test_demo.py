"""examples/demo.py: the complete program on a tiny backbone, the models' inputs, and the conclusions from the scores."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_script
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kadapter_hf import KAdapterForEntityTyping


SCRIPT = Path(__file__).parents[2] / "examples" / "demo.py"
SETTINGS = ("backbone alone", "two untrained adapters", "factual adapter", "linguistic adapter", "both adapters")
QUICK = "--max_steps 2 --seeds 2 --examples 8 --adapter_size 64".split()


def run_demo(*arguments: str, **environment: str) -> str:
    """Runs the program in a wide terminal with additional environment variables, and returns its output."""
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def printed(output_dir, backbone) -> str:
    sentence = "marie curie was born in [vienna] , the capital"
    return run_demo(*QUICK, "--backbone", backbone, "--output_dir", str(output_dir), "--sentence", sentence)


@pytest.fixture(scope="module")
def demo():
    """The program as a module."""
    return load_script(SCRIPT)


def cells(printed: str, first: str) -> list[str]:
    """The cells of the table row that starts with `first`."""
    (row,) = [line for line in printed.splitlines() if re.match(rf"\W*{re.escape(first)} +│", line)]
    return [cell.strip() for cell in row.strip("│ ").split("│")][1:]


def test_the_table_has_a_mean_and_a_spread_for_every_setting(printed):
    for setting in SETTINGS:
        assert re.fullmatch(r"[01]\.\d{3} ± \d\.\d{3}", cells(printed, setting)[0])


def test_the_table_of_sizes_is_that_of_the_files(printed, output_dir):
    files = [path for path in (output_dir / "model").rglob("*") if path.is_file()]
    assert cells(printed, "total") == [f"{sum(path.stat().st_size for path in files) / 1e6:.1f}"]
    weights = {path.relative_to(output_dir / "model").as_posix() for path in files if path.suffix == ".safetensors"}
    assert weights == {"adapters/factual.safetensors", "adapters/linguistic.safetensors", "head.safetensors"}
    for name in weights:
        assert cells(printed, name) == [f"{(output_dir / 'model' / name).stat().st_size / 1e6:.1f}"]


def test_the_saved_folder_gives_the_printed_probabilities(demo, printed, output_dir):
    model = AutoModelForSequenceClassification.from_pretrained(output_dir / "model")
    assert type(model) is KAdapterForEntityTyping
    assert model.active_knowledge_adapters == ["factual", "linguistic"]
    tokenizer = AutoTokenizer.from_pretrained(output_dir / "model")
    inputs = tokenizer("marie curie was born in @ vienna @ , the capital", return_tensors="pt")
    with torch.no_grad():  # <s> marie curie was born in @
        probabilities = model(**inputs, entity_start=torch.tensor([6])).logits[0].sigmoid().tolist()
    # In this order, and not in that of config.json, where "10" comes before "2".
    labels = sorted({label for example in demo.read_jsonl("typing.jsonl") for label in example["types"]})
    best = sorted(zip(probabilities, labels, strict=True), reverse=True)[:5]
    shown = re.findall(r"^  (0\.\d\d) (\w+)$", printed, flags=re.MULTILINE)
    assert [float(probability) for probability, _ in shown] == pytest.approx([p for p, _ in best], abs=0.0051)
    assert [label for _, label in shown] == [label for _, label in best]


def test_the_model_holds_the_adapters_that_were_trained_apart(printed, output_dir):
    for name in ("factual", "linguistic"):
        file = f"adapters/{name}.safetensors"
        assert (output_dir / "model" / file).read_bytes() == (output_dir / file).read_bytes()


def test_each_adapter_says_what_it_was_trained_on(printed, output_dir):
    adapters = AutoModelForSequenceClassification.from_pretrained(output_dir / "model").config.knowledge_adapters
    for name, labels in (("factual", 24), ("linguistic", 40)):
        provenance = adapters[name].provenance
        assert provenance["labels"] == labels
        assert f"Pre-training of the {name} adapter: {provenance['held_out_accuracy']:.3f} accuracy" in printed


def test_markers_stand_around_their_entities(demo, tokenizer):
    text, spans = "rome is the capital of italy .", {"@": (23, 28), "#": (0, 4)}
    tokens, positions = demo.encode_marked(tokenizer, text, spans)
    assert tokenizer.decode(tokens["input_ids"]) == "<s> # rome # is the capital of @ italy @ . </s>"
    assert positions == [8, 1]


def test_no_fact_is_trained_on_in_one_direction_and_tested_on_in_the_other(demo, tokenizer):
    data, labels, _ = demo.read_facts(tokenizer)
    facts = demo.read_jsonl("facts.jsonl")
    assert len({fact["text"] for fact in facts}) == len(facts)
    for part, own in (("train", facts[:288]), ("test", facts[288:])):
        both_directions = [direction + fact["relation"] for fact in own for direction in ("", "inverse of ")]
        assert [labels[label] for label in data[part]["labels"]] == both_directions


def test_a_word_s_relation_is_at_its_first_token(demo, tokenizer, monkeypatch, tmp_path):
    rows = (
        ("rome", "2", "nsubj"),
        ("sat", "0", "root"),
        ("on", "4", "case"),
        ("mat", "2", "obl"),
        (".", "2", "punct"),
    )
    lines = [f"{i}\t{word}\t_\t_\t_\t_\t{head}\t{rel}\t_\t_" for i, (word, head, rel) in enumerate(rows, start=1)]
    tree = "# text = made up\n" + "\n".join(lines)
    (tmp_path / "trees.conllu").write_text(f"{tree}\n\n{tree}\n\n")
    monkeypatch.setattr(demo, "DATA", tmp_path)
    data, labels, _ = demo.read_trees(tokenizer)
    assert [labels[label] if label >= 0 else label for label in data["train"][0]["labels"]] == [
        -100,
        *(relation for _, _, relation in rows),
        -100,
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.06, 0.05, 0.04], "better (+0.050 ± 0.010)."),
        ([-0.06, -0.05, -0.04], "worse (-0.050 ± 0.010)."),
        ([0.06, -0.05, 0.02], "no difference beyond the spread over seeds (+0.010 ± 0.056)."),
        ([0.0, 0.0], "no difference beyond the spread over seeds (+0.000 ± 0.000)."),
        ([0.3], "+0.300 with one seed, which is too few to distinguish a gain from chance."),
    ],
)
def test_the_conclusion_follows_from_the_differences(demo, values, expected):
    assert demo.verdict(values) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sentence Vienna", "--sentence needs one entity in brackets, as in 'We met in [Vienna].', not 'Vienna'"),
        ("--sentence [Rome]&[Vienna]", "--sentence needs one entity in brackets"),
        ("--seeds 0", "--seeds must be more than 0, not 0"),
        ("--seeds three", "argument --seeds: invalid int value: 'three'"),
        ("--examples 221", "--examples must be at most 220, not 221"),
        ("--adapter_size 100", "--adapter_size must be a multiple of 64, not 100"),
        ("--backbone /no/such/folder", "'/no/such/folder' is not a folder, and not the name of a Hub repository"),
        (f"--output_dir {SCRIPT}", "is a file"),
        ("--back x", "['--back', 'x']"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(demo, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert message in capsys.readouterr().err


def test_a_folder_without_a_backbone_is_refused_before_any_training(demo, tmp_path):
    with pytest.raises(SystemExit, match=f"--backbone {re.escape(str(tmp_path))}.*config.json"):
        demo.find_backbone(demo.Arguments(backbone=str(tmp_path)))


def held_out_sentences() -> list[dict]:
    """Sentences with their entities in brackets and the types; chosen before any model had seen them."""
    file = Path(__file__).with_name("held_out_sentences.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_held_out_sentences_and_the_default_one_have_entities_that_are_not_trained_on(demo):
    entities = set()
    for example in (example for file in demo.LAST_EXAMPLES for example in demo.read_jsonl(file)):
        entities.add(example["text"][slice(*example["entity"])])
    for sentence in (demo.Arguments().sentence, *(row["sentence"] for row in held_out_sentences())):
        text, span = demo.unbracket(sentence)
        assert text[slice(*span)] not in entities


@pytest.mark.slow
def test_the_last_model_types_unseen_entities_correctly(demo, tmp_path):
    args = demo.Arguments(output_dir=str(tmp_path))
    args.backbone, tokenizer = demo.find_backbone(args)
    with demo.Progress(disable=True) as progress:
        factual = demo.pretrain(
            "factual", demo.KAdapterForRelationClassification, demo.read_facts(tokenizer), progress, args
        )
        linguistic = demo.pretrain(
            "linguistic", demo.KAdapterForTokenClassification, demo.read_trees(tokenizer), progress, args
        )
        files = {"factual": factual, "linguistic": linguistic}
        model = demo.train_last(tokenizer, files, str(tmp_path / "cache"), progress, args).eval()

    def right(sentence: str, types: list[str]) -> bool:
        return {label for p, label in demo.predict(model, tokenizer, sentence) if p > 0.5} == set(types)

    assert right(args.sentence, ["person", "artist"])
    rows = held_out_sentences()
    assert sum(right(row["sentence"], row["types"]) for row in rows) / len(rows) > 0.6


@pytest.mark.slow
def test_the_default_backbone_needs_no_network(tmp_path, monkeypatch):
    """Without HF_HUB_OFFLINE, as users run it, with an unreachable Hub and an empty cache."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    printed = run_demo("--max_steps", "20", "--seeds", "1", "--output_dir", str(tmp_path / "output"), **environment)
    assert "one seed, which is too few to distinguish a gain from chance" in printed
    assert "Reloaded as KAdapterForEntityTyping" in printed
    (accuracy,) = re.findall(r"Pre-training of the linguistic adapter: (\d\.\d+)", printed)
    assert float(accuracy) > 0.5  # of 40 labels; the most frequent one is 15 % of the words
