"""`kadapter_hf.inspect` against values computed by hand and by other means."""

import numpy as np
import pytest
import torch
from conftest import batch, disturb, inputs_for, small_adapter

from kadapter_hf import KAdapterForEntityTyping, KAdapterForMultipleChoice, KAdapterModel
from kadapter_hf.inspect import (
    collect_states,
    contributions,
    draw_contributions,
    draw_probe,
    draw_similarities,
    effective_rank,
    linear_cka,
    probe,
    similarities,
)


@pytest.fixture(scope="module")
def model(backbones):
    model = KAdapterModel.from_backbone(
        backbones["roberta"], {"factual": small_adapter(), "linguistic": small_adapter()}, fusion="add"
    )
    disturb(model.adapters)
    return model


def test_states_are_those_of_the_backbone_the_adapters_and_the_fusion(model):
    inputs = batch(padding=3)
    states = collect_states(model, inputs)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        knowledge = model.encode(**inputs).knowledge
    real = inputs["attention_mask"].bool()
    assert list(states) == [*(f"backbone {n}" for n in range(5)), "adapter factual", "adapter linguistic", "fused"]
    for number, state in enumerate(output.hidden_states):
        np.testing.assert_allclose(states[f"backbone {number}"], state[real], atol=1e-6)
    np.testing.assert_allclose(states["adapter factual"], knowledge["factual"][real], atol=1e-6)
    np.testing.assert_allclose(states["fused"], output.last_hidden_state[real], atol=1e-6)


def test_states_of_batches_are_joined_in_their_order(model):
    first, second = batch(seed=1), batch(seed=2)
    joined = collect_states(model, [first, second])
    for name, state in collect_states(model, second).items():
        np.testing.assert_allclose(joined[name][30:], state, atol=1e-5)


def test_states_can_be_read_at_the_first_token_or_at_positions_of_a_column(backbones):
    model = KAdapterForEntityTyping.from_backbone(backbones["roberta"], {"factual": small_adapter()}, num_labels=2)
    inputs = inputs_for(KAdapterForEntityTyping) | {"labels": torch.ones(4, 2)}
    every = collect_states(model, inputs)["fused"].reshape(4, 10, -1)
    at_entity = collect_states(model, inputs, position="entity_start")["fused"]
    np.testing.assert_allclose(at_entity, every[range(4), inputs["entity_start"]], atol=1e-6)
    np.testing.assert_allclose(collect_states(model, inputs, "first")["fused"], every[:, 0], atol=1e-6)
    with pytest.raises(KeyError, match="no 'subject_start'; it has input_ids"):
        collect_states(model, inputs, "subject_start")


def test_looking_leaves_the_model_in_its_mode_without_gradients(model):
    model.train()
    collect_states(model, batch())
    contributions(model, batch())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_the_contribution_of_an_adapter_is_the_change_without_it(model):
    inputs = batch(padding=3)
    shares = contributions(model, inputs)
    with torch.no_grad():
        fused = model(**inputs).last_hidden_state
        without = model(**inputs, knowledge_adapters=["linguistic"]).last_hidden_state
    expected = (fused - without).norm(dim=-1) / fused.norm(dim=-1)
    np.testing.assert_allclose(shares["factual"][:2], expected[:2], rtol=1e-4)
    assert np.isnan(shares["factual"][2, -3:]).all() and not np.isnan(shares["factual"][2, :-3]).any()


def test_contributions_to_a_gate_that_needs_all_adapters(backbones):
    model = KAdapterModel.from_backbone(
        backbones["roberta"],
        {"factual": small_adapter(), "linguistic": small_adapter()},
        fusion="gate",
        fusion_config={"top_k": 2},
    )
    assert all((share > 0).all() for share in contributions(model, batch()).values())


def test_without_adapters_there_is_nothing_to_draw(model):
    with model.without_knowledge_adapters():
        assert contributions(model, batch()) == {}
    with pytest.raises(ValueError, match="no knowledge adapter is active"):
        draw_contributions({}, list("abc"))


