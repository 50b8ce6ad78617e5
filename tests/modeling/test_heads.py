"""The logits and losses of each head, compared with values computed by hand from the fused states."""

import pytest
import torch
from conftest import inputs_for, labels_for
from torch.nn import functional as F

from kadapter_hf import (
    KAdapterForEntityTyping,
    KAdapterForMaskedLM,
    KAdapterForMultipleChoice,
    KAdapterForQuestionAnswering,
    KAdapterForRelationClassification,
    KAdapterForSequenceClassification,
    KAdapterForTokenClassification,
    KAdapterModel,
)


ROWS = torch.arange(4)


def fused_states(model, inputs) -> torch.Tensor:
    """All fused states, from the class without a head with the same weights."""
    base = KAdapterModel(model.config, model.backbone).eval()
    base.load_state_dict({name: model.state_dict()[name] for name in base.state_dict()})
    names = ("input_ids", "attention_mask")
    return base(**{name: inputs[name].view(-1, inputs[name].shape[-1]) for name in names}).last_hidden_state


def linear(states: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    return states @ layer.weight.T + layer.bias


def log_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The log-probability of each label."""
    exponentials = logits.double().exp()
    return (exponentials[torch.arange(len(labels)), labels] / exponentials.sum(-1)).log().float()


# ---- Logits ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sequence_classification_reads_the_first_token(build):
    model = build(KAdapterForSequenceClassification, num_labels=3)
    inputs = inputs_for(type(model), padding=2)
    wanted = linear(fused_states(model, inputs)[:, 0], model.classifier)
    torch.testing.assert_close(model(**inputs).logits, wanted)


@torch.no_grad()
def test_token_classification_reads_every_token(build):
    model = build(KAdapterForTokenClassification, num_labels=5)
    inputs = inputs_for(type(model), padding=2)
    wanted = linear(fused_states(model, inputs), model.classifier)
    torch.testing.assert_close(model(**inputs).logits, wanted)


@torch.no_grad()
def test_question_answering_scores_each_token_as_start_and_end(build):
    model = build(KAdapterForQuestionAnswering)
    inputs = inputs_for(type(model), padding=2)
    wanted = linear(fused_states(model, inputs), model.qa_outputs)
    output = model(**inputs)
    torch.testing.assert_close(output.start_logits, wanted[..., 0])
    torch.testing.assert_close(output.end_logits, wanted[..., 1])


@torch.no_grad()
def test_multiple_choice_scores_the_first_token_of_each_choice(build):
    model = build(KAdapterForMultipleChoice)
    inputs = inputs_for(type(model), rows=6)
    wanted = linear(fused_states(model, inputs)[:, 0], model.classifier).view(3, 2)
    torch.testing.assert_close(model(**inputs).logits, wanted)


@torch.no_grad()
def test_multiple_choice_takes_embeddings_and_token_types(build, backbones):
    model = build(KAdapterForMultipleChoice, backbone=backbones["bert"])
    inputs = inputs_for(type(model))
    types = torch.zeros_like(inputs["input_ids"])
    types[..., 5:] = 1
    with_types = model(**inputs, token_type_ids=types).logits
    assert not torch.allclose(with_types, model(**inputs).logits)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(**inputs, inputs_embeds=embedded, token_type_ids=types).logits, with_types)


@torch.no_grad()
def test_entity_typing_reads_the_entitys_marker(build):
    model = build(KAdapterForEntityTyping, num_labels=9)
    inputs = inputs_for(type(model)) | {"entity_start": torch.tensor([1, 0, 9, 4])}
    states = fused_states(model, inputs)[ROWS, [1, 0, 9, 4]]
    torch.testing.assert_close(model(**inputs).logits, linear(linear(states, model.dense), model.out_proj))


@torch.no_grad()
def test_relation_classification_reads_both_markers(build):
    model = build(KAdapterForRelationClassification, num_labels=7)
    markers = {"subject_start": torch.tensor([1, 0, 9, 4]), "object_start": torch.tensor([3, 0, 2, 8])}
    inputs = inputs_for(type(model)) | markers
    states = fused_states(model, inputs)
    pair = torch.cat([states[ROWS, [1, 0, 9, 4]], states[ROWS, [3, 0, 2, 8]]], dim=-1)
    torch.testing.assert_close(model(**inputs).logits, linear(linear(pair, model.dense), model.out_proj))


@torch.no_grad()
def test_masked_lm_puts_the_fused_states_through_the_backbones_head(build):
    model = build(KAdapterForMaskedLM)
    inputs = inputs_for(type(model), padding=2)
    head = model.lm_head.lm_head
    states = F.layer_norm(
        F.gelu(linear(fused_states(model, inputs), head.dense)),
        (32,),
        head.layer_norm.weight,
        head.layer_norm.bias,
        1e-5,
    )
    wanted = states @ model.get_input_embeddings().weight.T + head.bias
    torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_class", "fused_rows"),
    [
        (KAdapterForSequenceClassification, [4]),
        (KAdapterForMultipleChoice, [4]),
        (KAdapterForEntityTyping, [4]),
        (KAdapterForRelationClassification, [8]),
        (KAdapterForTokenClassification, [40]),
    ],
)
@torch.no_grad()
def test_only_what_a_head_reads_is_fused(model_class, fused_rows, build):
    model = build(model_class)
    seen = []
    model.fusion.states["factual"].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**inputs_for(model_class, length=10))
    assert [states.numel() // states.shape[-1] for states in seen] == fused_rows


# ---- Losses ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_single_label_loss_is_the_mean_cross_entropy(build):
    model = build(KAdapterForSequenceClassification, num_labels=3)
    labels = torch.tensor([0, 2, 1, 2])
    output = model(**inputs_for(type(model)), labels=labels)
    torch.testing.assert_close(output.loss, -log_probability(output.logits, labels).mean())
    assert model.config.problem_type == "single_label_classification"


@torch.no_grad()
def test_multi_label_loss_is_the_mean_binary_cross_entropy(build):
    model = build(KAdapterForSequenceClassification, num_labels=3)
    labels = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]]).float()
    output = model(**inputs_for(type(model)), labels=labels)
    probability = output.logits.sigmoid()
    torch.testing.assert_close(
        output.loss, -(labels * probability.log() + (1 - labels) * (1 - probability).log()).mean()
    )
    assert model.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("labels", [torch.tensor([0.5, -1.0, 3.0, 0.0]), torch.tensor([[0.5], [-1.0], [3.0], [0.0]])])
@torch.no_grad()
def test_one_label_is_a_regression_on_the_mean_squared_error(labels, build):
    model = build(KAdapterForSequenceClassification, num_labels=1)
    output = model(**inputs_for(type(model)), labels=labels)
    torch.testing.assert_close(output.loss, (output.logits.view(4) - labels.view(4)).square().mean())
    assert model.config.problem_type == "regression"


@torch.no_grad()
def test_regression_on_several_numbers(build):
    model = build(KAdapterForSequenceClassification, num_labels=3, problem_type="regression")
    labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    output = model(**inputs_for(type(model)), labels=labels)
    torch.testing.assert_close(output.loss, (output.logits - labels).square().mean())


@torch.no_grad()
def test_problem_type_of_the_configuration_decides(build):
    """Two columns of integers could mean either."""
    model = build(KAdapterForSequenceClassification, num_labels=2, problem_type="multi_label_classification")
    labels = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0]])
    output = model(**inputs_for(type(model)), labels=labels)
    probability = output.logits.sigmoid()
    torch.testing.assert_close(
        output.loss, -(labels * probability.log() + (1 - labels) * (1 - probability).log()).mean()
    )


@torch.no_grad()
def test_token_loss_leaves_out_ignored_labels(build):
    model = build(KAdapterForTokenClassification, num_labels=4)
    inputs = inputs_for(type(model))
    labels = labels_for(type(model), inputs, num_labels=4)["labels"]
    labels[:, ::3] = -100
    output = model(**inputs, labels=labels)
    counted = labels != -100
    torch.testing.assert_close(output.loss, -log_probability(output.logits[counted], labels[counted]).mean())


@torch.no_grad()
def test_masked_lm_loss_is_over_masked_tokens(build):
    model = build(KAdapterForMaskedLM)
    inputs = inputs_for(type(model))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, 3], labels[0, 7] = 42, 5
    output = model(**inputs, labels=labels)
    chosen = torch.cat([output.logits[:, 3], output.logits[:1, 7]])
    torch.testing.assert_close(output.loss, -log_probability(chosen, torch.tensor([42] * 4 + [5])).mean())


@torch.no_grad()
def test_question_answering_loss_counts_answers_outside_the_text_as_nothing(build):
    model = build(KAdapterForQuestionAnswering)
    start, end = torch.tensor([1, 10, 3, -1]), torch.tensor([2, 99, 9, 4])
    output = model(**inputs_for(type(model), length=10), start_positions=start, end_positions=end)
    start_loss = -log_probability(output.start_logits[[0, 2]], start[[0, 2]]).sum() / 4
    end_loss = -log_probability(output.end_logits[[0, 2, 3]], end[[0, 2, 3]]).sum() / 4
    torch.testing.assert_close(output.loss, (start_loss + end_loss) / 2)


@torch.no_grad()
def test_question_answering_takes_positions_of_shape_batch_by_one(build):
    model = build(KAdapterForQuestionAnswering)
    positions = {"start_positions": torch.tensor([1, 2, 3, 4]), "end_positions": torch.tensor([2, 3, 4, 5])}
    flat = model(**inputs_for(type(model)), **positions).loss
    columns = {name: value.unsqueeze(1) for name, value in positions.items()}
    assert torch.equal(model(**inputs_for(type(model)), **columns).loss, flat)


@torch.no_grad()
def test_multiple_choice_loss_is_a_cross_entropy_over_the_choices(build):
    model = build(KAdapterForMultipleChoice)
    labels = torch.tensor([1, 0])
    output = model(**inputs_for(type(model)), labels=labels)
    torch.testing.assert_close(output.loss, -log_probability(output.logits, labels).mean())


@torch.no_grad()
def test_typing_loss_is_a_binary_cross_entropy_whatever_the_labels_dtype(build):
    model = build(KAdapterForEntityTyping, num_labels=3)
    labels = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]])
    output = model(**inputs_for(type(model)), labels=labels)
    probability = output.logits.sigmoid()
    wanted = -(labels * probability.log() + (1 - labels) * (1 - probability).log()).mean()
    torch.testing.assert_close(output.loss, wanted)
    assert torch.equal(model(**inputs_for(type(model)), labels=labels.float()).loss, output.loss)


@torch.no_grad()
def test_relation_loss_is_the_mean_cross_entropy(build):
    model = build(KAdapterForRelationClassification, num_labels=7)
    labels = torch.tensor([6, 0, 3, 3])
    output = model(**inputs_for(type(model)), labels=labels)
    torch.testing.assert_close(output.loss, -log_probability(output.logits, labels).mean())


@pytest.mark.parametrize(
    ("model_class", "num_labels"),
    [
        (KAdapterForSequenceClassification, 3),
        (KAdapterForSequenceClassification, 1),
        (KAdapterForTokenClassification, 3),
        (KAdapterForMaskedLM, 2),
        (KAdapterForMultipleChoice, 2),
        (KAdapterForEntityTyping, 3),
        (KAdapterForRelationClassification, 3),
    ],
)
@torch.no_grad()
def test_losses_of_parts_add_up_to_that_of_the_whole_batch(model_class, num_labels, build):
    """Trainer sums the losses of micro-batches and passes the total number of labels to each."""
    model = build(model_class, num_labels=num_labels)
    inputs = inputs_for(model_class, rows=8)
    inputs |= labels_for(model_class, inputs, num_labels)
    if model_class in (KAdapterForTokenClassification, KAdapterForMaskedLM):
        inputs["labels"][0, :7] = -100  # the parts then have different numbers of labels
    if num_labels == 1:
        inputs["labels"] = inputs["labels"].float()
    whole = model(**inputs).loss
    count = (inputs["labels"] != -100).sum()
    rows = inputs["labels"].shape[0]
    for size in (count, int(count)):
        parts = [
            model(**{name: value[part] for name, value in inputs.items()}, num_items_in_batch=size).loss
            for part in (slice(0, rows // 4), slice(rows // 4, rows))
        ]
        torch.testing.assert_close(sum(parts), whole)


@torch.no_grad()
def test_loss_is_computed_in_full_precision(build):
    model = build(KAdapterForSequenceClassification, dtype=torch.bfloat16)
    output = model(**inputs_for(type(model)), labels=torch.tensor([0, 1, 0, 1]))
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32


# ---- Marker positions -----------------------------------------------------------------------------------------------


MARKERS = [
    (KAdapterForEntityTyping, "entity_start"),
    (KAdapterForRelationClassification, "subject_start"),
    (KAdapterForRelationClassification, "object_start"),
]


@pytest.mark.parametrize(("model_class", "marker"), MARKERS)
def test_missing_marker_is_named(model_class, marker, build):
    inputs = inputs_for(model_class)
    del inputs[marker]
    with pytest.raises(ValueError, match=f"{marker} is missing.*shape \\(batch,\\)"):
        build(model_class)(**inputs)


@pytest.mark.parametrize(("model_class", "marker"), MARKERS)
@pytest.mark.parametrize(
    "positions",
    [torch.zeros(4, 1).long(), torch.zeros(3).long(), torch.tensor(0), torch.zeros(4, 10).long(), torch.zeros(4)],
    ids=["column", "too few", "scalar", "one-hot", "float"],
)
def test_marker_of_another_shape_or_dtype_is_named(model_class, marker, positions, build):
    with pytest.raises(ValueError, match=f"{marker} must be a LongTensor of shape \\(4,\\), not"):
        build(model_class)(**(inputs_for(model_class) | {marker: positions}))


@pytest.mark.parametrize(("model_class", "marker"), MARKERS)
@pytest.mark.parametrize("position", [10, -1])
def test_marker_outside_the_text_is_named(model_class, marker, position, build):
    """Truncation may have removed the entity; -1 would silently read the last token."""
    inputs = inputs_for(model_class, length=10)
    inputs[marker][2] = position
    with pytest.raises(ValueError, match=f"{marker} has {position}, but the rows are 10 tokens long"):
        build(model_class)(**inputs)


@torch.no_grad()
def test_marker_may_be_of_a_smaller_integer_dtype(build):
    model = build(KAdapterForEntityTyping)
    inputs = inputs_for(type(model))
    wanted = model(**inputs).logits
    inputs["entity_start"] = inputs["entity_start"].int()
    assert torch.equal(model(**inputs).logits, wanted)


def test_multiple_choice_refuses_inputs_without_choices(build):
    with pytest.raises(ValueError, match=r"\(batch, choices, length\)"):
        build(KAdapterForMultipleChoice)(**inputs_for(KAdapterModel))
