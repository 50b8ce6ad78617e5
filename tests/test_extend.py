"""The examples of docs/extend.md run as printed: heads, fusions, objectives and corpora in files of a user's own."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import batch, disturb, small_adapter
from datasets import load_dataset
from transformers import (
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from typer.testing import CliRunner

from kadapter_cli.prepare import Corpus, add_command, prepare as app
from kadapter_hf import (
    KAdapterConfigError,
    KAdapterForEntityTyping,
    KAdapterForSequenceClassification,
    KAdapterForTokenClassification,
    KAdapterLoadError,
    KAdapterModel,
    corpora,
    encodes_inputs,
)
from kadapter_hf.modeling.fusion_kadapter import FUSIONS
from kadapter_hf.modeling.registry_kadapter import HEADS
from kadapter_hf.objectives import OBJECTIVES
from kadapter_hf.tasks import TASKS


PAGE = Path(__file__).parents[1] / "docs" / "extend.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
MODULES = {match[1]: block for block in BLOCKS if (match := re.match(r"# (\w+)\.py\n", block))}
PROGRAMS = [block for block in BLOCKS if not block.startswith("# ")]


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """The files of the page, which can be imported; what they register is gone afterwards."""
    folder = tmp_path_factory.mktemp("modules")
    for name, block in MODULES.items():
        (folder / f"{name}.py").write_text(block, encoding="utf-8")
    registries = (HEADS, FUSIONS, OBJECTIVES, TASKS)
    before = [dict(registry) for registry in registries]
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def head_class(modules):
    return importlib.import_module("span_head").KAdapterForSpanClassification


@pytest.fixture
def head(head_class, build):
    model = build(head_class, num_labels=3)
    with torch.no_grad():
        model.scale.fill_(2.0)
    return model


def spans(rows: int = 3) -> dict[str, torch.Tensor]:
    return batch(rows) | {"span": torch.tensor([[1, 2]] * rows)}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**spans()).logits


# ---- Heads ----------------------------------------------------------------------------------------------------------


def test_own_head_computes_what_it_says(head):
    fused = KAdapterModel.forward(head, **batch(3)).last_hidden_state
    expected = head.classifier(torch.cat([fused[:, 1], fused[:, 2]], dim=-1)) * 2.0
    assert torch.allclose(logits(head), expected, atol=1e-6)


def test_own_head_may_take_inputs_of_the_backbone_too(build):
    class Mean(KAdapterForSequenceClassification):
        @encodes_inputs
        def forward(self, encoded, attention_mask=None, labels=None):
            mask = attention_mask[:, :, None]
            logits = self.classifier((self.fused(encoded) * mask).sum(1) / mask.sum(1))
            return SequenceClassifierOutput(loss=None if labels is None else labels.sum(), logits=logits)

    model, inputs, labels = build(Mean), batch(3), torch.ones(3)
    with torch.no_grad():
        found = model(**inputs, labels=labels)
        states = KAdapterModel.forward(model, **inputs).last_hidden_state
        means = [state[real.bool()].mean(0) for state, real in zip(states, inputs["attention_mask"], strict=True)]
        assert torch.allclose(found.logits, model.classifier(torch.stack(means)), atol=1e-6) and found.loss == 3
        by_place = model(inputs["input_ids"], inputs["attention_mask"], None, None, None, labels)
    assert torch.equal(by_place.logits, found.logits) and by_place.loss == 3


def test_own_head_comes_back_with_its_own_parameters(head, head_class, tmp_path):
    head.save_pretrained(tmp_path)
    found, info = head_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and found.scale == 2.0
    assert torch.equal(logits(found), logits(head))


def test_auto_class_returns_the_head_that_was_saved(head, head_class, build, tmp_path):
    head.save_pretrained(tmp_path / "own")
    build(KAdapterForEntityTyping).save_pretrained(tmp_path / "typing")
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path / "own")) is head_class
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path / "typing")) is KAdapterForEntityTyping


def test_own_head_trains_with_trainer(head, tmp_path):
    rows = [{"input_ids": [0, 5, 6, 2], "attention_mask": [1] * 4, "span": [1, 2], "labels": n % 3} for n in range(4)]
    before = head.scale.item()
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", learning_rate=0.1, use_cpu=True)
    Trainer(head, arguments, train_dataset=rows).train()
    found = type(head).from_pretrained(tmp_path / "checkpoint-2")
    assert found.scale != before and torch.equal(logits(found), logits(head.eval()))


def test_own_head_freezes_whole(head):
    head.freeze_head()
    assert not any(parameter.requires_grad for parameter in (head.scale, *head.classifier.parameters()))
    head.unfreeze_head()
    assert all(parameter.requires_grad for parameter in (head.scale, *head.classifier.parameters()))


def test_own_head_is_cast_whole(head_class, backbone):
    head = head_class.from_backbone(backbone, {"factual": small_adapter()}, dtype=torch.bfloat16)
    assert head.scale.dtype == head.classifier.weight.dtype == torch.bfloat16


def test_head_with_integer_buffers_comes_back(backbone, tmp_path):
    class Normed(KAdapterForSequenceClassification):
        def add_head(self, config, width):
            super().add_head(config, width)
            self.norm = torch.nn.BatchNorm1d(width)

    model = Normed.from_backbone(backbone, {"factual": small_adapter()})
    model.norm.num_batches_tracked.fill_(7)
    model.save_pretrained(tmp_path)
    assert Normed.from_pretrained(tmp_path).norm.num_batches_tracked == 7


@pytest.fixture
def of_an_unknown_class(head, tmp_path):
    """A folder that a head saved whose class is not known any more."""
    head.save_pretrained(tmp_path)
    known = HEADS.pop("KAdapterForSpanClassification")
    yield tmp_path
    HEADS["KAdapterForSpanClassification"] = known


@pytest.mark.parametrize("model_class", [KAdapterForSequenceClassification, KAdapterForTokenClassification])
def test_another_head_refuses_to_drop_one_of_an_unknown_class(model_class, of_an_unknown_class):
    with pytest.raises(KAdapterLoadError, match="'KAdapterForSpanClassification'.*register_head.*KAdapterModel"):
        model_class.from_pretrained(of_an_unknown_class)


def test_auto_class_refuses_to_drop_a_head_of_an_unknown_class(of_an_unknown_class):
    with pytest.raises(KAdapterLoadError, match="'KAdapterForSpanClassification'"):
        AutoModelForMultipleChoice.from_pretrained(of_an_unknown_class)


def test_knowledge_under_a_head_of_an_unknown_class_is_still_to_be_had(of_an_unknown_class, head):
    found = AutoModel.from_pretrained(of_an_unknown_class)
    assert type(found) is KAdapterModel
    with torch.no_grad():
        expected = KAdapterModel.forward(head, **batch()).last_hidden_state
        assert torch.equal(found(**batch()).last_hidden_state, expected)


# ---- Fusions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gated(modules, build):
    importlib.import_module("gated_fusion")
    return build(KAdapterForSequenceClassification, fusion="gated", fusion_config={"initial_gate": 1.0})


def test_own_fusion_computes_what_it_says(gated):
    with torch.no_grad():
        for name, gate in (("factual", 0.5), ("linguistic", -2.0)):
            gated.fusion.gates[name].fill_(gate)
        found = KAdapterModel.forward(gated, **batch())
        expected = found.backbone_last_hidden_state
        for name, gate in (("factual", 0.5), ("linguistic", -2.0)):
            expected = expected + torch.sigmoid(torch.tensor(gate)) * found.knowledge_states[name]
    assert torch.allclose(found.last_hidden_state, expected, atol=1e-6)


def test_own_fusion_starts_from_its_configuration_and_comes_back(backbone, modules, tmp_path):
    importlib.import_module("gated_fusion")
    adapters = {"factual": small_adapter(), "linguistic": small_adapter()}
    model = KAdapterModel.from_backbone(backbone, adapters, fusion="gated", fusion_config={"initial_gate": 1.0})
    assert {gate.item() for gate in model.fusion.gates.values()} == {1.0}
    disturb(model.fusion)
    model.save_pretrained(tmp_path)
    found = AutoModel.from_pretrained(tmp_path)
    assert found.config.fusion_config == {"initial_gate": 1.0}
    with torch.no_grad():
        assert torch.equal(found(**batch()).last_hidden_state, model(**batch()).last_hidden_state)


def test_own_fusion_trains_what_it_uses(gated):
    gated.set_active_knowledge_adapters("factual")
    assert gated.fusion.gates["factual"].requires_grad and not gated.fusion.gates["linguistic"].requires_grad


def test_adapters_come_and_go_in_an_own_fusion(gated):
    gated.delete_knowledge_adapter("factual")
    gated.add_knowledge_adapter("places", small_adapter())
    assert set(gated.fusion.gates) == {"linguistic", "places"} and gated.fusion.gates["places"] == 1.0


def test_the_file_of_an_own_fusion_stays_at_home_unless_it_is_registered(gated, tmp_path):
    gated.save_pretrained(tmp_path)
    assert not (tmp_path / "gated_fusion.py").exists()
    assert "gated_fusion" not in (tmp_path / "heads_kadapter.py").read_text(encoding="utf-8")


def test_unknown_fusion_and_unknown_value_are_refused_by_name(backbone, modules):
    importlib.import_module("gated_fusion")
    kinds = r"\['add', 'attention', 'concat', 'gate', 'gated'\]"
    with pytest.raises(KAdapterConfigError, match=f"fusion must be one of {kinds}, or one of your own .*; not 'mean'"):
        KAdapterModel.from_backbone(backbone, fusion="mean")
    with pytest.raises(KAdapterConfigError, match=r"the fusion 'gated' has no \['temperature'\]"):
        KAdapterModel.from_backbone(backbone, fusion="gated", fusion_config={"temperature": 2.0})


# ---- Heads and fusions elsewhere ------------------------------------------------------------------------------------

ELSEWHERE = """
import importlib.abc, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in ("kadapter_hf", "span_head", "gated_fusion"):
            raise ModuleNotFoundError(fullname, name=fullname)

