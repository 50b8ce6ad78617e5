"""A backbone that is trained on several objectives at once."""

import json
import shutil

import pytest
import torch
from test_pretraining import FACTS, write_rows
from transformers import AutoModel
from typer.testing import CliRunner

from kadapter_cli import app
from kadapter_hf import KAdapterModel
from kadapter_hf.multitask import Groups


TREE = {"text": "the cat sat .", "tokens": ["the", "cat", "sat", "."], "heads": [2, 3, 0, 3]}
LABELS = ["det", "nsubj", "root", "punct"]


@pytest.fixture
def flags(tmp_path, backbone) -> list[str]:
    facts = write_rows(tmp_path / "facts.jsonl", FACTS)
    trees = write_rows(tmp_path / "trees.jsonl", [TREE | {"labels": LABELS}] * 20)
    return [
        *("pretrain", "multitask", "--data", f"factual={facts}", f"linguistic={trees}", "--backbone", backbone),
        *("--max_steps", "6", "--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--save_steps", "3"),
        *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"),
    ]


def test_the_backbone_is_trained_on_both_and_saved_as_a_backbone(flags, backbone, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, [*flags, "--output_dir", str(out)])
    assert result.exit_code == 0, result.output
    assert "factual micro_f1: " in result.output and "linguistic las: " in result.output
    assert json.loads((out / "metrics.json").read_text()).keys() == {"factual", "linguistic"}
    before, after = AutoModel.from_pretrained(backbone).state_dict(), AutoModel.from_pretrained(out).state_dict()
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before[name], after[name])
    assert KAdapterModel.from_backbone(str(out)).config.backbone_fingerprint


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(flags, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert CliRunner().invoke(app, [*flags, "--output_dir", str(whole)]).exit_code == 0
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    again = [*flags, "--output_dir", str(resumed), "--resume_from_checkpoint", "true"]
    assert CliRunner().invoke(app, again).exit_code == 0
    weights = [AutoModel.from_pretrained(folder).state_dict() for folder in (whole, resumed)]
    for name, tensor in weights[0].items():
        if "pooler" not in name:
            torch.testing.assert_close(weights[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_groups_have_rows_of_one_objective_and_each_row_once():
    groups = Groups({"a": list(range(10)), "b": list(range(100, 107))}, size=4, seed=0)
    found = [groups[number] for number in range(len(groups))]
    assert sorted(row for _, rows in found for row in rows) == [*range(10), *range(100, 107)]
    assert all({row >= 100 for row in rows} == {name == "b"} for name, rows in found)
    assert len(groups) == 3 + 2


@pytest.mark.parametrize(
    "data, said", [("factal=x", "linguistic, typing. Did you mean 'factual'?"), ("factual", "no source")]
)
def test_wrong_data_is_one_sentence_and_exit_code_2(data, said, tmp_path):
    result = CliRunner().invoke(app, ["pretrain", "multitask", "--data", data, "--output_dir", str(tmp_path / "out")])
    assert result.exit_code == 2 and said in result.output


def test_a_backbone_that_is_nowhere_is_named(flags, tmp_path):
    result = CliRunner().invoke(app, [*flags, "--backbone", "nix/da", "--output_dir", str(tmp_path / "out")])
    assert result.exit_code == 1 and "the backbone 'nix/da' can't be loaded" in result.output
