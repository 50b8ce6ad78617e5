"""The data type of a frozen backbone in training."""

import json

import pytest
import torch
from conftest import batch, small_adapter

from kadapter_hf import KAdapterForMaskedLM, KAdapterForRelationClassification, KAdapterModel
from kadapter_hf.modeling.format_kadapter import fingerprint
from kadapter_hf.precision import cast_backbone, fast_dtype
from kadapter_hf.pretraining import main


CPU = torch.device("cpu")


def capabilities(monkeypatch, **found: bool) -> None:
    """What torch says about the processor."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)


@pytest.mark.parametrize(
    ("found", "dtype", "reason"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16, "AMX"),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16, "AVX-512 BF16"),
        ({"avx2": True}, torch.float32, "not known"),
    ],
)
def test_auto_is_bfloat16_only_where_the_processor_has_units_for_it(found, dtype, reason, monkeypatch):
    capabilities(monkeypatch, **found)
    chosen, why = fast_dtype(CPU)
    assert chosen == dtype and reason in why


def test_auto_on_an_unknown_device_is_float32():
    assert fast_dtype(torch.device("meta"))[0] == torch.float32


@torch.no_grad()
def test_a_backbone_in_bfloat16_gives_the_same_up_to_its_precision(build):
    model = build(KAdapterModel, adapters=["factual"])
    exact = model(**batch()).last_hidden_state
    cast_backbone(model, "bfloat16", CPU)
    assert model.backbone.dtype == torch.bfloat16 and model.own_dtype() == torch.float32
    rounded = model(**batch()).last_hidden_state
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_a_cast_backbone_is_saved_as_the_one_that_it_was(backbone, tmp_path):
    model = KAdapterModel.from_backbone(backbone, {"factual": small_adapter()})
    model.save_pretrained(tmp_path / "plain")
    cast_backbone(model, "bfloat16", CPU)
    model.save_pretrained(tmp_path / "cast")
    for file in ("config.json", "adapters/factual.safetensors", "model.safetensors.index.json"):
        assert (tmp_path / "cast" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    assert KAdapterModel.from_pretrained(tmp_path / "cast").backbone.dtype == torch.float32


def test_auto_leaves_a_backbone_that_trains_or_has_fewer_bits(build, monkeypatch):
    capabilities(monkeypatch, amx_bf16=True)
    model = build(KAdapterModel)
    model.unfreeze_backbone()
    before = fingerprint(model.backbone.state_dict().values())
    cast_backbone(model, "auto", CPU)
    assert fingerprint(model.backbone.state_dict().values()) == before
    model = build(KAdapterModel)
    model.backbone.half()
    cast_backbone(model, "auto", CPU)
    assert model.backbone.dtype == torch.float16


def test_a_dtype_for_a_backbone_that_trains_is_refused(build):
    model = build(KAdapterForRelationClassification)
    model.unfreeze_backbone()
    with pytest.raises(ValueError, match="--backbone_dtype bfloat16 is for a frozen backbone .* this one trains"):
        cast_backbone(model, "bfloat16", CPU)


def test_a_head_that_shares_the_embeddings_keeps_the_backbone_in_float32(build, monkeypatch):
    capabilities(monkeypatch, amx_bf16=True)
    model = build(KAdapterForMaskedLM)
    cast_backbone(model, "auto", CPU)
    assert model.backbone.dtype == torch.float32
    with pytest.raises(ValueError, match="this one shares its embeddings with the head"):
        cast_backbone(model, "bfloat16", CPU)


def test_the_choice_is_said_with_its_reason_and_the_way_out(build, monkeypatch, caplog):
    capabilities(monkeypatch, avx512_bf16=True)
    cast_backbone(build(KAdapterModel), "auto", CPU)
    assert "computes in bfloat16: this processor multiplies it faster (AVX-512 BF16)" in caplog.text
    assert "--backbone_dtype float32" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pretraining_in_either_dtype_leaves_the_backbone_out_and_named_in_float32(dtype, backbone, tmp_path):
    rows = [{"text": f"Paris lies in France {n}.", "subject": [0, 5], "object": [14, 20]} for n in range(12)]
    lines = [json.dumps(row | {"relation": ["in", "of"][number % 2]}) for number, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    flags = ["--data", str(tmp_path / "rows.jsonl"), "--backbone", backbone, "--output_dir", str(tmp_path / "out")]
    small = ["--adapter_hidden_size", "16", "--adapter_num_attention_heads", "2", "--adapter_intermediate_size", "16"]
    main(["factual", *flags, *small, "--max_steps", "2", "--backbone_dtype", dtype])
    assert not (tmp_path / "out" / "backbone.safetensors").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["backbone_config"]["dtype"] == "float32"
