"""What is computed for a head, and states that were computed before."""

import pytest
import torch
from conftest import ALL_CLASSES, disturb, inputs_for, labels_for

from kadapter_hf import (
    KAdapterForEntityTyping,
    KAdapterForQuestionAnswering,
    KAdapterForRelationClassification,
    KAdapterForSequenceClassification,
    KAdapterModel,
)


ADAPTERS = ["factual", "linguistic"]


def recorded(model, inputs) -> torch.Tensor:
    """What the fusion of `model` reads, `(batch, 1 + adapters, number, width)`."""
    seen = []
    hook = model.fusion.register_forward_pre_hook(lambda _, args: seen.append([args[0], *args[1].values()]))
    model(**inputs)
    hook.remove()
    (states,) = seen
    stacked = torch.stack(states, dim=1)
    return stacked if stacked.dim() == 4 else stacked.unsqueeze(2)


def backbone_states(model, inputs) -> torch.Tensor:
    """The states that the adapters read, `(batch, states, length, width)`."""
    rows = {name: inputs[name].flatten(0, -2) for name in ("input_ids", "attention_mask")}
    states = model.backbone(**rows, output_hidden_states=True).hidden_states
    return torch.stack([states[index] for index in model.backbone_states_read()], dim=1)


def assert_same_tensors(found, wanted) -> None:
    for name in wanted:
        if torch.is_tensor(wanted[name]):
            torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("model_class", "rows"),
    [
        (KAdapterForSequenceClassification, 4),
        (KAdapterForEntityTyping, 4),
        (KAdapterForRelationClassification, 8),
        (KAdapterForQuestionAnswering, 40),
    ],
)
def test_the_end_of_an_adapter_computes_only_what_a_head_reads(model_class, rows, attention, build):
    model = build(model_class)
    model.set_attn_implementation(attention)
    seen = {}
    last = model.adapters["factual"].layers[-1]
    for name, module in {"feed-forward": last.encoder.layer[-1].intermediate, "up": last.up_project}.items():
        module.register_forward_hook(lambda _, args, output, name=name: seen.update({name: args[0]}))
    model(**inputs_for(model_class, length=10, padding=2))
    assert {name: states.numel() // states.shape[-1] for name, states in seen.items()} == dict.fromkeys(seen, rows)
    assert set(seen) == {"feed-forward", "up"}


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_fusion_states_stand_for_backbone_and_adapters(model_class, build):
    model = build(model_class, adapters=ADAPTERS)
    disturb(model)
    inputs = inputs_for(model_class, padding=2)
    inputs |= labels_for(model_class, inputs)
    with torch.no_grad():
        wanted, states = model(**inputs), recorded(model, inputs)
        for module in (model.backbone, model.adapters["factual"]):
            module.register_forward_pre_hook(lambda module, args: pytest.fail(f"{type(module).__name__} runs"))
        found = model(**inputs, fusion_states=states)
    assert_same_tensors(found, wanted)


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_adapters_run_on_given_states_beside_the_last_state_at_read_positions(model_class, build):
    model = build(model_class, adapters=ADAPTERS)
    disturb(model)
    inputs = inputs_for(model_class, padding=2)
    with torch.no_grad():
        wanted = model(**inputs)
        given = {"backbone_states": backbone_states(model, inputs), "fusion_states": recorded(model, inputs)[:, :1]}
        model.backbone.register_forward_pre_hook(lambda *_: pytest.fail("the backbone runs"))
        found = model(**inputs, **given)
    assert_same_tensors(found, wanted)


@pytest.mark.parametrize("shape", [(4, 2, 1, 64), (4, 4, 1, 64), (4, 64)])
def test_fusion_states_of_another_number_of_adapters_are_refused(shape, build):
    model = build(KAdapterModel, adapters=ADAPTERS)
    with pytest.raises(ValueError, match="fusion_states must be of shape .* the outputs of factual, linguistic"):
        model(**inputs_for(KAdapterModel), fusion_states=torch.zeros(shape))


@pytest.mark.parametrize(
    ("computed_for", "read_by"),
    [
        (KAdapterForRelationClassification, KAdapterForEntityTyping),
        (KAdapterForEntityTyping, KAdapterForRelationClassification),
        (KAdapterModel, KAdapterForSequenceClassification),
    ],
)
def test_fusion_states_at_another_number_of_positions_are_refused(computed_for, read_by, build):
    states = recorded(build(computed_for, adapters=ADAPTERS), inputs_for(computed_for))
    with pytest.raises(ValueError, match="and the head reads [12] of each row: they were computed for another head"):
        build(read_by, adapters=ADAPTERS)(**inputs_for(read_by), fusion_states=states)


def test_backbone_states_with_the_last_beside_fusion_states_are_refused(build):
    model = build(KAdapterModel, adapters=ADAPTERS)
    states = len(model.backbone_states_read())
    width = model.config.backbone_config.hidden_size
    with pytest.raises(ValueError, match=f"backbone_states must be of shape .batch, {states}, length, width.*"):
        model(
            **inputs_for(KAdapterModel),
            backbone_states=torch.zeros(4, states + 1, 10, width),
            fusion_states=torch.zeros(4, 1, 10, width),
        )
