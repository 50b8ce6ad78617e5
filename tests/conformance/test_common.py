"""
transformers' own common tests of models, configurations and pipelines, for every class of this package.

Run them with `make conformance`, which fetches them (prepare.py) and sets TRANSFORMERS_TESTS to their folder.

The pipelines' common tests load tiny models from the Hub, and call tests of each pipeline that are not distributed: here
they load models that are saved before, and call tests of the same kind below. transformers 5 has no pipeline for question
answering or multiple choice.

EXPECTED lists the tests that fail, and why. Any other failure fails the run, as does a listed test that passes.
"""

import contextlib
import copy
import inspect
import os
import sys
import tempfile
import unittest
from collections.abc import Callable

import pytest
import torch
from conftest import ALL_CLASSES, TINY, inputs_for, labels_for, new_tokenizer, small_adapter
from transformers import pipeline, set_seed
from transformers.models.auto import modeling_auto

from kadapter_hf import (
    KAdapterConfig,
    KAdapterForMaskedLM,
    KAdapterForMultipleChoice,
    KAdapterForQuestionAnswering,
    KAdapterForSequenceClassification,
    KAdapterForTokenClassification,
    KAdapterLoadError,
    KAdapterModel,
)


os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = os.environ["TRANSFORMERS_TESTS"]
sys.path.insert(0, os.environ["TRANSFORMERS_TESTS"])

from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_pipeline_mixin import PipelineTesterMixin, pipeline_test_mapping, tiny_model_summary


# The common tests know by these names which class is for which task, and so which tests apply to it.
COMMON = {
    "": KAdapterModel,
    "FOR_MASKED_LM_": KAdapterForMaskedLM,
    "FOR_MULTIPLE_CHOICE_": KAdapterForMultipleChoice,
    "FOR_QUESTION_ANSWERING_": KAdapterForQuestionAnswering,
    "FOR_SEQUENCE_CLASSIFICATION_": KAdapterForSequenceClassification,
    "FOR_TOKEN_CLASSIFICATION_": KAdapterForTokenClassification,
}
for task, model_class in COMMON.items():
    getattr(modeling_auto, f"MODEL_{task}MAPPING_NAMES")["kadapter"] = model_class.__name__

# By name: the model type of the backbone, and fields of the configuration.
SETUPS = {
    "Roberta": ("roberta", {}),
    "RobertaUnfrozen": ("roberta", {"freeze_backbone": False}),
    "ModernBert": ("modernbert", {}),
}


