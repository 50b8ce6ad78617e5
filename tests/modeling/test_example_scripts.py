"""A saved K-Adapter in a script like those of transformers' examples, which only uses the Auto classes."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kadapter_hf import KAdapterForSequenceClassification, KAdapterModel


SCRIPT = Path(__file__).parent / "scripts" / "classify.py"
CLUES = {"place": ["rome", "paris", "vienna"], "person": ["curie", "mozart", "dante"], "animal": ["cat", "dog"]}


def write_sentences(path: Path, rows: int, seed: int) -> None:
    """Random words, one of which determines the label."""
    generator = random.Random(seed)
    others = [word for word in WORDS if word.isalpha() and not any(word in clues for clues in CLUES.values())]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "label"])
        for row in range(rows):
            label = list(CLUES)[row % len(CLUES)]
            words = generator.sample(others, generator.randint(3, 6))
            words.insert(generator.randint(0, len(words)), generator.choice(CLUES[label]))
            writer.writerow([" ".join(words), label])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved_class", "flags"),
    [
        pytest.param(KAdapterModel, (), id="Trainer"),
        pytest.param(KAdapterForSequenceClassification, ("--trust_remote_code",), id="Trainer-remote-code"),
        pytest.param(KAdapterForSequenceClassification, ("--no_trainer",), id="loop"),
        pytest.param(KAdapterModel, ("--no_trainer", "--trust_remote_code"), id="loop-remote-code"),
    ],
)
def test_script_like_those_of_transformers_trains_evaluates_saves_and_loads(
    saved_class, flags, build, tokenizer, tmp_path
):
    """Also from a model without a head or with another number of labels."""
    model = build(saved_class)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_sentences(tmp_path / "train.csv", 240, seed=0)
    write_sentences(tmp_path / "validation.csv", 60, seed=1)
    command = [
        *(sys.executable, str(SCRIPT), *flags),
        *("--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "output")),
        *("--train_file", str(tmp_path / "train.csv"), "--validation_file", str(tmp_path / "validation.csv")),
        *("--num_train_epochs", "20", "--learning_rate", "5e-3", "--per_device_train_batch_size", "16"),
        *("--use_cpu", "true", "--report_to", "none", "--save_strategy", "no", "--weight_decay", "0.01"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert results["accuracy"] > 0.7, done.stdout
    assert results["reloaded_accuracy"] == results["accuracy"]
    assert results["imported"] is ("--trust_remote_code" not in flags)
    assert results["labels"] == {"animal": 0, "person": 1, "place": 2}
    assert not (tmp_path / "output" / "backbone.safetensors").exists()
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "output")
    assert type(trained) is KAdapterForSequenceClassification
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(trained.backbone.state_dict()[name], tensor)
    encoded = AutoTokenizer.from_pretrained(tmp_path / "output")("the old cat of the river", return_tensors="pt")
    with torch.no_grad():
        assert trained.config.id2label[trained(**encoded).logits.argmax().item()] == "animal"
