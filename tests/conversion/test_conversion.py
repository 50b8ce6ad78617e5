"""Converted checkpoints reproduce the outputs of the original implementation (tests/fixtures/reference/README.md)."""

import functools
import hashlib
import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_as_the_original
from transformers import AutoModelForMultipleChoice, AutoModelForSequenceClassification, RobertaConfig, RobertaModel

from kadapter_hf import (
    KAdapterForEntityTyping,
    KAdapterForMultipleChoice,
    KAdapterForRelationClassification,
    KAdapterModel,
)
from kadapter_hf.conversion import convert, verify


REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference"
SIZES = json.loads((REFERENCE / "reference_outputs.json").read_text())
LAYERS = SIZES["adapter"]["adapter_list"]
ARGUMENTS = {"fac": "factual", "lin": "linguistic"}


@functools.cache
def by_rule(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of the original run, whose weights follow the closed rule of the reference's README."""
    norm = name.endswith("LayerNorm.weight")
    scale, offset = (0.1, 1.0) if norm else (0.02, 0.0) if name.endswith("bias") else (0.05, 0.0)
    x = np.arange(np.prod(shape), dtype=np.uint32) + np.uint32(zlib.crc32(f"{SIZES['seed']}:{name}".encode()))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    value = offset + scale * (x.astype(np.float64) / 2**31 - 1)
    return torch.from_numpy(value.astype(np.float32).reshape(shape))


def tensors(table: str, rule: str, before: str = "", only: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    """The tensors of a table of the reference whose names start with one of `only`, as saved by the original."""
    shapes = {name: tuple(shape) for name, shape in SIZES[table].items() if name.startswith(only)}
    return {f"{before}{name}": by_rule(f"{rule}.{name}", shape) for name, shape in shapes.items()}


def adapters(*names: str) -> dict[str, torch.Tensor]:
    parts = [tensors("factual_checkpoint", name, f"{name}_adapter.", ("adapter.",)) for name in names]
    return {name: tensor for part in parts for name, tensor in part.items()}


def backbone_tensors() -> dict[str, torch.Tensor]:
    return tensors("backbone_parameters", "backbone", "model.")


def head_tensors(table: str) -> dict[str, torch.Tensor]:
    own = ("dense.", "out_proj.", "classifier.")
    return tensors(table, "fusion", only=("task_dense",)) | tensors(table, "head", only=own)


@pytest.fixture(scope="module")
def backbone():
    """The original run's backbone, loaded; its weights are in no file."""
    sizes = {key: value for key, value in SIZES["backbone"].items() if key != "model_type"}
    model = RobertaModel(RobertaConfig(**sizes), add_pooling_layer=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(by_rule(f"backbone.{name}", tuple(parameter.shape)))
    return model.eval()


@pytest.fixture
def folder(backbone):
    """A folder with the backbone's config.json in `backbone/`; the hundreds of MB written there are deleted afterwards."""
    with tempfile.TemporaryDirectory() as path:
        backbone.config.save_pretrained(Path(path, "backbone"))
        yield Path(path)


def save(content, path: Path) -> Path:
    """As torch wrote it when the original was released."""
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def rows(arrays, prefix):
    return {name: arrays[f"{prefix}{name}"].long() for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def test_a_factual_adapter_with_its_head_gives_the_originals_logits(arrays, backbone, folder):
    path = save(tensors("factual_checkpoint", "fac"), folder / "pytorch_model.bin")
    made = convert(path, folder / "out", layers=LAYERS, backbone=folder / "backbone", with_head=True)
    model = KAdapterForRelationClassification.from_pretrained(made.output, backbone=backbone)
    markers = {name: arrays[name].long() for name in ("subject_start", "object_start")}
    for prefix in ("", "padded_"):
        assert_as_the_original(
            model(**rows(arrays, prefix), **markers).logits, arrays[f"{prefix}factual_pretraining.logits"]
        )
    config = model.config.knowledge_adapters["factual"]
    assert config.attend_to_padding and config.backbone_layers == LAYERS
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (768, 3072, 2)
    assert config.provenance == {
        "origin": "microsoft/K-Adapter",
        "kind": "factual",
        "file": "pytorch_model.bin",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert verify(made) == len(SIZES["factual_checkpoint"])


HEADS = {
    "relation": (
        KAdapterForRelationClassification,
        AutoModelForSequenceClassification,
        ("subject_start", "object_start"),
    ),
    "typing": (KAdapterForEntityTyping, AutoModelForSequenceClassification, ("subject_start",)),
    "choice": (KAdapterForMultipleChoice, AutoModelForMultipleChoice, ()),
}


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_a_fine_tuned_model_gives_the_originals_logits_with_nothing_but_its_folder(arrays, folder, head):
    model_class, auto_class, markers = HEADS[head]
    path = save(adapters("fac", "lin") | head_tensors(f"{head}_head"), folder / "pytorch_model.bin")
    weights = save(backbone_tensors(), folder / "pytorch_pretrained_model.bin")
    out = folder / "out"
    convert(path, out, layers=LAYERS, backbone=folder / "backbone", backbone_weights=weights)
    assert (out / "backbone.safetensors").exists()
    model = auto_class.from_pretrained(out)
    assert type(model) is model_class
    given = {"entity_start" if head == "typing" else name: arrays[name].long() for name in markers}
    for prefix in ("", "padded_"):
        inputs = rows(arrays, prefix)
        if head == "choice":
            inputs = {name: value.unsqueeze(0) for name, value in inputs.items()}
        assert_as_the_original(model(**inputs, **given).logits, arrays[f"{prefix}{head}.logits"])


@torch.no_grad()
@pytest.mark.parametrize(("active", "fusion"), [("fac+lin", "concat"), ("lin", "concat"), ("fac", "add")])
def test_roberta_with_adapters_in_one_file_gives_the_originals_states(arrays, folder, active, fusion):
    names = active.split("+")
    fused = tuple(f"task_dense_{name}." for name in names) + ("task_dense.",)
    content = backbone_tensors() | adapters(*names)
    if fusion == "concat":
        content |= tensors("relation_head", "fusion", only=fused)
    path = save(content, folder / "pytorch_model.bin")
    convert(path, folder / "out", layers=LAYERS, backbone=folder / "backbone")
    model = KAdapterModel.from_pretrained(folder / "out")
    assert model.active_knowledge_adapters == [ARGUMENTS[name] for name in names]
    for prefix in ("", "padded_"):
        wanted = arrays[f"{prefix}model.{active}.{fusion}"]
        assert_as_the_original(model(**rows(arrays, prefix)).last_hidden_state, wanted)
