"""Arguments of from_backbone, from_pretrained and the configurations: each is applied, or refused by name."""

import json
import os
import shutil

import pytest
import torch
from conftest import batch, small_adapter
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, RobertaModel

from kadapter_hf import (
    KAdapterConfig,
    KAdapterConfigError,
    KAdapterForMaskedLM,
    KAdapterForSequenceClassification,
    KAdapterLoadError,
    KAdapterModel,
    KnowledgeAdapterConfig,
)


@pytest.fixture
def folder(build, tmp_path):
    build(KAdapterForSequenceClassification, num_labels=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---- Misspelt ones --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "field", "near"),
    [
        (lambda **kwargs: KnowledgeAdapterConfig(**kwargs), "hiden_size", "hidden_size"),
        (lambda **kwargs: KAdapterConfig(**kwargs), "num_lables", "num_labels"),
        (lambda **kwargs: KAdapterConfig(**kwargs), "fusions", "fusion"),
        (lambda **kwargs: KAdapterConfig(knowledge_adapters={"factual": kwargs}), "hiden_size", "hidden_size"),
    ],
)
def test_misspelt_field_is_refused_with_the_nearest(make, field, near):
    with pytest.raises(KAdapterConfigError, match=f"has no field '{field}'; did you mean '{near}'"):
        make(**{field: 3})


def test_configuration_can_be_made_from_all_of_its_own_fields(folder):
    config = KAdapterConfig.from_pretrained(folder)
    assert KAdapterConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_unknown_field_of_an_adapter_is_refused_with_all_that_there_are():
    with pytest.raises(KAdapterConfigError, match=r"no field 'layers'; it has \[.*'backbone_layers'"):
        KnowledgeAdapterConfig(layers=[0, 1])


@pytest.mark.parametrize(
    ("field", "near"), [("num_lables", "num_labels"), ("hidden_dropout_pro", "hidden_dropout_prob")]
)
def test_misspelt_argument_of_a_load_is_refused_with_the_nearest(field, near, backbone, folder):
    message = f"'{field}' is neither a field .* did you mean '{near}'"
    with pytest.raises(KAdapterConfigError, match=message):
        KAdapterModel.from_backbone(backbone, **{field: 3})
    with pytest.raises(KAdapterConfigError, match=message):
        KAdapterForSequenceClassification.from_pretrained(folder, **{field: 3})


# ---- Fields of the backbone -----------------------------------------------------------------------------------------


