"""The package reproduces the outputs of the original implementation (tests/fixtures/reference/README.md)."""

import copy
import functools
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_as_the_original
from transformers import RobertaConfig, RobertaModel

from kadapter_hf import (
    KAdapterConfig,
    KAdapterForEntityTyping,
    KAdapterForMultipleChoice,
    KAdapterForRelationClassification,
    KAdapterModel,
    KnowledgeAdapterConfig,
)


REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference"
SIZES = json.loads((REFERENCE / "reference_outputs.json").read_text())
# The original's names: fac and lin for the adapters, task_dense_<name> and task_dense for the fusion.
NAMES = {"factual": "fac", "linguistic": "lin"}


@functools.cache
def by_rule(name: str, shape: tuple[int, ...], scale: float, offset: float = 0.0) -> torch.Tensor:
    """The value of a tensor under the formula that was used for the weights of the original run."""
    count = int(np.prod(shape))
    x = np.arange(count, dtype=np.uint32) + np.uint32(zlib.crc32(f"{SIZES['seed']}:{name}".encode()))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    value = offset + scale * (x.astype(np.float64) / 2**31 - 1)
    return torch.from_numpy(value.astype(np.float32).reshape(shape))


def fill(module: torch.nn.Module, prefix: str, rename=lambda name: name) -> None:
    for name, parameter in module.named_parameters():
        is_norm = name.endswith("LayerNorm.weight")
        scale = 0.1 if is_norm else 0.02 if name.endswith("bias") else 0.05
        with torch.no_grad():
            parameter.copy_(
                by_rule(f"{prefix}.{rename(name)}", tuple(parameter.shape), scale, 1.0 if is_norm else 0.0)
            )


