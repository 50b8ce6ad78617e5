"""The files of a saved K-Adapter, and loading it unchanged in any class, folder or process."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALL_CLASSES, assert_same_weights, contents, disturb, inputs_for, labels_for, small_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

import kadapter_hf.modeling
from kadapter_hf import (
    KAdapterConfigError,
    KAdapterForEntityTyping,
    KAdapterForMaskedLM,
    KAdapterForQuestionAnswering,
    KAdapterForRelationClassification,
    KAdapterForSequenceClassification,
    KAdapterForTokenClassification,
    KAdapterLoadError,
    KAdapterModel,
)


INDEX = "model.safetensors.index.json"
FACTUAL = "adapters/factual.safetensors"
MODULES = sorted(Path(kadapter_hf.modeling.__file__).parent.glob("*.py"))


@pytest.fixture(scope="module")
def once(backbone, tmp_path_factory):
    """The folder of a saved classifier with two adapters, and the model; tests must not change them."""
    set_seed(0)
    model = KAdapterForSequenceClassification.from_backbone(
        backbone,
        {"factual": small_adapter(provenance={"corpus": "T-REx"}), "linguistic": small_adapter()},
        num_labels=3,
    )
    for part in (model.adapters, model.fusion, model.classifier):
        disturb(part)
    folder = tmp_path_factory.mktemp("once") / "model"
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def folder(once, tmp_path):
    return shutil.copytree(once[0], tmp_path / "model")


def test_tensors_can_be_read_by_whoever_can_read_the_other_files(once):
    """safetensors makes files that only their owner can read."""
    modes = {path.stat().st_mode for path in once[0].rglob("*") if path.is_file()}
    assert len(modes) == 1


def output_of(model):
    with torch.no_grad():
        return model.eval()(**inputs_for(type(model)), return_dict=True)


# ---- All of it comes back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_class, fusion",
    (
        *((model_class, "concat") for model_class in ALL_CLASSES),
        *((model_class, "add") for model_class in (KAdapterModel, KAdapterForMaskedLM, KAdapterForEntityTyping)),
        *((model_class, "attention") for model_class in ALL_CLASSES),
    ),
)
def test_every_class_and_every_fusion_come_back(build, tmp_path, model_class, fusion):
    model = build(model_class, fusion=fusion)
    model.set_active_knowledge_adapters(["linguistic"])
    model.train_knowledge_adapter("linguistic")
    model.save_pretrained(tmp_path)
    again, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_weights(again, model)
    assert not any(info.values())
    assert again.active_knowledge_adapters == ["linguistic"]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trainable
    for found, expected in zip(output_of(again).to_tuple(), output_of(model).to_tuple(), strict=True):
        assert not torch.is_tensor(found) or torch.equal(found, expected)


@pytest.mark.parametrize("model_type", ("bert", "electra", "deberta-v2", "distilbert", "modernbert", "xlm-roberta"))
@pytest.mark.parametrize("model_class", (KAdapterForMaskedLM, KAdapterForTokenClassification))
def test_every_type_of_backbone_comes_back(backbones, build, tmp_path, model_class, model_type):
    model = build(model_class, backbone=backbones[model_type])
    model.save_pretrained(tmp_path)
    assert "backbone.safetensors" not in contents(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    assert torch.equal(output_of(again).logits, output_of(model).logits)


@pytest.mark.parametrize("adapters", ([], ["factual"]))
def test_a_model_without_a_head_file_comes_back(build, tmp_path, adapters):
    """Adding needs no weights of its own."""
    model = build(adapters=adapters, fusion="add")
    model.save_pretrained(tmp_path)
    assert "head.safetensors" not in contents(tmp_path)
    assert_same_weights(KAdapterModel.from_pretrained(tmp_path), model)


def test_every_field_of_the_configuration_comes_back(backbone, tmp_path):
    adapter = small_adapter(
        backbone_layers=[1, 1, 4],
        num_hidden_layers=2,
        hidden_act="relu",
        hidden_dropout_prob=0,
        layer_norm_eps=1e-7,
        attend_to_padding=True,
        provenance={"corpus": "T-REx", "size": 3, "metrics": {"f1": 0.5}, "nothing": None, "é": ["☃", True]},
    )
    adapter.newer_fields = {"a_newer_field": {"x": [1]}}
    model = KAdapterForEntityTyping.from_backbone(
        backbone, {"factual": adapter}, num_labels=5, classifier_dropout=0.25, freeze_backbone=False, freeze_head=True
    )
    model.config.label2id = {f"type {i}": i for i in range(5)}
    model.save_pretrained(tmp_path)
    found, expected = KAdapterForEntityTyping.from_pretrained(tmp_path).config.to_dict(), model.config.to_dict()
    for volatile in ("_name_or_path", "auto_map", "transformers_version"):
        found.pop(volatile, None), expected.pop(volatile, None)
    assert json.loads(json.dumps(found, default=str)) == json.loads(json.dumps(expected, default=str))
    other = KAdapterModel.from_backbone(backbone)
    other.load_knowledge_adapter(tmp_path)
    assert other.config.knowledge_adapters["factual"].to_dict() == (
        model.config.knowledge_adapters["factual"].to_dict()
    )


def test_a_provenance_that_json_has_no_words_for_comes_back_or_is_refused(build, tmp_path):
    model = build(adapters=["factual"])
    model.config.knowledge_adapters["factual"].provenance = {
        "loss": float("nan"),
        "best": float("inf"),
        2: "a",
        10: "b",
    }
    model.save_pretrained(tmp_path)
    for again in (KAdapterModel.from_pretrained(tmp_path), build(adapters=[])):
        if not again.adapters:
            again.load_knowledge_adapter(tmp_path)
        provenance = again.config.knowledge_adapters["factual"].provenance
        assert str(provenance) == "{'10': 'b', '2': 'a', 'best': inf, 'loss': nan}"
        again.save_pretrained(tmp_path / "again")
        assert contents(tmp_path / "again")[FACTUAL] == contents(tmp_path)[FACTUAL]
    with pytest.raises(KAdapterConfigError, match="provenance must consist of JSON values"):
        small_adapter(provenance={"model": model})
    before = contents(tmp_path)
    model.config.knowledge_adapters["factual"].provenance = {"model": model}
    with pytest.raises(KAdapterConfigError, match="JSON"):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


# ---- The files ----------------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_the_design_says(once):
    folder, _ = once
    assert {name for name in contents(folder) if not name.endswith(".py")} == {
        "config.json",
        INDEX,
        FACTUAL,
        "adapters/linguistic.safetensors",
        "head.safetensors",
        "README.md",
    }
    own_code = {path.name: path.read_bytes() for path in MODULES if path.name != "__init__.py"}
    assert {path.name: path.read_bytes() for path in folder.glob("*.py")} == own_code


def test_the_index_names_every_tensor_in_its_file(once):
    folder, model = once
    index = json.loads((folder / INDEX).read_text())
    found = {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("backbone.")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in expected.values())


def test_tied_weights_are_stored_once(build, tmp_path):
    model = build(KAdapterForMaskedLM)
    model.save_pretrained(tmp_path)
    assert not any(
        tensor.shape[0] == 100 and tensor.dim() == 2 for tensor in load_file(tmp_path / "head.safetensors").values()
    )


def test_an_adapter_file_says_what_it_is(once):
    folder, model = once
    with safe_open(folder / FACTUAL, framework="pt") as file:
        assert list(file.metadata()) == ["kadapter"]
        content = json.loads(file.metadata()["kadapter"])
    config = content["config"]
    assert content["name"] == "factual" and config["hidden_size"] == 16 and config["provenance"] == {"corpus": "T-REx"}
    assert config["backbone_fingerprint"] == model.config.backbone_fingerprint
    assert config["backbone_name_or_path"] == model.config.backbone_name_or_path


def test_saving_again_writes_the_same_bytes(once, tmp_path):
    folder, model = once
    model.save_pretrained(tmp_path)
    assert contents(tmp_path) == contents(folder)
    KAdapterForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path)
    assert contents(tmp_path) == contents(folder)


def test_saving_over_an_earlier_save_leaves_nothing_of_it(folder, build):
    model = build(KAdapterForTokenClassification, adapters=["factual", "causal"], num_labels=4)
    assert "adapters/linguistic.safetensors" in contents(folder)
    model.save_pretrained(folder)
    assert "adapters/linguistic.safetensors" not in contents(folder)
    assert "adapters/causal.safetensors" in contents(folder)
    assert_same_weights(KAdapterForTokenClassification.from_pretrained(folder), model)
    with pytest.raises(KAdapterLoadError, match=r"\['causal', 'factual'\], and there is no 'linguistic'"):
        model.load_knowledge_adapter(folder, "linguistic")


def test_code_of_an_earlier_version_goes(folder, build):
    """A module that was renamed or removed must not be loaded or pushed with the new ones."""
    (folder / "storage_kadapter.py").write_text("old = True")
    build(KAdapterModel).save_pretrained(folder)
    assert not (folder / "storage_kadapter.py").exists() and (folder / "format_kadapter.py").exists()


def test_saving_leaves_other_people_s_files_alone(folder, build):
    others = {"tokenizer.json": b"{}", "adapters/notes.txt": b"x", "runs/events": b"y"}
    for name, content in others.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    library = build(adapters=["causal"]).save_knowledge_adapter(folder, "causal")
    kept = library.read_bytes()
    build(adapters=["factual"]).save_pretrained(folder)
    assert library.read_bytes() == kept
    assert all((folder / name).read_bytes() == content for name, content in others.items())


def test_a_model_is_saved_into_the_folder_that_it_was_loaded_from(folder, once):
    """Its tensors are mapped from the files that are replaced."""
    model = KAdapterForSequenceClassification.from_pretrained(folder)
    model.set_active_knowledge_adapters(["factual"])
    model.save_pretrained(folder)
    assert_same_weights(model, once[1])
    again = KAdapterForSequenceClassification.from_pretrained(folder)
    assert_same_weights(again, once[1])
    assert again.active_knowledge_adapters == ["factual"]
    path = again.save_knowledge_adapter(folder, "factual")
    assert_same_weights(again, once[1])
    assert contents(folder)[FACTUAL] == contents(once[0])[FACTUAL] and path == folder / FACTUAL


def test_the_folder_of_the_backbone_is_not_overwritten(backbones, tmp_path):
    place = shutil.copytree(backbones["bert"], tmp_path / "bert")
    model = KAdapterModel.from_backbone(place, {"factual": small_adapter()})
    (tmp_path / "link").symlink_to(place)
    before = contents(place)
    for target in (place, str(place), tmp_path / "link"):
        with pytest.raises(OSError, match="holds the backbone.*Choose another folder"):
            model.save_pretrained(target)
    assert contents(place) == before


def test_a_process_that_is_not_the_main_one_writes_nothing(once, tmp_path):
    once[1].save_pretrained(tmp_path / "model", is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_a_given_state_dict_is_what_is_saved(folder, once):
    model = KAdapterForSequenceClassification.from_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["classifier.bias"] += 1
    state["adapters.factual.layers.0.up_project.bias"] += 1
    model.save_pretrained(folder, state_dict=state)
    again = KAdapterForSequenceClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert_same_weights(model, once[1])


def test_links_are_read_through_and_not_written_through(once, tmp_path):
    """The Hub's cache consists of links to files whose names are their hashes."""
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    for name, digest in contents(once[0]).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        shutil.copyfile(once[0] / name, blobs / digest)
        (folder / name).symlink_to(blobs / digest)
    before = contents(blobs)
    model = KAdapterForSequenceClassification.from_pretrained(folder)
    assert_same_weights(model, once[1])
    disturb(model.adapters)
    model.save_pretrained(folder)
    model.save_knowledge_adapter(folder, "factual")
    assert contents(blobs) == before
    assert_same_weights(KAdapterForSequenceClassification.from_pretrained(folder), model)