class ModelTester:
    """What the common tests ask of the tests of a model: its configuration and inputs."""

    is_training = True
    batch_size = 4
    seq_length = 10
    num_choices = 2
    num_labels = 2
    num_hidden_layers = 2
    num_attention_heads = 2
    hidden_size = 32

    def __init__(self, model_class: type, model_type: str, fields: dict):
        self.model_class = model_class
        self.backbone_config = TINY[model_type]
        self.fields = fields

    def get_config(self) -> KAdapterConfig:
        backbone_config = copy.deepcopy(self.backbone_config)
        backbone_config = type(backbone_config)(
            **(backbone_config.to_dict() | {"num_hidden_layers": self.num_hidden_layers, "layer_types": None})
        )
        return KAdapterConfig(
            backbone_name_or_path=None,
            backbone_config=backbone_config,
            knowledge_adapters={name: small_adapter() for name in ("factual", "linguistic")},
            num_labels=self.num_labels,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[KAdapterConfig, dict[str, torch.Tensor]]:
        inputs = inputs_for(self.model_class, self.batch_size)
        if self.model_class is KAdapterForMultipleChoice:  # `_prepare_for_class` adds the choices
            inputs = inputs_for(KAdapterModel, self.batch_size)
        return self.get_config(), inputs


class CommonTests(ModelTesterMixin, PipelineTesterMixin):
    """The common tests of one class with one backbone."""

    model_class: type
    setup: str
    # Not only of models that are newer than this test.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = ModelTester(self.model_class, *SETUPS[self.setup])

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class not in COMMON.values():
            inputs |= labels_for(model_class, inputs)
        return inputs

    def subTest(self, *args, **kwargs):
        """One class is tested at a time, so a test fails as a whole, which also makes it possible to expect it."""
        return contextlib.nullcontext()

    def run_pipeline_test(self, task, repo_name, model_architecture, **kwargs):
        set_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            model_architecture(self.model_tester.get_config()).save_pretrained(folder)
            new_tokenizer().save_pretrained(folder)
            super().run_pipeline_test(task, folder, model_architecture, **kwargs)


def everywhere(setup: str, model_class: type) -> bool:
    return True


def frozen(setup: str, model_class: type) -> bool:
    return SETUPS[setup][1].get("freeze_backbone", True)


# By name of the test: where it fails, with which error, and why.
EXPECTED: dict[str, tuple[Callable[[str, type], bool], type[Exception], str]] = {
    "test_load_save_without_tied_weights": (
        everywhere,
        FileNotFoundError,
        "by design: there is no model.safetensors; each adapter, the head and the backbone have a file of their own",
    ),
    "test_save_load_keys_to_ignore_on_save": (
        lambda setup, model_class: frozen(setup, model_class) or model_class is KAdapterForMaskedLM,
        FileNotFoundError,
        "by design: there is no model.safetensors. (Elsewhere, all weights are saved, and the test does nothing.)",
    ),
    "test_model_weights_reload_no_missing_tied_weights": (
        everywhere,
        AssertionError,
        "by design: a model.safetensors, which the test puts beside the package's files, is not read",
    ),
    "test_load_with_mismatched_shapes": (
        lambda setup, model_class: model_class is KAdapterForSequenceClassification,
        KAdapterLoadError,
        "by design: a head with another number of labels is an OSError, like every repository that does not fit",
    ),
    "test_can_load_ignoring_mismatched_shapes": (
        lambda setup, model_class: model_class is KAdapterForSequenceClassification,
        KAdapterLoadError,
        "by design: a head with another number of labels is an OSError, like every repository that does not fit",
    ),
    "test_retain_grad_hidden_states_attentions": (
        frozen,
        RuntimeError,
        "by design: no gradients through a frozen backbone, whose hidden states these are",
    ),
    **dict.fromkeys(
        (
            "test_training_gradient_checkpointing",
            "test_training_gradient_checkpointing_use_reentrant_false",
            "test_training_gradient_checkpointing_use_reentrant_true",
        ),
        (
            lambda setup, model_class: frozen(setup, model_class) and model_class is not KAdapterModel,
            AssertionError,
            "by design: a frozen backbone, to which the layer belongs that the test looks at, is in evaluation mode",
        ),
    ),
    "test_can_init_all_missing_weights": (
        lambda setup, model_class: SETUPS[setup][0] == "modernbert",
        AssertionError,
        "transformers: for classes that are not its own, it leaves out modules without parameters of their own when it "
        "initialises what a state dict lacks, and ModernBERT initialises some weights in such modules",
    ),
}


# ---- Configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize(
    "check", [name for name in vars(ConfigTester) if name.startswith(("create_and_test_", "check_"))]
)
def test_configuration(setup, check):
    class Parent(unittest.TestCase):
        model_tester = ModelTester(KAdapterModel, *SETUPS[setup])

    getattr(ConfigTester(Parent(), config_class=KAdapterConfig), check)()


# ---- Pipelines ------------------------------------------------------------------------------------------------------


class OnePipelineTests:
    """Tests of one pipeline; `PipelineTesterMixin` runs ten more texts in batches of four."""

    task: str
    texts = ["rome is the capital of italy", "marie curie was born in the old city", "the cat sat"]
    arguments: dict = {}

    def get_test_pipeline(self, model, tokenizer, dtype="float32"):
        return pipeline(self.task, model=model, tokenizer=tokenizer, dtype=dtype), self.texts

    def run_pipeline_test(self, runner, texts):
        found = [runner(text, **self.arguments) for text in texts]
        found += runner(texts, batch_size=1, **self.arguments)
        found += runner(texts, batch_size=2, **self.arguments)
        for text, each in zip(texts * 3, found, strict=True):
            self.check(text, each)

    def check(self, text, found):
        raise NotImplementedError


