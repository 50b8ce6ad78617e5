"""A saved K-Adapter loads with its own code, by `trust_remote_code=True`, without this package installed."""

import ast
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALL_CLASSES, contents, disturb, inputs_for, small_adapter
from safetensors.torch import save_file
from test_registration import AUTO
from transformers import set_seed

import kadapter_hf


SCRIPT = Path(__file__).parent / "scripts" / "remote_code.py"
CODE = sorted(path.name for path in (Path(kadapter_hf.modeling.__file__).parent).glob("*_kadapter.py"))
AUTO_MAP = {
    "AutoConfig": "KAdapterConfig",
    "AutoModel": "KAdapterModel",
    "AutoModelForMaskedLM": "KAdapterForMaskedLM",
    "AutoModelForSequenceClassification": "KAdapterForSequenceClassification",
    "AutoModelForTokenClassification": "KAdapterForTokenClassification",
    "AutoModelForQuestionAnswering": "KAdapterForQuestionAnswering",
    "AutoModelForMultipleChoice": "KAdapterForMultipleChoice",
    "KAdapterForSequenceClassification": "KAdapterForSequenceClassification",
    "KAdapterForEntityTyping": "KAdapterForEntityTyping",
    "KAdapterForRelationClassification": "KAdapterForRelationClassification",
    "KAdapterForDependencyParsing": "KAdapterForDependencyParsing",
}
NAMES = [model_class.__name__ for model_class in ALL_CLASSES]
AUTO_OF = {model_class.__name__: auto_class.__name__ for model_class, auto_class in AUTO.items()}
# A class for each way to load: without a head, sharing an Auto class with others, without an Auto class.
SOME = ("KAdapterModel", "KAdapterForSequenceClassification", "KAdapterForDependencyParsing")
every_class = pytest.mark.parametrize("name", NAMES)


def run(source: Path, target: Path, mode: str, modules: Path) -> dict:
    """`-I`: nothing can be imported from environment variables, the working directory or user folders."""
    environment = os.environ | {"HF_MODULES_CACHE": str(modules), "HF_HOME": str(modules / "home")}
    command = [sys.executable, "-I", str(SCRIPT), str(source), str(target), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, backbone) -> Path:
    """A folder for each class, written by the installed package."""
    place = tmp_path_factory.mktemp("saved")
    for model_class, fusion in zip(ALL_CLASSES, itertools.cycle(("concat", "attention", "gate", "add")), strict=False):
        set_seed(0)
        adapters = {"factual": small_adapter(), "linguistic": small_adapter(num_hidden_layers=0)}
        model = model_class.from_backbone(backbone, adapters=adapters, fusion=fusion)
        disturb(model.adapters)
        inputs = inputs_for(model_class)
        if model_class is kadapter_hf.KAdapterForSequenceClassification:
            inputs = {name: tensor[:3] for name, tensor in inputs.items()}
        with torch.no_grad():
            expected = model(**inputs).to_tuple()[0]
        model.save_pretrained(place / model_class.__name__)
        inputs = {name: tensor.contiguous() for name, tensor in inputs.items()}
        save_file(inputs | {"expected": expected.contiguous()}, place / f"{model_class.__name__}.safetensors")
    (place / "auto_classes.json").write_text(json.dumps(AUTO_OF))
    return place


@pytest.fixture(scope="module")
def elsewhere(saved, tmp_path_factory):
    """The results of a process without the package, and the folder where it saved the models again."""
    target = tmp_path_factory.mktemp("again")
    return run(saved, target, "blocked", tmp_path_factory.mktemp("modules")), target


def test_package_could_not_be_imported(elsewhere):
    assert not elsewhere[0]["package imported"]


@every_class
def test_loads_without_the_package(name, elsewhere):
    found = elsewhere[0][name]
    assert found["config"] == ["KAdapterConfig", "transformers_modules"]
    assert found["model"] == [name, "transformers_modules"]
    assert found["base"] == "KAdapterModel"
    assert not any(found["loading_info"])
    assert found["same"]


@every_class
def test_model_card_stays_with_the_model(name, saved, elsewhere):
    """The code in the folder can't generate one."""
    assert (elsewhere[1] / name / "README.md").read_bytes() == (saved / name / "README.md").read_bytes()


@every_class
def test_all_classes_and_all_code_are_in_every_saved_folder(name, saved, elsewhere):
    """Saved with the package and without it."""
    for place in (saved, elsewhere[1]):
        folder = place / name
        assert sorted(path.name for path in folder.glob("*.py")) == CODE
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        wanted = AUTO_MAP | (
            {"AutoModelForSequenceClassification": name}
            if AUTO_OF.get(name) == "AutoModelForSequenceClassification"
            else {}
        )
        assert auto_map == {key: f"heads_kadapter.{value}" for key, value in wanted.items()}


@every_class
def test_saved_files_are_the_same_with_and_without_the_package(name, saved, elsewhere):
    """So what was saved without it loads without it, and is the same again and again."""
    assert contents(elsewhere[1] / name) == contents(saved / name)


@every_class
def test_what_was_saved_without_the_package_loads_with_it(name, elsewhere):
    model_class = getattr(kadapter_hf, name)
    assert type(model_class.from_pretrained(elsewhere[1] / name)) is model_class


def test_adapters_change_train_and_come_back_without_the_package(elsewhere):
    changed = elsewhere[0]["changed"]
    assert changed["same"] and changed["from_backbone"] == ["factual"]
    assert changed["files"] == sorted(
        [
            "backbone.safetensors",
            "factual.safetensors",
            "head.safetensors",
            "linguistic.safetensors",
            "places.safetensors",
        ]
    )


def test_code_does_not_run_without_trust(elsewhere):
    assert "trust_remote_code=True" in elsewhere[0]["without trust"]


def test_travelled_code_works_beside_the_installed_package(saved, tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("beside")
    shutil.copy(saved / "auto_classes.json", source)
    for name in SOME:
        shutil.copytree(saved / name, source / name)
        shutil.copy(saved / f"{name}.safetensors", source)
    found = run(source, target, "installed", tmp_path_factory.mktemp("modules"))
    for name in SOME:
        assert found[name]["same"] and found[name]["model"][0] == name
    assert found["changed"]["same"]


def test_code_imports_nothing_that_a_plain_environment_lacks():
    """Each module only imports torch, transformers, safetensors, huggingface_hub and its siblings."""
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub", "peft", "yaml"} | set(
        sys.stdlib_module_names
    )
    for name in CODE:
        tree = ast.parse((Path(kadapter_hf.modeling.__file__).parent / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.module.split(".")[0] in allowed, (name, node.module)


def test_the_module_that_auto_map_names_imports_each_of_the_others():
    """Older versions of transformers don't copy others."""
    source = (Path(kadapter_hf.modeling.__file__).parent / "heads_kadapter.py").read_text()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom) and node.level == 1]
    assert {f"{node.module}.py" for node in nodes} | {"heads_kadapter.py"} == set(CODE)