def test_every_class_is_in_the_auto_map_of_every_save(build, tmp_path):
    for model_class in ALL_CLASSES:
        build(model_class).save_pretrained(tmp_path)
        auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
        found = {reference.partition(".")[2] for reference in auto_map.values()}
        assert found == {"KAdapterConfig", *(known.__name__ for known in ALL_CLASSES)}
        assert all((tmp_path / f"{reference.partition('.')[0]}.py").is_file() for reference in auto_map.values())


# ---- One class loads what another saved ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_every_class_loads_the_adapters_and_the_fusion_that_another_saved(once, model_class, caplog):
    folder, saved = once
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    for name in ("backbone", "adapters", "fusion"):
        assert_same_weights(getattr(model, name), getattr(saved, name))
    own = {name for name in model.state_dict() if name.partition(".")[0] not in ("backbone", "adapters", "fusion")}
    if model_class is KAdapterForSequenceClassification:
        assert not any(info.values())
    elif model_class is KAdapterForMaskedLM:  # its head belongs to the backbone
        assert info["unexpected_keys"] == {"classifier.weight", "classifier.bias"} and not info["missing_keys"]
    else:
        assert info["missing_keys"] == own
        assert info["unexpected_keys"] == {"classifier.weight", "classifier.bias"}
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values() if tensor.is_floating_point())