folder, where = sys.argv[1:]
if where == "blocked":
    sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForSequenceClassification

found = {}
ids = torch.arange(30).view(3, 10)
for name, inputs in {"head": {"span": torch.tensor([[1, 2]] * 3)}, "fusion": {}}.items():
    model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    model.save_pretrained(f"{folder}/{name}-again")
    again = AutoModelForSequenceClassification.from_pretrained(f"{folder}/{name}-again", trust_remote_code=True)
    with torch.no_grad():
        logits = [one(ids, torch.ones_like(ids), **inputs).logits.tolist() for one in (model, again)]
    found[name] = {"class": type(again).__name__, "logits": logits}
print(json.dumps(found))
"""


@pytest.mark.parametrize("where", ["blocked", "installed"])
def test_own_head_and_own_fusion_travel_and_are_saved_again_elsewhere(where, head, gated, tmp_path, monkeypatch):
    """In a process that can't import their files, and in one of the two not the package either."""
    monkeypatch.setattr(type(head), "_auto_class", None)  # what the next lines set
    monkeypatch.setattr(type(gated.fusion), "travels", False)
    type(head).register_for_auto_class("AutoModelForSequenceClassification")
    type(gated.fusion).register_for_auto_class()
    disturb(gated.fusion)
    head.save_pretrained(tmp_path / "head")
    gated.save_pretrained(tmp_path / "fusion")
    auto_map = json.loads((tmp_path / "head" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForSequenceClassification"] == "span_head.KAdapterForSpanClassification"

    command = [sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path), where]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])

    ids = torch.arange(30).view(3, 10)
    span = torch.tensor([[1, 2]] * 3)
    with torch.no_grad():
        expected = {
            "head": head.eval()(ids, torch.ones_like(ids), span=span).logits,
            "fusion": gated.eval()(ids, torch.ones_like(ids)).logits,
        }
    assert found["head"]["class"] == "KAdapterForSpanClassification"
    for name, file in (("head", "span_head.py"), ("fusion", "gated_fusion.py")):
        for values in found[name]["logits"]:
            assert torch.allclose(torch.tensor(values), expected[name], atol=1e-6)
        assert {file, "heads_kadapter.py"} <= {path.name for path in (tmp_path / f"{name}-again").glob("*.py")}
    entry = (tmp_path / "fusion-again" / "heads_kadapter.py").read_text(encoding="utf-8")
    assert entry.count("from .gated_fusion import") == 1


