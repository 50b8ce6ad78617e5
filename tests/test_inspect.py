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


@pytest.mark.parametrize("kind", [torch.Tensor.numpy, torch.Tensor.tolist])
def test_batches_of_arrays_and_lists_are_those_of_tensors(kind, model):
    inputs = batch(padding=3) | {"place": torch.tensor([1, 2, 0])}
    other = {name: kind(values) for name, values in inputs.items()}
    np.testing.assert_array_equal(collect_states(model, other)["fused"], collect_states(model, inputs)["fused"])
    places = collect_states(model, other, "place")["fused"], collect_states(model, inputs, "place")["fused"]
    np.testing.assert_array_equal(*places)
    np.testing.assert_array_equal(contributions(model, other)["factual"], contributions(model, inputs)["factual"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_ids": [[0, 5, 2], [0, 2]]}, "'input_ids' is no tensor .*: call the tokenizer with padding=True"),
        ({"input_ids": [0, 5, 2]}, "a single text: pass the tokenizer a list of texts"),
        ("rome is old", "a mapping with 'input_ids'"),
        ({"labels": [1]}, "a mapping with 'input_ids'"),
    ],
)
def test_what_is_no_batch_is_refused_in_a_sentence(wrong, message, model):
    for function in (collect_states, contributions):
        with pytest.raises(ValueError, match=message):
            function(model, wrong)


def test_what_is_no_k_adapter_is_refused_in_a_sentence(model):
    for function in (collect_states, contributions):
        with pytest.raises(ValueError, match="must be a K-Adapter, and it is a RobertaModel"):
            function(model.backbone.base_model, batch())


def test_virtual_tokens_of_peft_are_refused_and_other_peft_adapters_are_not(backbones):
    peft = pytest.importorskip("peft")
    configs = [peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")]
    configs += [peft.LoraConfig(target_modules=["query"], init_lora_weights=False)]
    for config in configs:
        model = KAdapterForEntityTyping.from_backbone(backbones["roberta"], {"factual": small_adapter()}, num_labels=2)
        plain = collect_states(model, batch())
        wrapped = peft.get_peft_model(model, config)
        if config.is_prompt_learning:
            for function in (collect_states, contributions):
                with pytest.raises(ValueError, match=r"virtual tokens .* pass model\.get_base_model\(\)"):
                    function(wrapped, batch())
            np.testing.assert_array_equal(collect_states(wrapped.get_base_model(), batch())["fused"], plain["fused"])
        else:
            assert not np.allclose(collect_states(wrapped, batch())["backbone 4"], plain["backbone 4"])


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


@pytest.mark.parametrize("positions", [[1, 2], [1, 2, 10], [1, 2, -1], [1, 2, 7], [1.0, 2.0, 0.0], [[1], [2], [3]]])
def test_positions_outside_the_text_are_refused(positions, model):
    inputs = batch(padding=3) | {"place": torch.tensor(positions)}
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


def test_cka_and_rank_take_lists_and_tensors():
    states = torch.randn(6, 3, requires_grad=True)
    array = states.detach().numpy()
    for other in (states, states.tolist()):
        assert linear_cka(other, array) == pytest.approx(1)
        assert effective_rank(other) == pytest.approx(effective_rank(array))


@pytest.mark.parametrize("states", [np.ones(3), [[1.0, np.nan]], np.ones((2, 2, 2))])
def test_what_are_no_states_is_refused_in_a_sentence(states):
    with pytest.raises(ValueError, match=r"finite numbers of the shape \(rows, width\)"):
        linear_cka(states, states)
    with pytest.raises(ValueError, match=r"finite numbers of the shape \(rows, width\)"):
        effective_rank(states)


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


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_probe_refuses_missing_labels(missing):
    with pytest.raises(ValueError, match="a label is missing: leave out the rows without one"):
        probe({"fused": np.ones((11, 2))}, [*"ab" * 5, missing])


def test_probe_refuses_another_number_of_labels():
    with pytest.raises(ValueError, match="'fused' has 9 rows, and there are 10 labels"):
        probe({"fused": np.ones((9, 2))}, [0, 1] * 5)


def test_without_accuracies_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="no accuracies to draw"):
        draw_probe({})


def test_figures_show_every_state_and_token(model):
    inputs = batch()
    states = collect_states(model, inputs)
    figure = draw_similarities(states)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(states)
    figure = draw_probe({"backbone 0": np.array([0.5, 0.7]), "fused": np.array([0.9, 0.9])})
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([0.6, 0.9])
    figure = draw_contributions(contributions(model, inputs), list("abcdefghij"), row=1)
    assert figure.axes[0].images[0].get_array().shape == (2, 10)