def test_a_new_head_is_the_same_for_the_same_seed_and_announced(once, caplog):
    heads = []
    for seed in (1, 1, 2):
        set_seed(seed)
        with caplog.at_level("WARNING"):
            heads.append(KAdapterForQuestionAnswering.from_pretrained(once[0]).qa_outputs.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert 0.001 < heads[0].std() < 0.1


def test_a_head_for_another_number_of_labels_is_refused_unless_told_otherwise(once):
    folder, saved = once
    with pytest.raises(KAdapterLoadError, match="classifier.*shape"):
        KAdapterForSequenceClassification.from_pretrained(folder, num_labels=5)
    model, info = KAdapterForSequenceClassification.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.classifier.weight.shape == (5, 32)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert_same_weights(model.adapters, saved.adapters)
    assert_same_weights(model.fusion, saved.fusion)


# ---- An adapter's file is the same from wherever it is saved ------------------------------------------------------------


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_an_adapter_has_the_same_bytes_from_every_class(once, backbone, tmp_path, model_class):
    expected = (once[0] / FACTUAL).read_bytes()
    model = model_class.from_backbone(backbone, {"other": small_adapter()}, fusion="add")
    model.load_knowledge_adapter(once[0], "factual")
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / FACTUAL).read_bytes() == expected
    model.set_active_knowledge_adapters(None)
    assert model.save_knowledge_adapter(tmp_path / "library", "factual").read_bytes() == expected
    assert model.save_knowledge_adapter(tmp_path / "mine.safetensors", "factual").read_bytes() == expected
    again = model_class.from_pretrained(tmp_path / "model")
    again.save_pretrained(tmp_path / "again", state_dict=again.state_dict())
    assert (tmp_path / "again" / FACTUAL).read_bytes() == expected


