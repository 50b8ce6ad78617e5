"""A saved K-Adapter brings its own code: it loads, saves and loads again where the package can't be imported."""

import json
import os
import subprocess
import sys

import pytest
from conftest import batch

from kadapter_hf import KAdapterForEntityTyping, KAdapterForMaskedLM, KAdapterForRelationClassification, KAdapterModel


# Run in a clean process: loads a folder with one Auto class, saves it again, loads that, and prints what it found.
SCRIPT = """
import json, sys


class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kadapter_hf":
            raise ImportError("kadapter_hf can't be imported here")


sys.meta_path.insert(0, NoPackage())
import torch
import transformers

folder, again, auto_class, inputs = sys.argv[1:]
inputs = {name: torch.tensor(value) for name, value in json.loads(inputs).items()}
load = getattr(transformers, auto_class).from_pretrained
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = load(folder, trust_remote_code=True)
model.save_pretrained(again)
reloaded = load(again, trust_remote_code=True)
with torch.no_grad():
    outputs = [m(**inputs, return_dict=False)[0].flatten().tolist() for m in (model, reloaded)]
same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), reloaded.state_dict().values()))
print(json.dumps({"class": type(model).__name__, "config": type(config).__name__, "same": same, "outputs": outputs}))
"""


@pytest.mark.parametrize(
    ("model_class", "auto_class", "markers"),
    [
        (KAdapterModel, "AutoModel", []),
        (KAdapterForMaskedLM, "AutoModelForMaskedLM", []),
        (KAdapterForEntityTyping, "AutoModelForSequenceClassification", ["entity_start"]),
        (KAdapterForRelationClassification, "AutoModelForSequenceClassification", ["subject_start", "object_start"]),
    ],
)
def test_loads_saves_and_loads_again_without_the_package(build, tmp_path, model_class, auto_class, markers):
    model = build(model_class)
    model.save_pretrained(tmp_path / "saved")
    inputs = batch(2, 6) | {marker: batch(2, 6)["input_ids"][:, 0] % 6 for marker in markers}
    wanted = model(**inputs, return_dict=False)[0].flatten().tolist()
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [json.dumps({name: value.tolist() for name, value in inputs.items()})]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "saved"), str(tmp_path / "again"), auto_class, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["class"], found["config"], found["same"]) == (model_class.__name__, "KAdapterConfig", True)
    for output in found["outputs"]:
        assert output == pytest.approx(wanted, abs=1e-6)
    saved, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "again"))
    assert again["auto_map"] == saved["auto_map"]
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == {
        path.name for path in (tmp_path / "saved").glob("*.py")
    }


def test_every_class_is_in_the_auto_map(build, tmp_path):
    """Whatever is saved, `trust_remote_code` can give each of the classes; the saved classifier has the Auto class."""
    build(KAdapterForEntityTyping).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForSequenceClassification"] == "heads_kadapter.KAdapterForEntityTyping"
    assert {value.rpartition(".")[2] for value in auto_map.values()} >= {
        "KAdapterConfig",
        "KAdapterModel",
        "KAdapterForMaskedLM",
        "KAdapterForTokenClassification",
        "KAdapterForQuestionAnswering",
        "KAdapterForMultipleChoice",
        "KAdapterForRelationClassification",
    }
