"""Trained and frozen parts: gradients, dropout, and their state after loading."""

import pytest
import torch
from conftest import ALL_CLASSES, batch, inputs_for, labels_for, small_adapter
from transformers import AutoModel

from kadapter_hf import KAdapterForMaskedLM, KAdapterForSequenceClassification, KAdapterModel


every_class = pytest.mark.parametrize("model_class", ALL_CLASSES, ids=lambda model_class: model_class.__name__)
FACTUAL, LINGUISTIC = "adapters.factual", "adapters.linguistic"
FUSION = {"fusion.states.factual", "fusion.states.linguistic", "fusion.mix.factual", "fusion.mix.linguistic"}


def trainable_parts(model) -> set[str]:
    """The parts whose parameters all train; fails if only some parameters of a part do."""
    parts: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        steps = {"adapters": 2, "fusion": 3}.get(name.split(".")[0], 1)
        parts.setdefault(".".join(name.split(".")[:steps]), set()).add(parameter.requires_grad)
    assert all(len(flags) == 1 for flags in parts.values()), parts
    return {part for part, flags in parts.items() if flags == {True}}


def backward(model):
    """Computes the gradients of one training step."""
    inputs = inputs_for(type(model))
    output = model.train()(**inputs, **labels_for(type(model), inputs))
    (output.last_hidden_state.square().mean() if type(model) is KAdapterModel else output.loss).backward()


# ---- The four ways (paper, section 3.3, and the original's fine-tuning) ----------------------------------------------


@every_class
def test_by_default_all_but_the_backbone_trains(model_class, build):
    model = build(model_class)
    head = {"lm_head"} if model_class is KAdapterForMaskedLM else {name for name, _ in model.named_children()}
    head -= {"backbone", "adapters", "fusion", "dropout"}
    assert trainable_parts(model) == {FACTUAL, LINGUISTIC, "fusion.bias"} | FUSION | head


def test_pretraining_an_adapter_trains_it_alone(build):
    model = build(KAdapterForSequenceClassification, freeze_backbone=False)
    model.train_knowledge_adapter("linguistic")
    assert trainable_parts(model) == {LINGUISTIC}
    model.train_knowledge_adapter("factual")
    assert trainable_parts(model) == {FACTUAL}


def test_pretraining_with_a_head_trains_fusion_and_head_too(build):
    model = build(KAdapterForSequenceClassification)
    model.train_knowledge_adapter("linguistic", train_head=True)
    assert trainable_parts(model) == {LINGUISTIC, "fusion.bias", "classifier"} | FUSION


def test_pretraining_activates_an_inactive_adapter(build):
    model = build()
    model.set_active_knowledge_adapters("factual")
    model.train_knowledge_adapter("linguistic")
    assert model.active_knowledge_adapters == ["factual", "linguistic"]
    assert trainable_parts(model) == {LINGUISTIC}


def test_fine_tuning_as_the_original_does(build):
    model = build(KAdapterForSequenceClassification)
    model.unfreeze_backbone()
    model.freeze_knowledge_adapters()
    assert trainable_parts(model) == {"backbone", "fusion.bias", "classifier"} | FUSION


def test_everything_can_train(build):
    model = build(KAdapterForSequenceClassification)
    model.unfreeze_backbone()
    assert trainable_parts(model) == {"backbone", FACTUAL, LINGUISTIC, "fusion.bias", "classifier"} | FUSION


def test_everything_can_be_frozen(build):
    model = build(KAdapterForSequenceClassification)
    model.freeze_knowledge_adapters()
    model.freeze_head()
    assert trainable_parts(model) == set()
    model.unfreeze_head()
    assert trainable_parts(model) == {"fusion.bias", "classifier"} | FUSION


