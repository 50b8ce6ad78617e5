"""The built-in fusions: what they compute, how they start, what trains, and which values they refuse."""

import math

import pytest
import torch
from conftest import assert_same_weights, batch, disturb, small_adapter
from peft import LoraConfig
from torch.nn import functional as F

from kadapter_hf import KAdapterConfig, KAdapterConfigError, KAdapterForSequenceClassification, KAdapterModel
from kadapter_hf.modeling.fusion_kadapter import FUSIONS


KINDS = {
    "add": ("add", {}),
    "add-scaled": ("add", {"scale": 0.1}),
    "concat": ("concat", {}),
    "gate": ("gate", {}),
    "gate-softmax": ("gate", {"activation": "softmax"}),
    "gate-top-k": ("gate", {"top_k": 1}),
    "attention": ("attention", {"key_size": 8}),
}
every_kind = pytest.mark.parametrize(("fusion", "values"), KINDS.values(), ids=KINDS)
NEAR = {kind: KINDS[kind] for kind in KINDS if kind != "add"}
with_weights = pytest.mark.parametrize(
    ("fusion", "values"), [KINDS[kind] for kind in KINDS if kind not in ("add", "concat")]
)
WIDTH = 32
NAMES = ("a", "b", "c")


def new_fusion(kind, values, names=NAMES):
    torch.manual_seed(0)
    fusion = FUSIONS[kind](WIDTH, **values)
    for name in names:
        fusion.add(name)
        fusion.init_adapter(name)
    fusion.init_shared()
    return fusion


def states(names=NAMES, rows: int = 4, length: int = 6) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    backbone, *adapters = torch.randn(1 + len(names), rows, length, WIDTH, generator=generator)
    return backbone, dict(zip(names, adapters, strict=True))


def trained(kind, values, names=NAMES):
    fusion = new_fusion(kind, values, names)
    disturb(fusion)
    return fusion.requires_grad_(False)


# ---- What they compute ----------------------------------------------------------------------------------------------


def test_scaled_add_multiplies_each_adapter_by_its_number():
    fusion, (state, adapters) = trained("add", {"scale": 0.3}), states()
    scales = {name: fusion.scales[name].weight.item() for name in NAMES}
    assert len(set(scales.values())) == 3
    wanted = state + scales["a"] * adapters["a"] + scales["b"] * adapters["b"] + scales["c"] * adapters["c"]
    torch.testing.assert_close(fusion(state, adapters), wanted)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_gate_weighs_each_adapter_at_each_position(activation, top_k):
    fusion, (state, adapters) = trained("gate", {"activation": activation, "top_k": top_k}), states()
    found = fusion(state, adapters)
    for row, position in ((0, 0), (3, 5)):
        own, given = state[row, position], {name: of[row, position] for name, of in adapters.items()}
        scores = {}
        for name, vector in given.items():
            gate = fusion.gates[name]
            scores[name] = (
                gate.weight[0] @ torch.cat([own / own.norm(), vector / vector.norm()]) + gate.bias[0]
            ).item()
        chosen = sorted(scores, key=scores.get)[-(top_k or 3) :]
        odds = {name: math.exp(scores[name]) / len(chosen) for name in chosen}
        rest = 1 + sum(odds.values())
        gates = {name: odd / (rest if activation == "softmax" else 1 + odd) for name, odd in odds.items()}
        wanted = own + sum(gates[name] * given[name] for name in chosen)
        torch.testing.assert_close(found[row, position], wanted)


def test_attention_is_that_of_torch_over_the_backbones_state_and_the_adapters():
    fusion, (state, adapters) = trained("attention", {"key_size": 8}), states()
    sources = torch.stack([state, *adapters.values()], dim=-2)
    keys = [fusion.backbone_key, *fusion.keys.values()]
    values = [fusion.backbone_value, *fusion.values.values()]
    directions = sources / sources.norm(dim=-1, keepdim=True)
    keys = torch.stack([layer(directions[..., place, :]) for place, layer in enumerate(keys)], dim=-2)
    values = torch.stack([layer(sources[..., place, :]) for place, layer in enumerate(values)], dim=-2)
    own_scores = keys[..., -1] - torch.tensor([0.0, *[math.log(3)] * 3])
    query = fusion.to_query(directions[..., 0, :])[..., None, :]
    wanted = F.scaled_dot_product_attention(query, keys[..., :-1], values, attn_mask=own_scores[..., None, :])
    torch.testing.assert_close(fusion(state, adapters), wanted[..., 0, :])


