"""Averages of knowledge adapters."""

import re

import numpy as np
import pytest
import torch
from conftest import batch, disturb, small_adapter

from kadapter_hf import KAdapterConfigError, KAdapterForEntityTyping, KAdapterModel


@pytest.fixture
def model(build):
    model = build(adapters=("a", "b"))
    model.config.knowledge_adapters["a"].provenance = {"corpus": "wiki", "seed": 0}
    return model


def test_average_is_the_weighted_mean_of_all_tensors(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.average_knowledge_adapters({"a": 0.25, "b": 0.75}, into="both")
    for name, tensor in model.adapters["both"].state_dict().items():
        wanted = 0.25 * model.adapters["a"].state_dict()[name] + 0.75 * model.adapters["b"].state_dict()[name]
        torch.testing.assert_close(tensor, wanted, msg=name)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert model.active_knowledge_adapters == ["a", "b", "both"]
    assert not any(parameter.requires_grad for parameter in model.adapters["both"].parameters())


def test_average_of_all_of_one_is_a_copy(model):
    model.average_knowledge_adapters({"a": 1.0, "b": 0}, into="copy")
    with torch.no_grad(), model.using_knowledge_adapters(["a", "copy"]):
        states = model(**batch()).knowledge_states
    assert torch.equal(states["copy"], states["a"])


def test_average_says_of_what_it_is_and_is_loaded_like_any_adapter(model, build, tmp_path):
    model.average_knowledge_adapters({"a": 0.5, "b": 0.5}, into="both")
    model.save_pretrained(tmp_path / "model")
    found = build(KAdapterForEntityTyping, adapters=())
    found.load_knowledge_adapter(tmp_path / "model", "both")
    told = found.config.knowledge_adapters["both"].provenance
    assert told["average_of"] == {"a": 0.5, "b": 0.5}
    assert told["sources"] == {"a": {"corpus": "wiki", "seed": 0}, "b": None}
    assert told["fingerprints"] == {name: model.origins.fingerprints[f"adapters.{name}"] for name in ("a", "b")}
    with torch.no_grad():
        wanted, states = (KAdapterModel.forward(of_one, **batch()).knowledge_states for of_one in (model, found))
    assert torch.equal(states["both"], wanted["both"])
    assert "average of" in (tmp_path / "model" / "README.md").read_text()


def test_average_in_half_precision(build):
    model = build(adapters=("a", "b"), dtype=torch.bfloat16)
    model.average_knowledge_adapters({"a": 0.5, "b": 0.5}, into="both")
    found, *of_both = (model.adapters[name].layers[0].up_project.weight for name in ("both", "a", "b"))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, ((of_both[0].float() + of_both[1].float()) / 2).bfloat16())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.5, "b": 0.6}, "the weights of an average must add up to 1, not 1.1"),
        ({"a": float("nan"), "b": 0.5}, "the weight of 'a' must be a finite number, not nan"),
        ({"a": "half", "b": 0.5}, "the weight of 'a' must be a finite number, not 'half'"),
        ({}, "weights must be a dict from names of knowledge adapters to numbers"),
        (["a", "b"], "weights must be a dict from names of knowledge adapters to numbers, not ['a', 'b']"),
        ({"a": 0.5, "d": 0.5}, "there is no knowledge adapter 'd'; there are ['a', 'b', 'wide', 'later']"),
        ({"a": 0.5, "wide": 0.5}, "only adapters of one shape can be averaged, and 'wide' has hidden_size 32, 'a' 16"),
        ({"a": 0.5, "later": 0.5}, "and 'later' was trained with seed 1, 'a' with 0"),
    ],
)
def test_impossible_average_is_refused_in_one_sentence_and_adds_nothing(weights, message, model):
    model.add_knowledge_adapter("wide", small_adapter(hidden_size=32))
    model.add_knowledge_adapter("later", small_adapter(provenance={"seed": 1}))
    with pytest.raises(KAdapterConfigError, match=re.escape(message)) as caught:
        model.average_knowledge_adapters(weights, into="both")
    assert "\n" not in str(caught.value) and list(model.adapters) == ["a", "b", "wide", "later"]


def test_adapters_of_two_backbones_are_not_averaged(model, build, tmp_path):
    other = build(adapters=("elsewhere",))
    disturb(other.backbone)
    other.origins.backbone_trained = True
    file = other.save_knowledge_adapter(tmp_path, "elsewhere")
    model.load_knowledge_adapter(file, ignore_backbone_mismatch=True)
    with pytest.raises(KAdapterConfigError, match="only adapters of one backbone can be averaged, and 'elsewhere'"):
        model.average_knowledge_adapters({"a": 0.5, "elsewhere": 0.5}, into="both")


def test_taken_name_is_refused(model):
    with pytest.raises(KAdapterConfigError, match="there is a knowledge adapter 'b' already"):
        model.average_knowledge_adapters({"a": 0.5, "b": 0.5}, into="b")


def test_average_of_averages_knows_the_seeds_of_all_its_parts(model):
    model.add_knowledge_adapter("same", small_adapter(provenance={"seed": 0}))
    model.add_knowledge_adapter("later", small_adapter(provenance={"seed": 1}))
    model.average_knowledge_adapters({"a": 0.5, "same": 0.5}, into="mean")
    model.average_knowledge_adapters({"mean": 0.5, "a": 0.5}, into="again")
    with pytest.raises(KAdapterConfigError, match="'later' was trained with seed 1, 'again' with 0"):
        model.average_knowledge_adapters({"again": 0.5, "later": 0.5}, into="refused")


def test_weights_of_an_average_can_be_numpy_numbers(model, tmp_path):
    model.average_knowledge_adapters({"a": np.float32(0.5), "b": np.float64(0.5)}, into="both")
    model.save_pretrained(tmp_path)
    assert KAdapterModel.from_pretrained(tmp_path).config.knowledge_adapters["both"].provenance["average_of"] == {
        "a": 0.5,
        "b": 0.5,
    }