@pytest.mark.parametrize("names", ["factual", ["factual"], ("factual",)])
def test_adapters_are_frozen_by_name(names, build):
    model = build()
    model.freeze_knowledge_adapters(names)
    assert model.config.frozen_knowledge_adapters == ["factual"]
    assert trainable_parts(model) == {LINGUISTIC, "fusion.bias"} | FUSION
    model.freeze_knowledge_adapters("linguistic")
    assert sorted(model.config.frozen_knowledge_adapters) == ["factual", "linguistic"]
    model.unfreeze_knowledge_adapters(names)
    assert trainable_parts(model) == {LINGUISTIC.replace("linguistic", "factual"), "fusion.bias"} | FUSION
    model.unfreeze_knowledge_adapters()
    assert model.config.frozen_knowledge_adapters == []


def test_each_freezing_has_its_opposite(build):
    model = build(KAdapterForSequenceClassification)
    before = trainable_parts(model)
    model.unfreeze_backbone()
    model.freeze_backbone()
    model.freeze_knowledge_adapters()
    model.unfreeze_knowledge_adapters()
    model.freeze_head()
    model.unfreeze_head()
    assert trainable_parts(model) == before


# ---- What the forward pass does not use does not train --------------------------------------------------------------


def test_inactive_adapter_does_not_train_and_does_again_when_active(build):
    model = build()
    model.set_active_knowledge_adapters("factual")
    assert trainable_parts(model) == {FACTUAL, "fusion.states.factual"}  # a single adapter is not mixed
    model.set_active_knowledge_adapters(None)
    assert trainable_parts(model) == set()
    model.set_active_knowledge_adapters(["factual", "linguistic"])
    assert trainable_parts(model) == {FACTUAL, LINGUISTIC, "fusion.bias"} | FUSION


def test_deleting_to_one_adapter_leaves_nothing_to_mix(build):
    model = build()
    model.delete_knowledge_adapter("linguistic")
    assert trainable_parts(model) == {FACTUAL, "fusion.states.factual"}


@every_class
@pytest.mark.parametrize("freeze_backbone", [True, False])
def test_whatever_trains_gets_a_gradient_and_nothing_else_does(model_class, freeze_backbone, build):
    model = build(model_class, adapters=("a", "b", "c"), freeze_backbone=freeze_backbone)
    model.set_active_knowledge_adapters(["a", "b"])
    model.freeze_knowledge_adapters("b")
    backward(model)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None and name.endswith("weight"):  # a softmax ignores some biases
            assert parameter.grad.abs().sum() > 0, name


def test_no_graph_is_built_through_what_is_frozen(build):
    model = build().train()
    output = model(**batch(), output_hidden_states=True)
    assert not output.backbone_last_hidden_state.requires_grad
    assert not any(state.requires_grad for state in output.hidden_states)
    assert output.last_hidden_state.requires_grad
    model.freeze_knowledge_adapters("factual")
    states = model(**batch()).knowledge_states
    assert not states["factual"].requires_grad and states["linguistic"].requires_grad


def test_frozen_adapters_pass_gradients_on_to_a_backbone_that_trains(build):
    """As in the original's fine-tuning, the adapters' inputs come from the backbone."""
    model = build(adapters=("factual",), fusion="add", freeze_backbone=False)
    model.freeze_knowledge_adapters()
    output = model(**batch())
    knowledge = output.knowledge_states["factual"].square().sum()
    (gradient,) = torch.autograd.grad(knowledge, model.get_input_embeddings().weight)
    assert gradient.abs().sum() > 0


@torch.no_grad()
def test_embeddings_that_the_language_model_head_shares_belong_to_the_backbone(build):
    model = build(KAdapterForMaskedLM)
    assert not model.get_output_embeddings().weight.requires_grad
    assert model.get_output_embeddings().bias.requires_grad
    model.unfreeze_backbone()
    assert model.get_output_embeddings().weight.requires_grad
    model.freeze_head()
    assert model.get_output_embeddings().weight.requires_grad
    assert not model.get_output_embeddings().bias.requires_grad


# ---- Dropout --------------------------------------------------------------------------------------------------------