class FeatureExtractionPipelineTests(OnePipelineTests):
    task = "feature-extraction"

    def check(self, text, found):
        (states,) = found
        assert len(states) >= len(text.split()) + 2  # more where the batch is padded
        assert all(len(state) == ModelTester.hidden_size for state in states)


class FillMaskPipelineTests(OnePipelineTests):
    task = "fill-mask"
    texts = ["rome is the <mask> of italy", "<mask> was born in the old city"]
    arguments = {"top_k": 3}

    def check(self, text, found):
        assert len(found) == 3
        for entry in found:
            assert entry.keys() == {"sequence", "score", "token", "token_str"}
            assert 0 < entry["score"] < 1


class TextClassificationPipelineTests(OnePipelineTests):
    task = "text-classification"
    arguments = {"top_k": None}

    def check(self, text, found):
        assert {entry["label"] for entry in found} == {"LABEL_0", "LABEL_1"}
        assert sum(entry["score"] for entry in found) == pytest.approx(1, abs=1e-2)


class TokenClassificationPipelineTests(OnePipelineTests):
    task = "token-classification"
    arguments = {"ignore_labels": []}

    def check(self, text, found):
        assert [entry["word"] for entry in found] == text.split()
        assert {entry["entity"] for entry in found} <= {"LABEL_0", "LABEL_1"}


class ZeroShotClassificationPipelineTests(OnePipelineTests):
    task = "zero-shot-classification"
    arguments = {"candidate_labels": ["capital", "cat"]}

    def get_test_pipeline(self, model, tokenizer, dtype="float32"):
        model.config.label2id = {"entailment": 0, "contradiction": 1}
        kwargs = {"model": model, "tokenizer": tokenizer, "dtype": dtype}
        return pipeline(self.task, **kwargs, **self.arguments), self.texts

    def check(self, text, found):
        assert found["sequence"] == text
        assert sorted(found["labels"]) == ["capital", "cat"]
        assert sum(found["scores"]) == pytest.approx(1, abs=1e-2)


PIPELINES = {
    KAdapterModel: {"feature-extraction": FeatureExtractionPipelineTests},
    KAdapterForMaskedLM: {"fill-mask": FillMaskPipelineTests},
    KAdapterForSequenceClassification: {
        "text-classification": TextClassificationPipelineTests,
        "zero-shot": ZeroShotClassificationPipelineTests,
    },
    KAdapterForTokenClassification: {"token-classification": TokenClassificationPipelineTests},
}
for tests in PIPELINES.values():
    for task, test in tests.items():
        pipeline_test_mapping[task] = {"test": f"{__name__}.{test.__name__}"}
for model_class in PIPELINES:
    tiny_model_summary[model_class.__name__] = {
        "tokenizer_classes": ["PreTrainedTokenizerFast"],
        "processor_classes": [],
    }


# ---- Models ---------------------------------------------------------------------------------------------------------

MARKERS = {"entity_start", "subject_start", "object_start", "word_starts"}


def make_test_case(setup: str, model_class: type) -> type[unittest.TestCase]:
    """The common tests of one class in one setup, those in `EXPECTED` marked."""
    attributes = {
        "__module__": __name__,
        "model_class": model_class,
        "setup": setup,
        "all_model_classes": (model_class,),
        "pipeline_model_mapping": dict.fromkeys(PIPELINES.get(model_class, {}), model_class),
        "additional_model_inputs": sorted(inspect.signature(model_class.forward).parameters.keys() & MARKERS),
    }
    case = type(f"Test{setup}{model_class.__name__}", (CommonTests, unittest.TestCase), attributes)
    for name, (applies, error, reason) in EXPECTED.items():
        test = getattr(case, name)  # fails if there is no such test any more
        if applies(setup, model_class):
            setattr(case, name, pytest.mark.xfail(raises=error, reason=reason, strict=True)(test))
    return case


for setup in SETUPS:
    for model_class in ALL_CLASSES:
        case = make_test_case(setup, model_class)
        globals()[case.__name__] = case
del case
