"""A K-Adapter that is wrapped or changed: DataParallel's replicas, dynamic quantisation, accelerate's offloading."""

import copy
import sys
import warnings

import accelerate
import pytest
import torch
from conftest import ALL_CLASSES, inputs_for, labels_for
from torch.nn.parallel import replicate

from kadapter_hf import KAdapterForMaskedLM, KAdapterForSequenceClassification, KAdapterModel


every_class = pytest.mark.parametrize("model_class", ALL_CLASSES, ids=lambda model_class: model_class.__name__)


@pytest.fixture
def replicas(monkeypatch):
    """`replicas(model)`: two of DataParallel's replicas on the CPU, where it creates none itself."""
    clone = lambda tensors, devices, detach=False: [[tensor.clone() for tensor in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(sys.modules[replicate.__module__], "_broadcast_coalesced_reshape", clone)
    return lambda model: replicate(model, [0, 1])


def result(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).to_tuple()[0]


@every_class
def test_replica_of_data_parallel_computes_the_same(model_class, build, replicas):
    model, inputs = build(model_class), inputs_for(model_class)
    expected = result(model, inputs)
    for replica in replicas(model):
        assert torch.equal(result(replica, inputs), expected)


@every_class
@pytest.mark.parametrize("trained", ["backbone", "adapters"])
def test_replicas_of_data_parallel_give_the_gradients_of_the_model(model_class, trained, build, replicas):
    model = build(model_class).train()
    model.unfreeze_backbone() if trained == "backbone" else model.freeze_backbone()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = inputs_for(model_class)
    labels = labels_for(model_class, inputs)
    lose = lambda copied: copied(**inputs, **labels).loss if labels else copied(**inputs)[0].square().mean()  # noqa: E731
    lose(model).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(name.startswith(trained) for name in expected)
    model.zero_grad()
    sum(lose(replica) / 2 for replica in replicas(model)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in expected), name
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_replica_in_half_precision_keeps_its_dtype(build, replicas):
    model = build(KAdapterForSequenceClassification).to(torch.bfloat16)
    assert all(result(replica, inputs_for(type(model))).dtype == torch.bfloat16 for replica in replicas(model))


@pytest.mark.parametrize("fusion", ["concat", "add", "gate", "attention"])
@pytest.mark.parametrize("model_class", [KAdapterModel, KAdapterForSequenceClassification, KAdapterForMaskedLM])
def test_dynamically_quantised_model_runs(model_class, fusion, build):
    model, inputs = build(model_class, fusion=fusion), inputs_for(model_class)
    with warnings.catch_warnings(action="ignore"):
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    expected = result(model, inputs)
    difference = (result(quantised, inputs) - expected).abs().max()
    assert 0 < difference < 0.3 * expected.abs().max()


@pytest.mark.parametrize("fusion", ["concat", "add", "gate", "attention"])
@pytest.mark.parametrize("model_class", [KAdapterModel, KAdapterForSequenceClassification, KAdapterForMaskedLM])
def test_model_that_accelerate_has_offloaded_computes_the_same(model_class, fusion, build, tmp_path):
    model, inputs = build(model_class, fusion=fusion), inputs_for(model_class, padding=2)
    expected = result(model, inputs)
    on_cpu = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    on_disk = accelerate.disk_offload(copy.deepcopy(model), str(tmp_path), execution_device="cpu")
    assert torch.equal(result(on_cpu, inputs), expected) and torch.equal(result(on_disk, inputs), expected)
