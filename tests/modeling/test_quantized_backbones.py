"""Backbones with 8- and 4-bit weights, by the libraries that transformers uses for that."""

import pytest
import torch
from conftest import POSITIONS, inputs_for, labels_for, small_adapter
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BitsAndBytesConfig,
    RobertaConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from kadapter_hf import KAdapterConfigError, KAdapterForEntityTyping


pytestmark = pytest.mark.slow
CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def torchao_8_bit() -> TorchAoConfig:
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


def torchao_4_bit() -> TorchAoConfig:
    int4 = pytest.importorskip("torchao.prototype.quantization.int4")  # the one for CPUs
    return TorchAoConfig(int4.PrototypeInt4WeightOnlyConfig(group_size=32))


def bitsandbytes_8_bit() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_4_bit() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.fixture(scope="module")
def wide_backbone(tmp_path_factory) -> str:
    """A tiny RoBERTa whose weights can be divided into groups of 32."""
    set_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=100, type_vocab_size=1, **sizes, **POSITIONS)
    folder = tmp_path_factory.mktemp("backbones") / "wide"
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(
    params=[
        (torchao_8_bit, "cpu"),
        (torchao_4_bit, "cpu"),
        (bitsandbytes_8_bit, "cpu"),
        (bitsandbytes_4_bit, "cpu"),
        pytest.param((bitsandbytes_8_bit, "cuda"), marks=CUDA),
        pytest.param((bitsandbytes_4_bit, "cuda"), marks=CUDA),
    ],
    ids=lambda param: f"{param[0].__name__}-{param[1]}",
)
def quantized(request) -> dict:
    """The arguments of `from_pretrained`."""
    make, device = request.param
    return {"quantization_config": make(), "device_map": device}


def logits_of(model) -> torch.Tensor:
    device = model.own_device()
    with torch.no_grad():
        batch = {name: tensor.to(device) for name, tensor in inputs_for(KAdapterForEntityTyping, padding=2).items()}
        return model(**batch).logits.cpu().float()


def test_an_adapter_trained_on_a_quantized_backbone_is_one_of_the_named_backbone(quantized, wide_backbone, tmp_path):
    plain = KAdapterForEntityTyping.from_backbone(wide_backbone, adapters={"factual": small_adapter()})
    model = KAdapterForEntityTyping.from_backbone(wide_backbone, adapters={"factual": small_adapter()}, **quantized)
    stock = AutoModel.from_pretrained(wide_backbone, add_pooling_layer=False, **quantized)
    query = model.backbone.encoder.layer[0].attention.self.query
    assert type(query.weight) is type(stock.encoder.layer[0].attention.self.query.weight) is not torch.nn.Parameter
    assert type(model.adapters["factual"].layers[0].down_project.weight) is torch.nn.Parameter
    assert model.config.backbone_fingerprint == plain.config.backbone_fingerprint

    model.train_knowledge_adapter("factual", train_head=True)
    before = model.adapters["factual"].layers[0].down_project.weight.clone()
    batch = inputs_for(KAdapterForEntityTyping)
    batch |= labels_for(KAdapterForEntityTyping, batch)
    rows = [{name: tensor[number] for name, tensor in batch.items()} for number in range(4)]
    arguments = TrainingArguments(
        tmp_path / "out", max_steps=5, learning_rate=1e-2, report_to="none", use_cpu=model.device.type == "cpu"
    )
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    assert not torch.equal(before, model.adapters["factual"].layers[0].down_project.weight)

    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "backbone.safetensors").exists()
    # Quantised again, it is the same; as it is stored, almost.
    again = KAdapterForEntityTyping.from_pretrained(tmp_path / "saved", **quantized)
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-5, atol=1e-5)
    full = KAdapterForEntityTyping.from_pretrained(tmp_path / "saved")
    difference = (logits_of(full) - logits_of(model)).abs().max()
    assert 0 < difference < 0.1
    plain.delete_knowledge_adapter("factual")
    assert plain.load_knowledge_adapter(tmp_path / "saved") == "factual"  # it is not of another backbone
    tensors = plain.adapters["factual"].state_dict()
    assert all(
        torch.equal(tensor.cpu(), tensors[name]) for name, tensor in model.adapters["factual"].state_dict().items()
    )


def test_a_quantised_backbone_from_nowhere_is_not_saved_as_it_is(wide_backbone, tmp_path):
    """torchao's weights can't be identified, so that nothing would tell that another backbone is not this one."""
    loaded = AutoModel.from_pretrained(wide_backbone, quantization_config=torchao_8_bit())
    loaded.config._name_or_path = ""
    model = KAdapterForEntityTyping.from_backbone(loaded, adapters={"factual": small_adapter()})
    with pytest.raises(KAdapterConfigError, match="can't be saved .* is from no known repository"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