def test_choices_are_rows(backbones):
    model = KAdapterForMultipleChoice.from_backbone(backbones["roberta"], {"factual": small_adapter()})
    inputs = inputs_for(KAdapterForMultipleChoice)
    assert collect_states(model, inputs, "first")["fused"].shape == (4, 32)
    assert contributions(model, inputs)["factual"].shape == (4, 10)


@pytest.mark.parametrize("positions", [[1, 2], [1, 2, 10], [1, 2, -1], [[1], [2], [3]]])
def test_positions_outside_the_text_are_refused(positions, model):
    inputs = batch() | {"place": torch.tensor(positions)}
    with pytest.raises(ValueError, match="'place' must have one position in the text for each of 3 rows"):
        collect_states(model, inputs, "place")


def test_cka_is_1_for_a_scaled_rotation_and_small_for_unrelated_states():
    generator = np.random.default_rng(0)
    states = generator.normal(size=(2000, 8))
    rotation = np.linalg.qr(generator.normal(size=(8, 8)))[0]
    assert linear_cka(states, 3 * states @ rotation + 1) == pytest.approx(1)
    assert linear_cka(states, generator.normal(size=(2000, 5))) < 0.02


def test_cka_of_two_columns_is_their_squared_correlation():
    first, second = np.array([[1.0], [2.0], [4.0]]), np.array([[2.0], [1.0], [5.0]])
    assert linear_cka(first, second) == pytest.approx(np.corrcoef(first[:, 0], second[:, 0])[0, 1] ** 2)


def test_cka_of_different_tokens_is_refused():
    with pytest.raises(ValueError, match="2 and 3 rows"):
        linear_cka(np.ones((2, 1)), np.ones((3, 1)))


def test_cka_of_a_constant_is_0():
    assert linear_cka(np.ones((3, 2)), np.eye(3)) == 0


def test_similarities_are_symmetric_with_ones_on_the_diagonal(model):
    states = collect_states(model, batch())
    matrix = similarities(states)
    assert matrix.shape == (8, 8)
    np.testing.assert_allclose(matrix, matrix.T)
    np.testing.assert_allclose(matrix.diagonal(), 1)
    assert matrix[0, 5] == pytest.approx(linear_cka(states["backbone 0"], states["adapter factual"]))


def test_effective_rank_counts_directions():
    assert effective_rank(np.diag([1.0, 1, 1, 0])) == pytest.approx(3)
    # singular values 3 and 1: exp(-(3/4 log 3/4 + 1/4 log 1/4))
    assert effective_rank(np.diag([3.0, 1])) == pytest.approx(1.7548, abs=1e-4)
    assert effective_rank(np.zeros((4, 2))) == 0


def test_probe_finds_the_state_that_has_the_label():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 200)
    noise = generator.normal(size=(200, 4))
    states = {"without": noise, "with": noise + 5 * labels[:, None]}
    accuracies = probe(states, labels)
    assert accuracies["with"].shape == (5,) and accuracies["with"].mean() > 0.98
    assert 0.35 < accuracies["without"].mean() < 0.65


@pytest.mark.parametrize("labels", [[0] * 10, [0] * 8 + [1] * 2])
def test_probe_refuses_labels_that_can_not_be_divided(labels):
    with pytest.raises(ValueError, match="two classes or more with at least 5 rows each"):
        probe({"fused": np.ones((10, 2))}, labels)


def test_figures_show_every_state_and_token(model):
    inputs = batch()
    states = collect_states(model, inputs)
    figure = draw_similarities(states)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(states)
    figure = draw_probe({"backbone 0": np.array([0.5, 0.7]), "fused": np.array([0.9, 0.9])})
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([0.6, 0.9])
    figure = draw_contributions(contributions(model, inputs), list("abcdefghij"), row=1)
    assert figure.axes[0].images[0].get_array().shape == (2, 10)