@every_kind
def test_positions_do_not_see_each_other(fusion, values):
    fusion, (state, adapters) = trained(fusion, values), states()
    alone = fusion(state[1, 2], {name: of[1, 2] for name, of in adapters.items()})
    torch.testing.assert_close(alone, fusion(state, adapters)[1, 2])


@every_kind
def test_order_of_the_adapters_does_not_matter(fusion, values):
    fusion, (state, adapters) = trained(fusion, values), states()
    torch.testing.assert_close(fusion(state, dict(reversed(adapters.items()))), fusion(state, adapters))


@with_weights
def test_weights_are_those_that_the_states_are_fused_with(fusion, values):
    """If all adapters have the same state and all values are unchanged, only the sum of the weights counts."""
    fusion, (state, adapters) = new_fusion(fusion, values).requires_grad_(False), states()
    same = dict.fromkeys(adapters, adapters["a"])
    weights = fusion.weights(state, same)
    assert list(weights) == list(NAMES) and all(weight.shape == (4, 6) for weight in weights.values())
    total = sum(weights.values())[..., None]
    of_backbone = 1 - total if fusion.kind == "attention" else 1
    torch.testing.assert_close(fusion(state, same), of_backbone * state + total * adapters["a"])


# ---- How they start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fusion", "values"), NEAR.values(), ids=NEAR)
@pytest.mark.parametrize("count", [1, 2, 16])
def test_new_fusion_is_close_to_the_backbone_and_every_adapter_reaches_its_output(fusion, values, count):
    names = [f"adapter{number}" for number in range(count)]
    fusion, (state, adapters) = new_fusion(fusion, values, names), states(names)
    for adapter in adapters.values():
        adapter.requires_grad_()
    fused = fusion(state, adapters)
    assert torch.cosine_similarity(fused, state, dim=-1).mean() > 0.9
    fused.sum().backward()
    reached = [adapter.grad.abs().mean().item() for adapter in adapters.values()]
    assert sum(reached) > 0.09 and (fusion.kind == "gate" or min(reached) > 0.09 / count)


@every_kind
@torch.no_grad()
def test_fusion_of_a_model_from_a_configuration_starts_as_one_from_a_backbone(fusion, values, backbone):
    adapters = dict.fromkeys(NAMES, small_adapter())
    model = KAdapterModel.from_backbone(backbone, adapters, fusion=fusion, fusion_config=values)
    torch.testing.assert_close(
        KAdapterModel(model.config).fusion(*states()), model.fusion(*states()), rtol=0, atol=0.05
    )