def adapter_config() -> KnowledgeAdapterConfig:
    sizes = SIZES["adapter"]
    return KnowledgeAdapterConfig(
        backbone_layers=sizes["adapter_list"],
        num_hidden_layers=sizes["transformer_layers"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_attention_heads=sizes["attention_heads"],
        layer_norm_eps=sizes["layer_norm_eps"],
        attend_to_padding=True,
    )


@functools.cache
def reference_model(model_class, adapters=("factual", "linguistic"), fusion="concat", **kwargs):
    """A model with the weights of the original run, shared by the tests, which choose the active adapters if necessary."""
    backbone = RobertaModel(
        RobertaConfig(**{key: value for key, value in SIZES["backbone"].items() if key != "model_type"}),
        add_pooling_layer=False,
    )
    fill(backbone, "backbone")
    config = KAdapterConfig(
        backbone_name_or_path=None,
        backbone_config=backbone.config.to_dict(),
        knowledge_adapters={name: adapter_config() for name in adapters},
        fusion=fusion,
        **kwargs,
    )
    model = model_class(config, backbone)
    for name in adapters:
        fill(model.adapters[name], NAMES[name], lambda tensor: tensor.replace("layers.", "adapter.", 1))
    if fusion == "concat":
        with torch.no_grad():
            # The original's task_dense reads [factual; linguistic].
            blocks = by_rule("fusion.task_dense.weight", (128, 256), 0.05).split(128, dim=1)
            model.fusion.bias.copy_(by_rule("fusion.task_dense.bias", (128,), 0.02))
            for name, block in zip(NAMES, blocks, strict=True):
                if name in adapters:
                    fill(model.fusion.states[name], f"fusion.task_dense_{NAMES[name]}")
                    model.fusion.mix[name].weight.copy_(block)
    for name, part in model.named_children():
        if name in ("dense", "out_proj", "classifier"):
            fill(part, f"head.{name}")
    return model.eval()


@pytest.fixture(params=["", "padded_"], ids=["unpadded", "padded"])
def prefix(request):
    return request.param


def inputs(arrays, prefix):
    return {name: arrays[f"{prefix}{name}"].long() for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def test_backbone_and_adapter_states(arrays, prefix):
    model = reference_model(KAdapterModel)
    model.set_active_knowledge_adapters(list(NAMES))
    output = model(**inputs(arrays, prefix), output_hidden_states=True)
    for layer in SIZES["adapter"]["adapter_list"]:
        assert_as_the_original(output.hidden_states[layer], arrays[f"{prefix}backbone.hidden_states.{layer}"])
    assert_as_the_original(output.backbone_last_hidden_state, arrays[f"{prefix}backbone.last_hidden_state"])
    for name, original in NAMES.items():
        assert_as_the_original(output.knowledge_states[name], arrays[f"{prefix}{original}.last_hidden_state"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("active", "fusion"),
    [
        (["factual"], "concat"),
        (["linguistic"], "concat"),
        (["factual", "linguistic"], "concat"),
        (["factual"], "add"),
        (["factual", "linguistic"], "add"),
    ],
)
def test_fused_states(arrays, prefix, active, fusion):
    model = reference_model(KAdapterModel, fusion=fusion)
    model.set_active_knowledge_adapters(active)
    name = f"{prefix}model.{'+'.join(NAMES[adapter] for adapter in active)}.{fusion}"
    assert_as_the_original(model(**inputs(arrays, prefix)).last_hidden_state, arrays[name])


@torch.no_grad()
def test_relation_classification(arrays, prefix):
    model = reference_model(KAdapterForRelationClassification, num_labels=42)
    output = model(
        **inputs(arrays, prefix),
        subject_start=arrays["subject_start"].long(),
        object_start=arrays["object_start"].long(),
        labels=arrays["relation_labels"].long(),
    )
    assert_as_the_original(output.logits, arrays[f"{prefix}relation.logits"])
    assert_as_the_original(output.loss, arrays[f"{prefix}relation.loss"])


@torch.no_grad()
def test_entity_typing(arrays, prefix):
    model = reference_model(KAdapterForEntityTyping, num_labels=9)
    output = model(
        **inputs(arrays, prefix), entity_start=arrays["subject_start"].long(), labels=arrays["typing_labels"].float()
    )
    assert_as_the_original(output.logits, arrays[f"{prefix}typing.logits"])
    assert_as_the_original(output.loss, arrays[f"{prefix}typing.loss"])


@torch.no_grad()
def test_multiple_choice(arrays, prefix):
    model = reference_model(KAdapterForMultipleChoice)
    one_question = {name: value.unsqueeze(0) for name, value in inputs(arrays, prefix).items()}
    output = model(**one_question, labels=arrays["choice_labels"].long())
    assert_as_the_original(output.logits, arrays[f"{prefix}choice.logits"])
    assert_as_the_original(output.loss, arrays[f"{prefix}choice.loss"])


@torch.no_grad()
def test_factual_pretraining(arrays, prefix):
    """The original pre-trains the factual adapter alone; its com_dense is the fusion of one adapter."""
    model = reference_model(KAdapterForRelationClassification, adapters=("factual",), num_labels=20)
    fill(model.fusion.states["factual"], "fac.com_dense")
    fill(model.dense, "fac.dense")
    fill(model.out_proj, "fac.out_proj")
    output = model(
        **inputs(arrays, prefix),
        subject_start=arrays["subject_start"].long(),
        object_start=arrays["object_start"].long(),
        labels=arrays["pretrain_labels"].long(),
    )
    assert_as_the_original(output.logits, arrays[f"{prefix}factual_pretraining.logits"])
    assert_as_the_original(output.loss, arrays[f"{prefix}factual_pretraining.loss"])


@torch.no_grad()
def test_without_attend_to_padding_real_positions_ignore_it(arrays):
    """The same rows with more padding at the end: outputs at tokens don't change."""
    model = copy.deepcopy(reference_model(KAdapterModel))
    model.set_active_knowledge_adapters(list(NAMES))
    for adapter in model.adapters.values():
        adapter.config.attend_to_padding = False
    rows = inputs(arrays, "padded_")
    longer = {
        "input_ids": torch.nn.functional.pad(rows["input_ids"], (0, 7), value=1),
        "attention_mask": torch.nn.functional.pad(rows["attention_mask"], (0, 7), value=0),
    }
    real = rows["attention_mask"].bool()
    found = model(**longer).last_hidden_state[:, : real.shape[1]]
    assert_as_the_original(found[real], model(**rows).last_hidden_state[real])


def test_reference_file_names_every_backbone_tensor():
    """The formula fills the parameters of the original run."""
    names = {name for name, _ in reference_model(KAdapterModel).backbone.named_parameters()}
    assert names == {name for name in SIZES["backbone_parameters"] if not name.startswith("pooler.")}