# ---- Objectives and corpora -----------------------------------------------------------------------------------------


def test_own_objective_trains_an_adapter(modules, backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(backbone, "backbone")
    with open("titles.jsonl", "w", encoding="utf-8") as file:
        for n in range(20):
            file.write(json.dumps({"title": f"the old city of {'rome' if n % 2 else 'vienna'}"}) + "\n")
    importlib.import_module("title_objective")
    (program,) = (block for block in PROGRAMS if "pretraining" in block)
    exec(program, {})
    assert KAdapterModel.from_pretrained("titles-adapter").active_knowledge_adapters == ["titles"]


def test_own_task_is_fine_tuned(modules, backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("scierc").mkdir()
    for split in ("train", "dev", "test"):
        rows = [
            {"tokens": "the cat sat on the old mat".split(), "head": [1, 2], "tail": [5, 7], "label": label}
            for label in ("Used-for", "Part-of")
        ]
        Path("scierc", f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    KAdapterModel.from_backbone(backbone, {"factual": small_adapter()}).save_pretrained("factual-adapter")
    task = importlib.import_module("scierc")
    flags = ["--max_steps", "2", "--use_cpu", "true", "--report_to", "none"]
    monkeypatch.setattr(task, "main", lambda arguments, main=task.main: main([*arguments, *flags]))
    (program,) = (block for block in PROGRAMS if "scierc" in block)
    scope: dict = {}
    exec(program, scope)
    row = scope["rows"][0]
    assert [row["text"][slice(*row[entity])] for entity in ("subject", "object")] == ["cat", "old mat"]
    assert AutoModelForSequenceClassification.from_pretrained("scierc-model").config.task["name"] == "scierc"


def test_own_corpus_becomes_a_data_set_and_a_report(modules, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("birthplaces").mkdir()
    Path("birthplaces.tsv").write_text(
        "Dante\tFlorence\tDante was born in Florence.\nMozart\tSalzburg\tMozart wrote operas.\nno columns\n"
    )
    (program,) = (block for block in PROGRAMS if "birthplaces" in block)
    exec(program, {})
    rows = load_dataset("parquet", data_files="birthplaces/train.parquet", cache_dir=str(tmp_path / "cache"))["train"]
    assert rows[0] == {
        "text": "Dante was born in Florence.",
        "subject": [0, 5],
        "object": [18, 26],
        "relation": "place of birth",
    }
    assert capsys.readouterr().out.startswith("1 Counter(")


def test_line_in_corpora_makes_an_own_corpus_a_command(modules, tmp_path, monkeypatch):
    (line,) = re.findall(r"```text\n(\"birthplaces\": .*?),\n```", PAGE.read_text(encoding="utf-8"))
    reader = importlib.import_module("birthplaces").read_birthplaces
    monkeypatch.setattr(corpora, "read_birthplaces", reader, raising=False)
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
    add_command("birthplaces", eval(f"{{{line}}}", {"Corpus": Corpus})["birthplaces"])
    (tmp_path / "birthplaces.tsv").write_text("Dante\tFlorence\tDante was born in Florence.\n")
    command = ["birthplaces", str(tmp_path / "birthplaces.tsv"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "relations.json").read_text()) == ["place of birth"]
    said = " ".join(CliRunner().invoke(app, ["birthplaces", "--help"]).output.split())
    assert "Birthplaces: one per line." in said and "birthplaces.tsv --output data/birthplaces" in said
    assert "--names" not in said