# ---- In a model -----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("active", [("factual",), ("factual", "linguistic")])
def test_what_trains_is_what_the_forward_pass_uses(fusion, values, active, build):
    model = build(KAdapterForSequenceClassification, fusion=fusion, fusion_config=values)
    model.set_active_knowledge_adapters(active)
    model.train()
    model(**batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
    for name, parameter in model.fusion.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


@every_kind
def test_adapters_come_and_go_without_a_change_to_the_others(fusion, values, build):
    model = build(fusion=fusion, fusion_config=values)
    before = {name: tensor.clone() for name, tensor in model.fusion.state_dict().items()}
    model.add_knowledge_adapter("places", small_adapter())
    model.delete_knowledge_adapter("places")
    after = model.fusion.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@every_kind
def test_fusion_comes_back_with_its_configuration(fusion, values, build, tmp_path):
    model = build(fusion=fusion, fusion_config=values)
    model.save_pretrained(tmp_path)
    found = KAdapterModel.from_pretrained(tmp_path)
    assert (found.config.fusion, found.config.fusion_config) == (fusion, values)
    assert_same_weights(found, model)
    with torch.no_grad():
        assert torch.equal(found(**batch()).last_hidden_state, model(**batch()).last_hidden_state)


@every_kind
@torch.no_grad()
def test_fusion_in_another_precision_than_the_backbone(fusion, values, build):
    model = build(fusion=fusion, fusion_config=values)
    wanted = model(**batch()).last_hidden_state
    model.move_own_parts(torch.bfloat16)
    found = model(**batch()).last_hidden_state
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@every_kind
def test_compiled_fusion_computes_and_trains_as_without_it(fusion, values):
    """In one graph, which `fullgraph` demands."""
    torch._dynamo.reset()
    gradients = []
    for compiled in (False, True):
        module = new_fusion(fusion, values)
        disturb(module)
        run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        state, adapters = states()
        fused = run(state.requires_grad_(), adapters)
        fused.square().sum().backward()
        gradients.append([fused, state.grad, *(parameter.grad for parameter in module.parameters())])
    for found, wanted in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("fusion", ["gate", "attention"])
def test_lora_on_top_trains_is_saved_and_comes_back(fusion, build, tmp_path):
    model = build(KAdapterForSequenceClassification, fusion=fusion)
    model.add_knowledge_adapter("terms", small_adapter(num_hidden_layers=0))
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.train()(**batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_" in name)
    model.eval().save_pretrained(tmp_path)
    found = KAdapterForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(found(**batch()).logits, model(**batch()).logits)


# ---- Impossible values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fusion", "values", "message"),
    [
        ("add", {"scale": float("nan")}, "scale of the fusion 'add' must be a finite number, not nan"),
        ("add", {"scale": "large"}, "scale of the fusion 'add' must be a finite number, not 'large'"),
        ("gate", {"activation": "relu"}, "activation of the fusion 'gate' must be 'sigmoid' or 'softmax', not 'relu'"),
        ("gate", {"top_k": 0}, "top_k of the fusion 'gate' must be an int of at least 1, not 0"),
        ("attention", {"key_size": 1.5}, "key_size of the fusion 'attention' must be an int of at least 1, not 1.5"),
        ("gate", {"start": 1}, "start of the fusion 'gate' must be between 0 and 1, not 1"),
        ("attention", {"start": 0.0}, "start of the fusion 'attention' must be between 0 and 1, not 0.0"),
        ("concat", {"start": None}, "start of the fusion 'concat' must be a finite number, not None"),
        ("concat", {"scale": 1.0}, r"the fusion 'concat' has no \['scale'\]"),
        ("gate", {"topk": 1}, r"the fusion 'gate' has no \['topk'\]; did you mean 'top_k'\?"),
        ("gate", {"width": 1}, r"the fusion 'gate' has no \['width'\]"),
        ("attentoin", {}, "not 'attentoin'; did you mean 'attention'?"),
    ],
)
def test_impossible_fusion_is_refused_in_one_sentence(fusion, values, message, backbone):
    with pytest.raises(KAdapterConfigError, match=message) as caught:
        KAdapterModel.from_backbone(backbone, fusion=fusion, fusion_config=values)
    assert "\n" not in str(caught.value)


def test_gate_that_chooses_two_adapters_refuses_a_single_one(build):
    model = build(fusion="gate", fusion_config={"top_k": 2})
    model.set_active_knowledge_adapters("factual")
    with pytest.raises(KAdapterConfigError, match=r"top_k=2 .* only \['factual'\] are active: activate more"):
        model(**batch())
    model.set_active_knowledge_adapters(None)
    assert model(**batch()).knowledge_states is None


def test_configuration_of_an_unknown_fusion_is_refused_with_the_nearest():
    with pytest.raises(KAdapterConfigError, match=r"not 'gates'; did you mean 'gate'\?"):
        KAdapterConfig(fusion="gates")
