"""The example scripts of the paper's experiments, on a few rows and a tiny backbone."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_script, small_adapter
from transformers import AutoModel

from kadapter_hf import KAdapterModel


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(Path(__file__).parents[1] / "tasks"))
from samples import files_of, write_sample  # noqa: E402


SCRIPTS = {
    "run_entity_typing.py": ("open-entity", "test_micro_f1"),
    "run_relation_classification.py": ("tacred", "test_micro_f1"),
    "run_multiple_choice.py": ("cosmos-qa", "test_accuracy"),
    "run_extractive_qa.py": ("search-qa", "test_exact_match"),
}


@pytest.fixture
def adapter(tmp_path, backbone) -> str:
    KAdapterModel.from_backbone(backbone, {"factual": small_adapter()}).save_pretrained(tmp_path / "factual")
    return str(tmp_path / "factual")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_fine_tunes_evaluates_and_saves(script, backbone, adapter, tmp_path, monkeypatch):
    task, metric = SCRIPTS[script]
    data = write_sample(task, tmp_path / "data")
    files = {"train": "train_file", "dev": "validation_file", "test": "test_file"}
    flags = [part for split, flag in files.items() for part in (f"--{flag}", str(files_of(task, data, split)))]
    flags += ["--model_name_or_path", backbone, "--adapters", adapter, "--output_dir", str(tmp_path / "out")]
    flags += ["--max_steps", "2", "--max_length", "64", "--use_cpu", "true", "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    metrics = load_script(EXAMPLES / script).main()
    assert 0 <= metrics[metric] <= 1
    assert json.loads((tmp_path / "out" / "test_results.json").read_text())[metric] == metrics[metric]
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model.active_knowledge_adapters == ["factual"] and model.config.task["name"] == task


def test_hyperparameters_are_searched_over_the_authors_values(backbone, adapter, tmp_path, monkeypatch):
    data = write_sample("open-entity", tmp_path / "data")
    flags = ["--train_file", str(data / "train.json"), "--validation_file", str(data / "dev.json"), "--trials", "2"]
    flags += ["--model_name_or_path", backbone, "--adapters", adapter, "--output_dir", str(tmp_path / "out")]
    flags += ["--max_steps", "1", "--max_length", "64", "--use_cpu", "true", "--disable_tqdm", "true"]
    monkeypatch.setattr(sys, "argv", ["search_hyperparameters.py", *flags])
    script = load_script(EXAMPLES / "search_hyperparameters.py")
    found = script.main()
    assert all(found[name] in values for name, values in script.SPACE.items())
    assert json.loads((tmp_path / "out" / "best.json").read_text()) == found and 0 <= found["eval_micro_f1"] <= 1


def test_a_k_adapter_is_used_like_roberta(backbone, adapter, tmp_path, monkeypatch):
    flags = ["--model_name_or_path", backbone, "--adapters", adapter, "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["use_like_roberta.py", *flags])
    states = load_script(EXAMPLES / "use_like_roberta.py").main()
    assert states.dim() == 3 and torch.isfinite(states).all()