def training(model) -> set[str]:
    modules = {
        "backbone": model.backbone,
        FACTUAL: model.adapters["factual"],
        LINGUISTIC: model.adapters["linguistic"],
    }
    for module in modules.values():
        assert len({child.training for child in module.modules()}) == 1
    return {name for name, module in modules.items() if module.training}


def test_train_leaves_frozen_parts_in_evaluation_mode(build):
    model = build(KAdapterForSequenceClassification)
    model.freeze_knowledge_adapters("factual")
    assert model.train() is model and model.training
    assert training(model) == {LINGUISTIC}
    assert model.dropout.training
    model.unfreeze_backbone()
    assert training(model) == {"backbone", LINGUISTIC}
    model.unfreeze_knowledge_adapters()
    assert training(model) == {"backbone", FACTUAL, LINGUISTIC}
    model.eval()
    assert training(model) == set() and not model.dropout.training
    model.train().freeze_backbone()
    assert training(model) == {FACTUAL, LINGUISTIC}


def test_frozen_head_has_no_dropout(build):
    model = build(KAdapterForSequenceClassification, classifier_dropout=0.9)
    model.freeze_knowledge_adapters()
    model.freeze_head()
    with torch.no_grad():
        evaluated = model.eval()(**batch()).logits
        assert torch.equal(model.train()(**batch()).logits, evaluated)


def test_frozen_parts_give_in_training_what_they_give_in_evaluation(build):
    model = build()
    model.freeze_knowledge_adapters("factual")
    with torch.no_grad():
        evaluated, trained = model.eval()(**batch()), model.train()(**batch())
    assert torch.equal(evaluated.backbone_last_hidden_state, trained.backbone_last_hidden_state)
    assert torch.equal(evaluated.knowledge_states["factual"], trained.knowledge_states["factual"])
    assert not torch.equal(evaluated.knowledge_states["linguistic"], trained.knowledge_states["linguistic"])


def test_adapter_added_while_training_has_dropout(build):
    model = build(adapters=("factual",)).train()
    model.add_knowledge_adapter("linguistic", small_adapter())
    assert training(model) == {FACTUAL, LINGUISTIC}


# ---- Keeping it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrange", ["original", "pretraining", "nothing", "inactive"])
def test_what_is_frozen_comes_back(arrange, build, tmp_path):
    model = build(KAdapterForSequenceClassification)
    if arrange == "original":
        model.unfreeze_backbone()
        model.freeze_knowledge_adapters()
    elif arrange == "pretraining":
        model.train_knowledge_adapter("linguistic")
    elif arrange == "nothing":
        model.freeze_knowledge_adapters()
        model.freeze_head()
    else:
        model.set_active_knowledge_adapters("factual")
    model.save_pretrained(tmp_path)
    loaded = KAdapterForSequenceClassification.from_pretrained(tmp_path)
    assert [(name, parameter.requires_grad) for name, parameter in loaded.named_parameters()] == [
        (name, parameter.requires_grad) for name, parameter in model.named_parameters()
    ]
    assert training(loaded.train()) == training(model.train())


def test_freezing_is_said_at_construction(backbone):
    model = KAdapterForSequenceClassification.from_backbone(
        backbone, adapters={"factual": small_adapter()}, freeze_backbone=False, freeze_head=True
    )
    assert trainable_parts(model) == {"backbone", FACTUAL}


def test_frozen_weights_stay_bit_for_bit_through_an_optimiser_step(build):
    model = build(KAdapterForSequenceClassification)
    model.freeze_knowledge_adapters("factual")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    backward(model)
    optimizer.step()
    for name, parameter in model.named_parameters():
        trains = not name.startswith(("backbone.", FACTUAL))
        assert torch.equal(parameter, before[name]) is not trains, name


def test_loaded_backbone_that_is_handed_over_is_frozen(backbone):
    loaded = AutoModel.from_pretrained(backbone, add_pooling_layer=False)
    KAdapterModel.from_backbone(loaded, adapters={"factual": small_adapter()})
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
