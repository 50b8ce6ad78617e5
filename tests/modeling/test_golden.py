"""Repositories of an earlier version (fixtures/golden) load, give the same results, and are written in the same way."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ALL_CLASSES, load_script
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainerState, TrainingArguments

from kadapter_hf import KAdapterConfig, KAdapterForTokenClassification, KAdapterModel


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
golden = load_script(GOLDEN / "make.py")
CHECKPOINT = "checkpoint-2"
# Processors may round the last of bfloat16's 8 bits differently.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
# The fields of adapter_config.json that don't depend on the version of PEFT.
PEFT_FIELDS = (
    "peft_type",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "target_modules",
)


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory) -> Iterator[Path]:
    """The working directory, with the backbones in `backbones/`, as the repositories name them."""
    folder = tmp_path_factory.mktemp("workspace")
    golden.write_backbones(folder / "backbones")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module", params=golden.CASES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def written(name, workspace) -> Path:
    """The repository, built and saved by the code under test."""
    folder = workspace / "written" / name
    golden.save(golden.CASES[name].build(), folder)
    return folder


@pytest.fixture(scope="module")
def loaded_with_report(name, workspace) -> tuple[PreTrainedModel, dict]:
    return golden.CASES[name].model_class.from_pretrained(GOLDEN / name, output_loading_info=True)


@pytest.fixture(scope="module")
def loaded(loaded_with_report) -> PreTrainedModel:
    return loaded_with_report[0]


@pytest.fixture(scope="module")
def written_again(name, loaded, workspace) -> Path:
    """The golden repository, loaded and saved by the code under test."""
    folder = workspace / "again" / name
    if name == CHECKPOINT:
        golden.set_to_train(loaded)  # otherwise its backbone, which no step has changed, would not be stored
    golden.save(loaded, folder)
    return folder


@pytest.fixture(scope="module")
def computed() -> dict[str, torch.Tensor]:
    return load_file(golden.OUTPUTS)


def assert_as_computed(model, name: str, computed: dict[str, torch.Tensor]) -> None:
    """The model returns the tensors that were computed when the repository was written, and no others."""
    found = golden.outputs_of(model)
    expected = {key.partition("/")[2]: value for key, value in computed.items() if key.startswith(f"{name}/")}
    assert expected and found.keys() == expected.keys()
    for key, tensor in expected.items():
        tolerance = TOLERANCE[tensor.dtype]
        torch.testing.assert_close(
            found[key], tensor, atol=tolerance, rtol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


def files(folder: Path) -> list[str]:
    """The files of a repository, without its code and model card, which golden repositories don't contain."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.suffix not in (".py", ".md"))


def weight_files(folder: Path) -> dict[str, Path]:
    return {file: folder / file for file in files(folder) if file.endswith(".safetensors")}


def adapters(folder: Path) -> dict[str, bytes]:
    return {file: path.read_bytes() for file, path in weight_files(folder).items() if file.startswith("adapters/")}