def test_an_adapter_has_the_same_bytes_in_a_trainer_checkpoint(once, tmp_path):
    model = KAdapterForTokenClassification.from_pretrained(once[0])
    model.freeze_knowledge_adapters()
    inputs = inputs_for(KAdapterForTokenClassification)
    rows = inputs | labels_for(KAdapterForTokenClassification, inputs, 3)
    data = [{name: tensor[row] for name, tensor in rows.items()} for row in range(4)]
    arguments = TrainingArguments(tmp_path, max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    before = model.classifier.weight.clone()
    Trainer(model, arguments, train_dataset=data).train()
    assert not torch.equal(model.classifier.weight, before)
    for step in (1, 2):
        checkpoint = tmp_path / f"checkpoint-{step}"
        assert (checkpoint / FACTUAL).read_bytes() == (once[0] / FACTUAL).read_bytes()


def test_an_adapter_has_the_same_bytes_in_another_process(once, tmp_path):
    """In a complete model and alone; all other files are identical too, except a new, random head."""
    program = (
        "import sys; from kadapter_hf import KAdapterForRelationClassification as C\n"
        "model = C.from_pretrained(sys.argv[1]); model.save_pretrained(sys.argv[2])\n"
        "model.save_knowledge_adapter(sys.argv[3], 'factual')"
    )
    arguments = [once[0], tmp_path / "there", tmp_path / "alone.safetensors"]
    environment = os.environ | {"PYTHONHASHSEED": "7", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, env=environment, cwd=tmp_path)
    KAdapterForRelationClassification.from_pretrained(once[0]).save_pretrained(tmp_path / "here")
    here, there = (contents(tmp_path / name) for name in ("here", "there"))
    for name in (FACTUAL, "adapters/linguistic.safetensors"):
        assert there[name] == contents(once[0])[name]
    assert (tmp_path / "alone.safetensors").read_bytes() == (once[0] / FACTUAL).read_bytes()
    del here["head.safetensors"], there["head.safetensors"], here[INDEX], there[INDEX]
    assert here == there


def test_an_adapter_that_changed_has_other_bytes(folder, once):
    model = KAdapterForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.adapters["factual"].layers[0].up_project.bias[0] += 1e-3
    model.save_pretrained(folder)
    assert contents(folder)[FACTUAL] != contents(once[0])[FACTUAL]
    linguistic = "adapters/linguistic.safetensors"
    assert contents(folder)[linguistic] == contents(once[0])[linguistic]


# ---- Sources of adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("repository", "folder of one", "file", "path as text"))
def test_an_adapter_loads_from_every_kind_of_source(once, backbone, tmp_path, kind):
    folder, saved = once
    file = saved.save_knowledge_adapter(tmp_path / "library", "factual")
    source = {"repository": folder, "folder of one": tmp_path / "library", "file": file, "path as text": str(file)}[
        kind
    ]
    model = KAdapterModel.from_backbone(backbone)
    assert model.load_knowledge_adapter(source, "factual") == "factual"
    assert_same_weights(model.adapters["factual"], saved.adapters["factual"])


def test_an_adapter_loads_under_another_name(once, backbone, tmp_path):
    folder, saved = once
    model = KAdapterModel.from_backbone(backbone)
    assert model.load_knowledge_adapter(folder / FACTUAL, "facts") == "facts"
    assert list(model.adapters) == model.active_knowledge_adapters == ["facts"]
    assert_same_weights(model.adapters["facts"], saved.adapters["factual"])
    knowledge = output_of(model).knowledge_states["facts"]
    base = KAdapterModel.from_pretrained(folder)
    assert torch.equal(knowledge, output_of(base).knowledge_states["factual"])
    model.save_pretrained(tmp_path / "renamed")
    assert_same_weights(KAdapterModel.from_pretrained(tmp_path / "renamed"), model)
    # The same adapter twice in one model, then saved under its first name: the file is unchanged.
    model.load_knowledge_adapter(folder / FACTUAL)
    model.load_knowledge_adapter(tmp_path / "renamed", "third")
    assert list(model.adapters) == ["facts", "factual", "third"]
    other = KAdapterModel.from_backbone(backbone)
    other.load_knowledge_adapter(tmp_path / "renamed", "factual")
    assert other.save_knowledge_adapter(tmp_path, "factual").read_bytes() == (folder / FACTUAL).read_bytes()


def test_from_backbone_takes_adapters_from_several_sources(once, backbone, tmp_path):
    folder, saved = once
    library = tmp_path / "library"
    for name in ("factual", "linguistic"):
        saved.save_knowledge_adapter(library / f"{name}.safetensors", name)
    files = [library / "factual.safetensors", library / "linguistic.safetensors"]
    for adapters in (
        files,
        dict(zip(("factual", "linguistic"), files, strict=True)),
        {"factual": folder, "linguistic": folder},
    ):
        model = KAdapterModel.from_backbone(backbone, adapters)
        assert_same_weights(model.adapters, saved.adapters)
        assert not any(parameter.requires_grad for parameter in model.adapters.parameters())


def test_a_name_that_leads_elsewhere_is_refused(once, backbone, tmp_path):
    model = KAdapterModel.from_backbone(backbone)
    for name in ("../../x", "/x", "a.b", ""):
        with pytest.raises(KAdapterConfigError, match="can't name a knowledge adapter"):
            model.load_knowledge_adapter(once[0] / FACTUAL, name)
        with pytest.raises(KAdapterConfigError):
            model.add_knowledge_adapter(name, small_adapter())
        with pytest.raises(KAdapterConfigError, match="there is no knowledge adapter"):
            model.save_knowledge_adapter(tmp_path, name)
    assert list(tmp_path.iterdir()) == [] and list(model.adapters) == []


# ---- Nothing is unpickled -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_can_unpickle(path):
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").partition(".")[0], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            names = {"pickle"} if node.attr in ("load", "unsafe_load", "allow_pickle") else set()
        elif isinstance(node, ast.Name):
            names = {"pickle"} if node.id in ("eval", "exec", "__import__", "compile") else set()
        else:
            continue
        assert not names & forbidden, f"{path.name}:{node.lineno}"


class Bait:
    """Unpickling it creates a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickle_in_the_folder_is_never_read(folder, once, tmp_path):
    mark = tmp_path / "unpickled"
    with pytest.raises(FileExistsError):  # the file does run code when it is unpickled
        pickle.loads(pickle.dumps([Bait(mark), Bait(mark)]))
    mark.rmdir()
    bait = pickle.dumps(Bait(mark))
    names = (
        "pytorch_model.bin",
        "adapter_model.bin",
        "head.bin",
        "adapters/factual.bin",
        "backbone.bin",
        "model.safetensors",
    )
    for name in (*names, "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(bait)
    index = json.dumps({"metadata": {}, "weight_map": {"classifier.weight": "pytorch_model.bin"}})
    (folder / "pytorch_model.bin.index.json").write_text(index)
    for model_class in (KAdapterForSequenceClassification, AutoModelForSequenceClassification):
        assert_same_weights(model_class.from_pretrained(folder), once[1])
    AutoModel.from_pretrained(folder)
    model = KAdapterModel.from_pretrained(folder)
    model.delete_knowledge_adapter("factual")
    model.load_knowledge_adapter(folder, "factual")
    for name in (FACTUAL, "head.safetensors"):
        (folder / name).write_bytes(bait)
        with pytest.raises(KAdapterLoadError, match="not a safetensors file"):
            KAdapterForSequenceClassification.from_pretrained(folder)
        shutil.copyfile(once[0] / name, folder / name)
    assert not mark.exists()


def test_a_backbone_that_is_a_pickle_of_anything_else_is_refused(backbone, tmp_path):
    mark = tmp_path / "unpickled"
    place = tmp_path / "backbone"
    place.mkdir()
    shutil.copyfile(Path(backbone) / "config.json", place / "config.json")
    torch.save({"embeddings.word_embeddings.weight": Bait(mark)}, place / "pytorch_model.bin")
    with pytest.raises(KAdapterLoadError, match="can't be loaded"):
        KAdapterModel.from_backbone(place)
    assert not mark.exists()


def test_a_peft_adapter_beside_it_that_is_damaged_is_refused(folder):
    (folder / "config.json").rename(folder / "config.txt")
    (folder / "adapter_config.json").write_text("junk")
    with pytest.raises(KAdapterLoadError, match="adapter_config.json' is not valid JSON"):
        KAdapterForSequenceClassification.from_pretrained(folder)


def test_stray_safetensors_in_the_folder_change_nothing(folder, once):
    """What a stock model left there, for one."""
    wrong = {name: tensor + 1 for name, tensor in once[1].state_dict().items() if tensor.is_floating_point()}
    save_file(wrong, folder / "model.safetensors")
    assert_same_weights(KAdapterForSequenceClassification.from_pretrained(folder), once[1])


def test_layers_of_a_new_head_are_initialised_in_their_order(build, tmp_path):
    """The same seed gives the same head in every process, independently of the iteration order of sets."""
    build(KAdapterModel).save_pretrained(tmp_path)
    set_seed(3)
    model = KAdapterForEntityTyping.from_pretrained(tmp_path, num_labels=4)
    set_seed(3)
    width, std = model.config.hidden_size, model.backbone.config.initializer_range
    for layer, shape in ((model.dense, (width, width)), (model.out_proj, (4, width))):
        assert torch.equal(layer.weight, torch.empty(shape).normal_(std=std))