def test_field_of_the_backbone_is_applied_saved_and_loaded(backbone, tmp_path):
    model = KAdapterModel.from_backbone(backbone, {"factual": small_adapter()}, hidden_dropout_prob=0.0)
    model.save_pretrained(tmp_path)
    for found in (model, KAdapterModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert found.config.backbone_config.hidden_dropout_prob == 0.0
        assert found.backbone.embeddings.dropout.p == 0.0
    assert not (tmp_path / "backbone.safetensors").exists()


@pytest.mark.parametrize("stored", [False, True])
def test_field_of_the_backbone_is_applied_by_from_pretrained(stored, build, tmp_path):
    model = build()
    if stored:
        model.unfreeze_backbone()
        model.train()
    model.save_pretrained(tmp_path)
    found = KAdapterModel.from_pretrained(tmp_path, hidden_dropout_prob=0.25)
    assert found.backbone.embeddings.dropout.p == found.config.backbone_config.hidden_dropout_prob == 0.25


def test_size_of_the_backbone_can_not_be_changed(backbone, folder):
    with pytest.raises(KAdapterConfigError, match=r"num_hidden_layers of a backbone can't be changed.*\(4 to 2\)"):
        KAdapterModel.from_backbone(backbone, num_hidden_layers=2)
    with pytest.raises(KAdapterConfigError, match="num_hidden_layers of a backbone can't be changed"):
        KAdapterForSequenceClassification.from_pretrained(folder, num_hidden_layers=2)


@pytest.mark.parametrize("tied", [True, False])
def test_tying_of_the_backbone_is_a_field_of_the_configuration(tied, backbone):
    config = KAdapterConfig(
        backbone_name_or_path=None,
        backbone_config=AutoConfig.from_pretrained(backbone).to_dict(),
        tie_word_embeddings=tied,
    )
    model = KAdapterForMaskedLM(config)
    output, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert config.tie_word_embeddings == config.backbone_config.tie_word_embeddings == tied
    assert (output is embeddings) == tied


# ---- What is asked for happens --------------------------------------------------------------------------------------


def test_attentions_asked_for_in_the_configuration_are_returned(backbone):
    model = KAdapterModel.from_backbone(
        backbone, {"factual": small_adapter()}, output_attentions=True, attn_implementation="eager"
    )
    with torch.no_grad():
        assert len(model(**batch()).attentions) == 4
        assert model(**batch(), output_attentions=False).attentions is None


@pytest.mark.parametrize("dtype", [None, torch.float16, "bfloat16"])
def test_dtype_of_the_configuration_is_that_of_the_weights(dtype, backbone, folder):
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    for model in (
        KAdapterModel.from_backbone(backbone, {"factual": small_adapter()}, dtype=dtype),
        KAdapterForSequenceClassification.from_pretrained(folder, dtype=dtype),
        AutoModel.from_pretrained(folder, dtype=dtype),
    ):
        assert model.config.dtype == model.dtype == expected


def test_former_name_of_dtype_does_not_make_the_backbone_another(backbone, tmp_path):
    model = KAdapterModel.from_backbone(backbone, {"factual": small_adapter()}, torch_dtype=torch.bfloat16)
    model.save_knowledge_adapter(tmp_path, "factual")
    KAdapterModel.from_backbone(backbone, tmp_path)


def test_use_safetensors_is_for_the_backbone_too(backbone, build, tmp_path):
    pickled = tmp_path / "backbone"
    AutoModelForMaskedLM.from_pretrained(backbone).save_pretrained(pickled)
    model = AutoModel.from_pretrained(pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    KAdapterModel.from_backbone(pickled, {"factual": small_adapter()}).save_pretrained(tmp_path / "model")
    assert KAdapterModel.from_pretrained(tmp_path / "model").active_knowledge_adapters == ["factual"]
    for load in (
        lambda: KAdapterModel.from_pretrained(tmp_path / "model", use_safetensors=True),
        lambda: AutoModel.from_pretrained(tmp_path / "model", use_safetensors=True),
        lambda: KAdapterModel.from_backbone(pickled, use_safetensors=True),
    ):
        with pytest.raises(KAdapterLoadError, match="model.safetensors"):
            load()


def test_backbone_loaded_from_a_relative_path_is_found_from_elsewhere(backbone, tmp_path, monkeypatch):
    shutil.copytree(backbone, tmp_path / "backbone")
    monkeypatch.chdir(tmp_path)
    model = KAdapterModel.from_backbone(RobertaModel.from_pretrained("backbone"), {"factual": small_adapter()})
    model.save_pretrained("model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = KAdapterModel.from_pretrained(os.path.join("..", "model"))
    assert found.config.backbone_name_or_path == str(tmp_path / "backbone")


def test_all_tensors_of_another_head_are_named_with_the_way_out(folder):
    with pytest.raises(KAdapterLoadError) as caught:
        KAdapterForSequenceClassification.from_pretrained(folder, num_labels=5)
    for part in (
        "'classifier.weight' has shape (3, 32)",
        "'classifier.bias' has shape (3,)",
        "ignore_mismatched_sizes=True",
    ):
        assert part in str(caught.value)


def test_configuration_saved_alone_names_no_code(folder, tmp_path):
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "alone")
    assert "auto_map" not in json.loads((tmp_path / "alone" / "config.json").read_text())


def test_model_built_on_meta_is_initialised_by_init_weights(backbone):
    config = KAdapterModel.from_backbone(backbone, {"factual": small_adapter()}).config
    with torch.device("meta"):
        model = KAdapterModel(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e30)
    model.init_weights()
    for name, parameter in model.named_parameters():
        assert parameter.abs().max() < 10, name


def test_state_dict_without_a_folder_leaves_no_memory_uninitialised(backbone):
    config = KAdapterModel.from_backbone(backbone, {"factual": small_adapter()}).config
    model = KAdapterModel.from_pretrained(None, config=config, state_dict={})
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 10, name
    assert 0 < model.backbone.embeddings.word_embeddings.weight.std() < 1
