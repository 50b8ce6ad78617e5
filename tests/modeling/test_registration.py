"""Importing the package makes the Auto classes know it."""

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import kadapter_hf
from kadapter_hf import KAdapterConfig


@pytest.mark.parametrize(
    ("auto_class", "name"),
    [
        (AutoModel, "KAdapterModel"),
        (AutoModelForMaskedLM, "KAdapterForMaskedLM"),
        (AutoModelForSequenceClassification, "KAdapterForSequenceClassification"),
        (AutoModelForSequenceClassification, "KAdapterForEntityTyping"),
        (AutoModelForSequenceClassification, "KAdapterForRelationClassification"),
        (AutoModelForTokenClassification, "KAdapterForTokenClassification"),
        (AutoModelForQuestionAnswering, "KAdapterForQuestionAnswering"),
        (AutoModelForMultipleChoice, "KAdapterForMultipleChoice"),
    ],
)
def test_auto_class_gives_the_class_that_was_saved(build, tmp_path, auto_class, name):
    build(getattr(kadapter_hf, name)).save_pretrained(tmp_path)
    assert type(auto_class.from_pretrained(tmp_path)) is getattr(kadapter_hf, name)


def test_auto_config_knows_the_model_type(build, tmp_path):
    build().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is KAdapterConfig


def test_a_tiny_config_builds_through_auto_model(build):
    config = build().config
    assert type(AutoModel.from_config(config)).__name__ == "KAdapterModel"
    assert type(AutoModelForSequenceClassification.from_config(config)).__name__ == "KAdapterForSequenceClassification"