def described(path: Path) -> dict:
    """The header of a file: its metadata, and each tensor's dtype and shape, in their order."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return {"metadata": file.metadata()} | {
            name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()
        }


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def config_of(folder: Path, backbone: str) -> dict:
    """
    A config.json without what depends on the version of transformers: its number, and those fields of the backbone's own
    configuration that golden/make.py does not set. They are transformers' own, and one of them, `_name_or_path`, says
    where the backbone was loaded from last. `auto_map` is compared in a test of its own.
    """
    config = read(folder / "config.json")
    del config["transformers_version"], config["auto_map"]
    config.pop("custom_pipelines", None)  # added since
    kept = {"model_type", "dtype", *golden.BACKBONES[backbone]}
    config["backbone_config"] = {key: value for key, value in config["backbone_config"].items() if key in kept}
    assert config["backbone_config"].keys() == kept
    return config


# ---- What is covered ------------------------------------------------------------------------------------------------


def test_each_class_has_a_golden_repository():
    assert {case.model_class for case in golden.CASES.values()} == set(ALL_CLASSES)


def test_each_golden_repository_is_known():
    assert {path.name for path in GOLDEN.iterdir() if (path / "config.json").exists()} == set(golden.CASES)


def test_golden_repositories_hold_no_code(name):
    """The installed package loads them, whatever `auto_map` names."""
    assert "auto_map" in read(GOLDEN / name / "config.json")
    assert not list((GOLDEN / name).rglob("*.py"))


# ---- Loading --------------------------------------------------------------------------------------------------------


def test_own_class_computes_the_same(name, loaded, computed):
    assert_as_computed(loaded, name, computed)


@pytest.mark.parametrize("name", [name for name, case in golden.CASES.items() if case.auto_class], scope="module")
def test_auto_class_gives_the_same_class_which_computes_the_same(name, computed):
    case = golden.CASES[name]
    model = case.auto_class.from_pretrained(GOLDEN / name)
    assert type(model) is case.model_class
    assert_as_computed(model, name, computed)


def test_auto_config_gives_a_configuration(name):
    assert type(AutoConfig.from_pretrained(GOLDEN / name)) is KAdapterConfig


def test_no_weight_of_a_golden_repository_is_new_or_left_over(name, loaded_with_report):
    assert not any(loaded_with_report[1].values())


def test_backbone_may_be_in_another_folder(computed, workspace, tmp_path):
    shutil.copytree(workspace / "backbones" / "roberta", tmp_path / "moved")
    model = KAdapterModel.from_pretrained(GOLDEN / "several-adapters", backbone=tmp_path / "moved")
    assert_as_computed(model, "several-adapters", computed)


def test_adapter_saved_alone_loads_and_computes_the_same(computed):
    assert_as_computed(golden.model_with_adapter(golden.ALONE), golden.ALONE.stem, computed)


def test_trainer_resumes_from_a_golden_checkpoint(computed, tmp_path):
    checkpoint = tmp_path / CHECKPOINT
    shutil.copytree(GOLDEN / CHECKPOINT, checkpoint)
    TrainerState(global_step=2, max_steps=2, train_batch_size=2).save_to_json(checkpoint / "trainer_state.json")
    model = KAdapterForTokenClassification.from_backbone(
        "backbones/distilbert", adapters=golden.FACTUAL, freeze_backbone=False
    )
    inputs = golden.inputs_for(KAdapterForTokenClassification)
    inputs["labels"] = torch.zeros_like(inputs["input_ids"])
    rows = [{key: value[row] for key, value in inputs.items()} for row in range(2)]
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.0, "report_to": "none"}
    arguments = TrainingArguments(tmp_path, use_cpu=True, disable_tqdm=True, **settings)
    Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=str(checkpoint))
    assert_as_computed(model, CHECKPOINT, computed)


# ---- Writing --------------------------------------------------------------------------------------------------------


def test_same_files_are_written(name, written):
    assert files(written) == files(GOLDEN / name)


def test_adapter_files_are_written_byte_for_byte(name, written):
    assert adapters(written) == adapters(GOLDEN / name)


def test_tensors_of_each_file_have_the_same_names_dtypes_and_shapes(name, written):
    for file, path in weight_files(GOLDEN / name).items():
        assert described(written / file) == described(path), file


def test_tensors_of_each_file_have_the_same_values(name, written):
    for file, path in weight_files(GOLDEN / name).items():
        found, expected = load_file(written / file), load_file(path)
        assert [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)] == [], file


def test_index_is_written_the_same(name, written):
    """The weight_map, the fingerprint of each file, and the sizes."""
    index = "model.safetensors.index.json"
    assert read(written / index) == read(GOLDEN / name / index)


def test_configuration_is_written_the_same(name, written):
    backbone = golden.CASES[name].backbone
    assert config_of(written, backbone) == config_of(GOLDEN / name, backbone)


def test_auto_map_is_written_the_same(name, written):
    assert read(written / "config.json")["auto_map"] == read(GOLDEN / name / "config.json")["auto_map"]


def test_settings_of_the_peft_adapter_are_written_the_same(workspace):
    folder = workspace / "peft"
    golden.save(golden.CASES["lora"].build(), folder)
    found, expected = (read(place / "adapter_config.json") for place in (folder, GOLDEN / "lora"))
    assert {key: found[key] for key in PEFT_FIELDS} == {key: expected[key] for key in PEFT_FIELDS}


def test_adapter_is_saved_alone_byte_for_byte(workspace):
    model = golden.CASES["several-adapters"].build()
    path = model.save_knowledge_adapter(workspace / "alone.safetensors", golden.ALONE_NAME)
    assert path.read_bytes() == golden.ALONE.read_bytes()


def test_each_adapter_of_a_loaded_repository_is_saved_alone_byte_for_byte(name, loaded, tmp_path):
    for adapter in loaded.config.knowledge_adapters:
        loaded.save_knowledge_adapter(tmp_path, adapter)
    assert adapters(tmp_path) == adapters(GOLDEN / name)


def test_fingerprint_of_the_backbone_does_not_depend_on_its_folder(workspace, tmp_path):
    shutil.copytree(workspace / "backbones" / "roberta", tmp_path / "moved")
    fingerprint = KAdapterModel.from_backbone(tmp_path / "moved").config.backbone_fingerprint
    assert fingerprint == read(GOLDEN / "several-adapters" / "config.json")["backbone_fingerprint"]


# ---- Writing what was loaded ----------------------------------------------------------------------------------------


def test_a_loaded_repository_is_saved_with_the_same_weights(name, written_again):
    found, expected = weight_files(written_again), weight_files(GOLDEN / name)
    assert {file: path.read_bytes() for file, path in found.items()} == {
        file: path.read_bytes() for file, path in expected.items()
    }


def test_a_loaded_repository_is_saved_with_the_same_index_and_configuration(name, written_again):
    backbone, index = golden.CASES[name].backbone, "model.safetensors.index.json"
    assert read(written_again / index) == read(GOLDEN / name / index)
    assert config_of(written_again, backbone) == config_of(GOLDEN / name, backbone)
