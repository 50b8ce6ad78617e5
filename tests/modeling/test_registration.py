"""Importing the package registers its models with the Auto classes and does not change transformers otherwise."""

import importlib
import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch
from conftest import ALL_CLASSES, inputs_for, small_adapter
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    pipeline,
)

import kadapter_hf
from kadapter_hf import (
    KAdapterConfig,
    KAdapterForDependencyParsing,
    KAdapterForEntityTyping,
    KAdapterForMaskedLM,
    KAdapterForMultipleChoice,
    KAdapterForQuestionAnswering,
    KAdapterForRelationClassification,
    KAdapterForSequenceClassification,
    KAdapterForTokenClassification,
    KAdapterModel,
)


AUTO = {
    KAdapterModel: AutoModel,
    KAdapterForMaskedLM: AutoModelForMaskedLM,
    KAdapterForSequenceClassification: AutoModelForSequenceClassification,
    KAdapterForTokenClassification: AutoModelForTokenClassification,
    KAdapterForQuestionAnswering: AutoModelForQuestionAnswering,
    KAdapterForMultipleChoice: AutoModelForMultipleChoice,
    KAdapterForEntityTyping: AutoModelForSequenceClassification,
    KAdapterForRelationClassification: AutoModelForSequenceClassification,
}
every_class = pytest.mark.parametrize("model_class", AUTO, ids=lambda model_class: model_class.__name__)


def test_every_model_class_has_its_auto_class_where_there_is_one_for_its_task():
    assert set(AUTO) == set(ALL_CLASSES) - {KAdapterForDependencyParsing}


def test_configuration_is_known_by_its_model_type():
    assert type(AutoConfig.for_model("kadapter")) is KAdapterConfig


@every_class
@torch.no_grad()
def test_auto_class_loads_what_was_saved(model_class, build, tmp_path):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    loaded, info = AUTO[model_class].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class and not any(info.values())
    inputs = inputs_for(model_class)
    assert torch.equal(loaded(**inputs).to_tuple()[0], model(**inputs).to_tuple()[0])


@every_class
def test_auto_class_passes_arguments_on(model_class, build, tmp_path):
    build(model_class).save_pretrained(tmp_path)
    loaded = AUTO[model_class].from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager", freeze_backbone=False, device_map="cpu"
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == loaded.backbone.config._attn_implementation == "eager"
    assert loaded.adapters["factual"].attention._attn_implementation == "eager"
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@every_class
def test_auto_class_builds_from_a_configuration(model_class, build):
    model = build(model_class)
    config = KAdapterConfig.from_dict(model.config.to_dict() | {"architectures": [model_class.__name__]})
    assert type(AUTO[model_class].from_config(config)) is model_class


def test_auto_class_of_several_takes_the_plain_classifier_for_a_model_without_a_head(build, tmp_path):
    build().save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is KAdapterForSequenceClassification
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}


def test_auto_class_of_several_builds_the_plain_classifier_from_a_configuration_that_names_none(build):
    assert type(AutoModelForSequenceClassification.from_config(build().config)) is KAdapterForSequenceClassification


def test_auto_model_of_any_class_is_the_one_without_a_head(build, tmp_path):
    build(KAdapterForEntityTyping).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is KAdapterModel


def test_auto_class_that_does_not_fit_says_so(build, tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="KAdapterConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def fresh(backbone, tmp_path_factory) -> dict:
    """
    A fresh process: the modules after importing the package, those after using one of it, and the class of a loaded model.
    """
    folder = tmp_path_factory.mktemp("typing") / "model"
    KAdapterForEntityTyping.from_backbone(backbone, {"factual": small_adapter()}).save_pretrained(folder)
    code = (
        "import sys, json; from transformers import PreTrainedModel; before = set(sys.modules); import kadapter_hf;"
        "added = sorted(set(sys.modules) - before);"
        "kadapter_hf.features.relation_features; used = sorted(set(sys.modules) - before);"
        "from transformers import AutoModelForSequenceClassification as Auto;"
        f"module = type(Auto.from_pretrained({str(folder)!r})).__module__;"
        "print(json.dumps({'added': added, 'used': used, 'module': module}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_one_import_is_enough(fresh):
    assert fresh["module"] == "kadapter_hf.modeling.heads_kadapter"


def test_import_leaves_optional_packages_alone(fresh):
    """They are slow to import, and some are optional; imports by transformers itself don't count."""
    assert not {"peft", "datasets", "matplotlib"} & set(fresh["added"])


def test_submodules_are_imported_when_they_are_used(fresh):
    assert not {"kadapter_hf.features", "kadapter_hf.pretraining"} & set(fresh["added"])
    assert "kadapter_hf.features" in fresh["used"] and "kadapter_hf.pretraining" not in fresh["used"]


def test_import_twice_is_harmless():
    importlib.reload(kadapter_hf)
    assert type(AutoConfig.for_model("kadapter")).__name__ == "KAdapterConfig"


def test_public_names_are_there():
    for name in kadapter_hf.__all__:
        assert getattr(kadapter_hf, name).__doc__
    assert kadapter_hf.__all__ == sorted(kadapter_hf.__all__)
    assert kadapter_hf.__version__ == importlib.metadata.version("kadapter-hf")


def test_other_models_pipelines_still_work(tokenizer):
    """A pipeline looks for its model's class among all registered classes."""
    from transformers import BertConfig

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, **sizes))
    assert pipeline("text-classification", model=model, tokenizer=tokenizer)("the cat sat")[0]["score"] > 0
