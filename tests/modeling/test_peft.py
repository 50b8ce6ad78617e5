"""PEFT's adapters on a K-Adapter: LoRA trains, saves and loads, and nothing of the K-Adapter is lost or changed."""

import copy
import json
import logging
import os

import pytest
import torch
from conftest import (
    SMALL_ADAPTER,
    assert_same_weights,
    batch,
    contents,
    disturb,
    inputs_for,
    labels_for,
    small_adapter,
)
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    TaskType,
    TrainableTokensConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from kadapter_hf import (
    KAdapterConfigError,
    KAdapterForDependencyParsing,
    KAdapterForEntityTyping,
    KAdapterForMaskedLM,
    KAdapterForQuestionAnswering,
    KAdapterForRelationClassification,
    KAdapterForSequenceClassification,
    KAdapterForTokenClassification,
    KAdapterLoadError,
    KAdapterModel,
    KnowledgeAdapterConfig,
)
from kadapter_hf.modeling import loading_kadapter
from kadapter_hf.modeling.peft_kadapter import plain_state_dict
from kadapter_hf.modeling.replacing_kadapter import finish_replacing


LABELS = torch.tensor([0, 1, 1])


def lora(**kwargs) -> LoraConfig:
    """On the backbone's attention, with dropout off so that runs can be compared."""
    return LoraConfig(r=4, lora_alpha=16, target_modules=kwargs.pop("target_modules", ["query", "value"]), **kwargs)


def train(model, steps: int = 3) -> None:
    """A few steps: PEFT starts LoRA's second matrix from zero, so the first step changes only that."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(steps):
        output = model(**batch(), **({} if isinstance(model, KAdapterModel) else {"labels": LABELS}))
        loss = output.loss if "loss" in output else output.last_hidden_state.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def result(model) -> torch.Tensor:
    return model.eval()(**batch()).to_tuple()[0]


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def messages(caplog):
    """The log: transformers' loggers, which the package uses, don't propagate to caplog by default."""
    logger = logging.getLogger("transformers")
    propagated, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.WARNING, logger="transformers"):
        yield caplog
    logger.propagate = propagated


def plain(model) -> dict[str, torch.Tensor]:
    """Copies of the tensors that are not PEFT's, under their names without PEFT."""
    return {
        name.replace(".base_layer", "").replace(".original_module", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    }


# ---- Training -------------------------------------------------------------------------------------------------------


def test_only_lora_trains(build):
    model = build(KAdapterForSequenceClassification)
    before = plain(model)
    model.add_adapter(lora())
    assert trainable(model) and all("lora_" in name for name in trainable(model))
    model.train()(**batch(), labels=LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
    train(model)
    after = plain(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_new_lora_changes_nothing_and_a_trained_one_does(build):
    model = build(KAdapterForSequenceClassification)
    before = result(model)
    model.add_adapter(lora())
    assert torch.equal(result(model), before)
    train(model)
    assert not torch.allclose(result(model), before, atol=1e-3)


def test_lora_reaches_into_the_knowledge_adapters_where_it_is_asked_to(build):
    model = build()
    model.add_adapter(lora(target_modules=["down_project"]))
    names = trainable(model)
    assert names and all(name.startswith("adapters.") and ".down_project.lora_" in name for name in names)


def test_lora_on_a_frozen_backbone_has_dropout_in_training(build):
    """The backbone is in training mode again once something in it trains."""
    model = build()
    model.add_adapter(lora())
    model.train()
    assert model.backbone.training
    model.disable_adapters()
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


def test_freezing_by_name_leaves_lora_alone(build):
    model = build(KAdapterForSequenceClassification)
    model.add_adapter(lora())
    names = trainable(model)
    model.unfreeze_knowledge_adapters()
    model.set_active_knowledge_adapters("factual")
    assert names < trainable(model)
    model.freeze_knowledge_adapters()
    model.freeze_head()
    model.freeze_backbone()
    assert trainable(model) == names


def test_knowledge_adapters_can_train_together_with_lora(build):
    model = build(KAdapterForSequenceClassification)
    model.add_adapter(lora())
    model.train_knowledge_adapter("factual")
    assert {name.split(".")[0] for name in trainable(model)} == {"backbone", "adapters"}
    assert all("lora_" in name for name in trainable(model) if name.startswith("backbone."))
    train(model)


def test_knowledge_adapters_come_and_go_beside_lora(build, tmp_path):
    model = build(KAdapterForSequenceClassification)
    model.add_adapter(lora())
    train(model)
    model.delete_knowledge_adapter("factual")
    model.add_knowledge_adapter("places", KnowledgeAdapterConfig(**SMALL_ADAPTER))
    model.save_pretrained(tmp_path)
    assert torch.equal(result(KAdapterForSequenceClassification.from_pretrained(tmp_path)), result(model))


def test_adapter_that_changed_beside_lora_fits_its_backbone(build, tmp_path):
    """Its file records the fingerprint of the backbone's own weights, including those that LoRA wraps."""
    model = build()
    model.add_adapter(lora())
    disturb(model.adapters["factual"])
    path = model.save_knowledge_adapter(tmp_path, "factual")
    build(adapters=()).load_knowledge_adapter(path)


# ---- Saving and loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [KAdapterModel, KAdapterForSequenceClassification, KAdapterForMaskedLM])
def test_model_with_lora_comes_back_whole(model_class, build, tmp_path):
    """The K-Adapter was not saved before: its own parts must be saved too."""
    model = build(model_class)
    before = plain(model)
    model.add_adapter(lora())
    if model_class is KAdapterForMaskedLM:
        disturb_lora(model)
    else:
        train(model)
    model.save_pretrained(tmp_path)
    files = set(contents(tmp_path))
    assert {"config.json", "adapter_config.json", "adapter_model.safetensors", "adapters/factual.safetensors"} <= files
    assert "backbone.safetensors" not in files
    for loaded in (model_class.from_pretrained(tmp_path), auto_class(model_class).from_pretrained(tmp_path)):
        assert type(loaded) is model_class
        assert torch.equal(result(loaded), result(model))
        assert loaded.active_adapters() == ["default"]
        for name, tensor in plain(loaded).items():
            assert torch.equal(tensor, before[name]), name


def auto_class(model_class):
    return {
        KAdapterModel: AutoModel,
        KAdapterForSequenceClassification: AutoModelForSequenceClassification,
        KAdapterForMaskedLM: AutoModelForMaskedLM,
    }[model_class]


def disturb_lora(model) -> None:
    for name, module in model.named_modules():
        if name.endswith(("lora_A", "lora_B")):
            disturb(module)


def test_knowledge_adapters_are_stored_as_without_lora(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "plain")
    model.add_adapter(lora(target_modules=["query", "down_project", "dense"]))
    disturb_lora(model)
    model.save_pretrained(tmp_path / "lora")
    stored, with_lora = contents(tmp_path / "plain"), contents(tmp_path / "lora")
    for file in ("adapters/factual.safetensors", "adapters/linguistic.safetensors", "head.safetensors"):
        assert stored[file] == with_lora[file]
    model.save_knowledge_adapter(tmp_path / "alone", "factual")
    assert contents(tmp_path / "alone")["adapters/factual.safetensors"] == stored["adapters/factual.safetensors"]
    assert torch.equal(result(KAdapterModel.from_pretrained(tmp_path / "lora")), result(model))


def test_without_peft_a_warning_says_that_its_adapter_is_left_out(build, tmp_path, messages, monkeypatch):
    model = build()
    expected = result(model)
    model.add_adapter(lora())
    train(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(loading_kadapter, "is_peft_available", lambda: False)  # as where PEFT is not installed
    assert torch.equal(result(KAdapterModel.from_pretrained(tmp_path)), expected)
    assert "has an adapter of PEFT, which is left out" in messages.text


def test_saved_again_it_is_the_same(build, tmp_path):
    model = build(KAdapterForSequenceClassification)
    model.add_adapter(lora())
    train(model)
    model.save_pretrained(tmp_path / "one")
    KAdapterForSequenceClassification.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [file for file in one if file.endswith(".safetensors") and one[file] != two[file]] == []


def test_model_without_lora_leaves_none_in_the_folder(build, tmp_path):
    """A save removes an earlier LoRA, which would otherwise be loaded on top of the new model."""
    model = build(KAdapterForSequenceClassification)
    before = result(model)
    model.add_adapter(lora())
    train(model)
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    model.save_pretrained(tmp_path)
    assert torch.equal(result(KAdapterForSequenceClassification.from_pretrained(tmp_path)), before)


def test_trained_backbone_and_lora_on_it_come_back(build, tmp_path):
    model = build(KAdapterForSequenceClassification, freeze_backbone=False)
    disturb(model.backbone, 3)
    model.add_adapter(lora())
    train(model)
    model.save_pretrained(tmp_path)
    assert "backbone.safetensors" in contents(tmp_path)
    assert torch.equal(result(KAdapterForSequenceClassification.from_pretrained(tmp_path)), result(model))


def test_head_that_trains_with_lora_comes_back(build, tmp_path):
    model = build(KAdapterForSequenceClassification)
    before = plain(model)
    model.add_adapter(lora(modules_to_save=["classifier"]))
    assert any("modules_to_save" in name for name in trainable(model))
    train(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(result(loaded), result(model))
    loaded.disable_adapters()
    model.disable_adapters()
    assert torch.equal(result(loaded), result(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain(loaded).items())


def test_several_lora_adapters_are_told_apart(build):
    model = build(KAdapterForSequenceClassification)
    plain_result = result(model)
    outputs = {}
    for name, seed in (("one", 1), ("two", 2)):
        model.add_adapter(lora(), adapter_name=name)
        model.set_adapter(name)
        for part, module in model.named_parameters():
            if f"lora_B.{name}" in part:
                torch.nn.init.normal_(module, std=0.5, generator=torch.Generator().manual_seed(seed))
        outputs[name] = result(model)
    assert not torch.allclose(outputs["one"], outputs["two"])
    model.set_adapter("one")
    assert torch.equal(result(model), outputs["one"])
    model.disable_adapters()
    assert torch.equal(result(model), plain_result)
    model.enable_adapters()
    assert torch.equal(result(model), outputs["one"])
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(result(model), outputs["two"])


def test_lora_saved_by_peft_alone_loads_onto_the_model(build, tmp_path):
    """A folder with only PEFT's two files, which name their K-Adapter."""
    model = build(KAdapterForSequenceClassification)
    model.save_pretrained(tmp_path / "base")
    model = KAdapterForSequenceClassification.from_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, lora(task_type=TaskType.SEQ_CLS))
    train(wrapped)
    wrapped.save_pretrained(tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    assert not os.path.exists(tmp_path / "lora" / "config.json")
    wanted = result(wrapped)
    again = KAdapterForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(result(PeftModel.from_pretrained(again, tmp_path / "lora")), wanted)
    for loader in (KAdapterForSequenceClassification, AutoModelForSequenceClassification):
        loaded = loader.from_pretrained(tmp_path / "lora")
        assert type(loaded) is KAdapterForSequenceClassification
        torch.testing.assert_close(result(loaded), wanted)


def test_lora_of_a_wrapped_model_survives_freezing_by_name_and_merges(build, tmp_path):
    model = build(KAdapterForSequenceClassification)
    wrapped = get_peft_model(model, lora())
    names = trainable(wrapped)
    model.set_active_knowledge_adapters("factual")
    model.freeze_head()
    model.freeze_knowledge_adapters()
    assert trainable(wrapped) == names
    model.unfreeze_head()
    model.set_active_knowledge_adapters(["factual", "linguistic"])
    train(wrapped)
    wanted = result(wrapped)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(result(merged), wanted)
    merged.save_pretrained(tmp_path)
    assert "backbone.safetensors" in contents(tmp_path)  # it is no longer the named one
    assert_same_weights(KAdapterForSequenceClassification.from_pretrained(tmp_path), merged)


def test_a_lora_interrupted_in_saving_is_not_loaded_onto_another_save(build, tmp_path, monkeypatch):
    """The files are partly moved: the LoRA of one model must not be loaded onto the other."""
    model = build(KAdapterForSequenceClassification)
    plain_result = result(model)
    model.add_adapter(lora())
    train(model)
    model.save_pretrained(tmp_path)
    with_lora = result(model)
    model.delete_adapter("default")
    replace = os.replace

    def replace_until_the_index(source, target):
        if str(target).endswith("index.json"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until_the_index)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path)
    for loader in (KAdapterForSequenceClassification, AutoModelForSequenceClassification):
        with pytest.raises(KAdapterLoadError, match="interrupted.*finish_replacing"):
            loader.from_pretrained(tmp_path)
    finish_replacing(tmp_path)
    assert torch.equal(result(KAdapterForSequenceClassification.from_pretrained(tmp_path)), plain_result)
    assert not torch.equal(with_lora, plain_result)


# ---- Weights that would be lost --------------------------------------------------------------------------------------


def add_to_the_backbone(model):
    model.backbone.add_adapter(lora())
    return model


def inject(model):
    return inject_adapter_in_model(lora(), model)


def wrap(model):
    get_peft_model(model, lora())
    return model


def wrap_with_a_trained_head(model):
    get_peft_model(model, lora(target_modules=["key"], modules_to_save=["classifier"]))
    return model


def build_on_a_backbone_that_has_lora(model):
    backbone = AutoModel.from_pretrained(model.config.backbone_name_or_path)
    backbone.add_adapter(lora())
    return KAdapterForSequenceClassification.from_backbone(backbone)


def build_on_a_masked_lm_that_has_lora(model):
    backbone = AutoModelForMaskedLM.from_pretrained(model.config.backbone_name_or_path)
    backbone.add_adapter(lora())
    return KAdapterForSequenceClassification.from_backbone(backbone)


def add_beside_one_in_the_backbone(model):
    model.backbone.add_adapter(lora(), adapter_name="inner")
    model.add_adapter(lora(), adapter_name="outer")
    return model


@pytest.mark.parametrize(
    "attach",
    [
        add_to_the_backbone,
        inject,
        wrap,
        wrap_with_a_trained_head,
        build_on_a_backbone_that_has_lora,
        build_on_a_masked_lm_that_has_lora,
        add_beside_one_in_the_backbone,
    ],
)
def test_weights_of_peft_that_would_not_be_saved_are_refused(attach, build, tmp_path):
    model = attach(build(KAdapterForSequenceClassification))
    with pytest.raises(KAdapterConfigError, match="would leave out the weights.*add_adapter"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_second_peft_adapter_is_saved_by_activating_it(build, tmp_path, messages):
    """A folder holds one PEFT adapter, as with every transformers model; a warning names the others."""
    model = build(KAdapterForSequenceClassification)
    for name in ("first", "second"):
        model.add_adapter(lora(), adapter_name=name)
        disturb_lora(model)
    for name, other in (("first", "second"), ("second", "first")):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        assert f"without ['{other}']" in messages.messages[-1]
        assert torch.equal(result(KAdapterForSequenceClassification.from_pretrained(tmp_path / name)), result(model))


def test_an_adapter_file_without_the_lora_inside_the_adapter_says_so(build, tmp_path, messages):
    model = build()
    model.add_adapter(lora(target_modules="adapters.factual.*down_project"))
    model.save_knowledge_adapter(tmp_path, "linguistic")
    assert not messages.messages
    model.save_knowledge_adapter(tmp_path, "factual")
    assert "without what PEFT has put into 'adapters.factual.layers.0.down_project'" in messages.text


def test_a_merged_lora_is_not_saved_a_second_time(build, tmp_path):
    model = build(KAdapterForSequenceClassification)
    model.add_adapter(lora())
    train(model)
    wanted = result(model)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.merge()
    with pytest.raises(KAdapterConfigError, match="is merged into .* unmerge_adapter"):
        model.save_pretrained(tmp_path)
    for layer in layers:
        layer.unmerge()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(result(KAdapterForSequenceClassification.from_pretrained(tmp_path)), wanted)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal", "eva", False])
def test_every_initialisation_of_lora_comes_back_exactly(init, build, tmp_path):
    """Some subtract LoRA's start from the base weights, which are saved like that: loading must not repeat it."""
    model = build(KAdapterForSequenceClassification)
    model.add_adapter(lora(init_lora_weights=init))
    disturb_lora(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(result(KAdapterForSequenceClassification.from_pretrained(tmp_path)), result(model))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"]
    assert saved == (True if init in ("pissa", "pissa_niter_4", "olora") else init)


def test_corda_comes_back_exactly(build, tmp_path):
    """It needs covariances that are not there when loading."""
    model = build(KAdapterForSequenceClassification)
    config = lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    preprocess_corda(model, config, run_model=lambda: model(**batch(rows=1)))  # it takes single rows
    model.add_adapter(config)
    disturb_lora(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(result(KAdapterForSequenceClassification.from_pretrained(tmp_path)), result(model))


@pytest.mark.parametrize("model_class", [KAdapterModel, KAdapterForSequenceClassification, KAdapterForMaskedLM])
@pytest.mark.parametrize(
    "config",
    [lora(trainable_token_indices=[7, 8]), TrainableTokensConfig(token_indices=[7, 8])],
    ids=["beside LoRA", "alone"],
)
def test_trained_tokens_come_back(model_class, config, build, tmp_path):
    model = build(model_class)
    names = set(model.state_dict())
    model.add_adapter(copy.deepcopy(config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    assert set(plain_state_dict(model)) == names
    model.save_pretrained(tmp_path)
    assert torch.equal(result(model_class.from_pretrained(tmp_path)), result(model))


METHODS = {
    "IA3": IA3Config(target_modules=["key", "value"], feedforward_modules=[]),
    "LoHa": LoHaConfig(target_modules=["query"]),
    "LoKr": LoKrConfig(target_modules=["query"]),
    "OFT": OFTConfig(target_modules=["query"], oft_block_size=4, r=0),
    "BOFT": BOFTConfig(target_modules=["query"], boft_block_size=4),
    "AdaLoRA": AdaLoraConfig(target_modules=["query"], total_step=10),
    "HRA": HRAConfig(target_modules=["query"]),
    "RandLoRA": RandLoraConfig(target_modules=["query"], r=4),
    "layer norms": LNTuningConfig(target_modules=["LayerNorm"]),
    "DoRA": lora(use_dora=True),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_add_adapter_takes_comes_back(method, build, tmp_path):
    model = build(KAdapterForSequenceClassification)
    names = set(model.state_dict())
    model.add_adapter(copy.deepcopy(METHODS[method]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    assert set(plain_state_dict(model)) == names
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(result(KAdapterForSequenceClassification.from_pretrained(tmp_path)), result(model))


MASKED_LM_HEADS = {"roberta": "lm_head.lm_head", "bert": "lm_head", "distilbert": "lm_head", "modernbert": "decoder"}


@pytest.mark.parametrize("model_type", MASKED_LM_HEADS)
def test_masked_lm_head_that_trains_with_lora_comes_back(model_type, build, backbones, tmp_path):
    """Tensors that share memory are all in the file, as PEFT reads each of them."""
    model = build(KAdapterForMaskedLM, backbone=backbones[model_type])
    before = result(model)
    model.add_adapter(lora(target_modules="adapters.*query", modules_to_save=[MASKED_LM_HEADS[model_type]]))
    assert torch.equal(result(model), before)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path)
    loaded = KAdapterForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(result(loaded), result(model))
    assert not torch.equal(result(loaded), before)


def test_a_copied_masked_lm_head_has_the_same_backbone(build):
    model = build(KAdapterForMaskedLM)
    parts = copy.deepcopy(model.lm_head), copy.deepcopy(model)
    assert parts[0].base_model.__dict__["backbone"] is model.backbone
    assert parts[1].lm_head.base_model.__dict__["backbone"] is parts[1].backbone


@pytest.mark.parametrize("attach", ["add_adapter", "get_peft_model"])
def test_a_name_that_fits_a_module_and_one_inside_it_is_refused(attach, build, tmp_path):
    """PEFT would train the inner one, which is not used. RoBERTa's own head has the same name."""
    model = build(KAdapterForMaskedLM)
    config = lora(modules_to_save=["lm_head"])
    wrapped = get_peft_model(model, config) if attach == "get_peft_model" else model
    if attach == "add_adapter":
        model.add_adapter(config)
    for refused in (wrapped.train, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(KAdapterConfigError, match=r"modules_to_save=\['lm_head.lm_head'\]"):
            refused()


@pytest.mark.parametrize("with_name", [True, False])
@pytest.mark.parametrize("name", ["default", "query"])
def test_state_dict_of_lora_loads_with_and_without_the_adapters_name(name, with_name, build):
    model = build(KAdapterForSequenceClassification)
    model.add_adapter(lora(modules_to_save=["classifier"]), adapter_name=name)
    disturb_lora(model)
    state = model.get_adapter_state_dict(name)
    if with_name:
        state = {
            key: tensor for key, tensor in model.state_dict().items() if "lora_" in key or "modules_to_save" in key
        }
    loaded = build(KAdapterForSequenceClassification)
    loaded.load_adapter(adapter_name=name, peft_config=lora(modules_to_save=["classifier"]), adapter_state_dict=state)
    assert torch.equal(result(loaded), result(model))


def test_state_dict_of_another_models_lora_is_refused(build):
    model = build(KAdapterForSequenceClassification)
    with pytest.raises(KAdapterLoadError, match="^adapter_state_dict holds a PEFT adapter for another model"):
        model.load_adapter(peft_config=lora(), adapter_state_dict={"elsewhere.lora_A.weight": torch.zeros(1)})


# ---- What PEFT has frozen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_active_knowledge_adapters(["factual"]),
        lambda model: model.unfreeze_head(),
        lambda model: model.unfreeze_knowledge_adapters(),
        lambda model: model.unfreeze_backbone(),
        lambda model: model.train_knowledge_adapter("factual", train_head=True),
        lambda model: model.delete_knowledge_adapter("factual"),
    ],
)
@pytest.mark.parametrize("modules_to_save", [None, ["classifier"]])
def test_nothing_is_thawed_in_a_wrapped_model(change, modules_to_save, build):
    """PEFT would not save what trains beside its own weights."""
    model = build(KAdapterForSequenceClassification)
    wrapped = get_peft_model(model, lora(target_modules="backbone.*query", modules_to_save=modules_to_save))
    names = trainable(wrapped)
    change(model)
    assert trainable(wrapped) == names


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_active_knowledge_adapters(["factual"]),
        lambda model: model.freeze_head(),
        lambda model: model.freeze_knowledge_adapters("factual"),
        lambda model: model.delete_knowledge_adapter("factual"),
    ],
)
@pytest.mark.parametrize("attach", ["prompt tuning", "add_adapter"])
def test_nothing_that_peft_has_frozen_is_thawed_in_passing(change, attach, build):
    model = build(KAdapterForSequenceClassification)
    if attach == "add_adapter":
        outer = model
        model.add_adapter(lora(target_modules="backbone.*query"))
    else:
        sizes = {"token_dim": 32, "num_attention_heads": 2}
        outer = get_peft_model(model, PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3, **sizes))
    names = trainable(outer)
    change(model)
    assert trainable(outer) == names


def test_the_original_of_a_head_that_peft_trains_stays_frozen(build):
    """The forward pass does not use it: DDP would wait for its gradients."""
    model = build(KAdapterForSequenceClassification)
    model.add_adapter(lora(modules_to_save=["classifier"]))
    model.unfreeze_head()
    assert {name for name in trainable(model) if name.startswith("classifier")} == {
        "classifier.modules_to_save.default.weight",
        "classifier.modules_to_save.default.bias",
    }


# ---- Prompt methods --------------------------------------------------------------------------------------------------


TASKS = {
    KAdapterModel: TaskType.FEATURE_EXTRACTION,
    KAdapterForSequenceClassification: TaskType.SEQ_CLS,
    KAdapterForTokenClassification: TaskType.TOKEN_CLS,
    KAdapterForQuestionAnswering: TaskType.QUESTION_ANS,
    KAdapterForEntityTyping: TaskType.SEQ_CLS,
    KAdapterForRelationClassification: TaskType.SEQ_CLS,
    KAdapterForMaskedLM: TaskType.FEATURE_EXTRACTION,
    KAdapterForDependencyParsing: TaskType.FEATURE_EXTRACTION,
}
every_task = pytest.mark.parametrize("model_class", TASKS, ids=lambda model_class: model_class.__name__)


@torch.no_grad()
def tensors_of(output) -> tuple:
    return tuple(value for value in output.to_tuple() if isinstance(value, torch.Tensor))


@every_task
def test_prefix_tuning_goes_through_the_knowledge_adapters(model_class, build):
    """The prefix is before the backbone's keys and values only; adapters and head read the positions of the text."""
    model = build(model_class)
    inputs = inputs_for(model_class, padding=3)
    without = tensors_of(model(**inputs))
    wrapped = get_peft_model(model, PrefixTuningConfig(task_type=TASKS[model_class], num_virtual_tokens=3))
    wrapped.eval()
    found = tensors_of(wrapped(**inputs))
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in without]
    assert not torch.allclose(found[0], without[0])
    long_mask = torch.cat([torch.ones(len(inputs["input_ids"]), 3), inputs["attention_mask"]], dim=1)
    by_hand = model.backbone(
        inputs["input_ids"],
        attention_mask=long_mask,
        past_key_values=wrapped.get_prompt(len(long_mask)),
        output_hidden_states=True,
    )
    read = [by_hand.hidden_states[index] for index in model.backbone_states_read()]
    states = torch.stack([*read, by_hand.last_hidden_state], dim=1)
    mask = {"attention_mask": inputs["attention_mask"]}
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    for tensor, wanted in zip(found, tensors_of(model(backbone_states=states, **mask, **rest)), strict=True):
        torch.testing.assert_close(tensor, wanted)


@every_task
def test_prefix_tuning_trains_the_prefix(model_class, build):
    wrapped = get_peft_model(
        build(model_class), PrefixTuningConfig(task_type=TASKS[model_class], num_virtual_tokens=3)
    )
    inputs = inputs_for(model_class)
    output = wrapped.train()(**inputs, **labels_for(model_class, inputs))
    (output.last_hidden_state.square().mean() if model_class is KAdapterModel else output.loss).backward()
    assert all(parameter.grad.any() for parameter in wrapped.prompt_encoder.parameters())


@pytest.mark.parametrize("model_type", ["distilbert", "deberta-v2", "modernbert"])
def test_prefix_tuning_on_a_backbone_that_takes_no_prefix_is_refused_in_a_sentence(model_type, build, backbones):
    for model_class in (KAdapterForSequenceClassification, KAdapterForQuestionAnswering):
        model = build(model_class, backbone=backbones[model_type])
        wrapped = get_peft_model(model, PrefixTuningConfig(task_type=TASKS[model_class], num_virtual_tokens=3))
        with pytest.raises(KAdapterConfigError, match="takes no past_key_values, which PEFT's prefix tuning"):
            wrapped(**batch())


def test_running_positions_go_on_after_the_prefix(backbone):
    """A backbone whose adapters attend to padding gives a full row the same positions as any other."""
    adapters = {"factual": small_adapter(attend_to_padding=True)}
    model = KAdapterModel.from_backbone(backbone, adapters=adapters).eval()
    wrapped = get_peft_model(
        model, PrefixTuningConfig(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=3)
    ).eval()
    found = wrapped(**batch()).backbone_last_hidden_state
    model.set_active_knowledge_adapters(None)
    torch.testing.assert_close(found, wrapped(**batch()).backbone_last_hidden_state)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3),
        PromptEncoderConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3, encoder_hidden_size=16),
        PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_prompt_methods_find_the_sizes_and_come_back(config, build, tmp_path):
    model = build(KAdapterForSequenceClassification)
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, copy.deepcopy(config)).eval()
    found = wrapped.peft_config["default"]
    assert (found.token_dim, found.num_layers, found.num_attention_heads) == (32, 4, 2)
    disturb(wrapped.prompt_encoder)
    wrapped.save_pretrained(tmp_path / "prompt")
    base = KAdapterForSequenceClassification.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "prompt")
    torch.testing.assert_close(result(again), result(wrapped))


@pytest.mark.parametrize(
    "model_class", [KAdapterForEntityTyping, KAdapterForRelationClassification, KAdapterForDependencyParsing]
)
def test_positions_count_without_the_virtual_tokens(model_class, build):
    """As if they were shifted in a call of the model itself."""
    model = build(model_class)
    inputs = inputs_for(model_class)
    wrapped = get_peft_model(model, PromptTuningConfig(task_type=TASKS[model_class], num_virtual_tokens=3)).eval()
    embedded = torch.cat([wrapped.get_prompt(4), model.get_input_embeddings()(inputs["input_ids"])], dim=1)
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    shifted = {name: torch.where(value < 0, value, value + 3) for name, value in rest.items()}
    wanted = tensors_of(model(inputs_embeds=embedded, attention_mask=torch.ones(4, 13), **shifted))
    for tensor, other in zip(tensors_of(wrapped(**inputs)), wanted, strict=True):
        torch.testing.assert_close(tensor, other)
    given = model.get_input_embeddings()(inputs["input_ids"])
    for tensor, other in zip(tensors_of(model(inputs_embeds=given, **rest)), tensors_of(model(**inputs)), strict=True):
        torch.testing.assert_close(tensor, other)


def test_a_marker_among_the_virtual_tokens_is_refused_as_outside(build):
    model = build(KAdapterForEntityTyping)
    wrapped = get_peft_model(model, PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3))
    for outside in (-1, 10):
        with pytest.raises(ValueError, match="entity_start has .* the rows are 10 tokens long"):
            wrapped(**batch(), entity_start=torch.tensor([outside, 0, 0]))


@pytest.mark.parametrize("model_class", [KAdapterForEntityTyping, KAdapterForRelationClassification])
def test_a_new_head_that_peft_does_not_train_is_named(model_class, build, messages):
    """PEFT trains the head of a classifier only if its name is classifier or score."""
    logging.Logger.warning_once.cache_clear()  # it is logged only once; other tests may have caused it
    model = build(model_class)
    get_peft_model(model, lora(task_type=TaskType.SEQ_CLS, target_modules="backbone.*query")).train()
    assert "modules_to_save=['dense', 'out_proj']" in messages.text
    messages.clear()
    named = lora(target_modules="backbone.*query", modules_to_save=["dense", "out_proj"], task_type=TaskType.SEQ_CLS)
    wrapped = get_peft_model(build(model_class), named)
    wrapped.train()
    assert not [text for text in messages.messages if "modules_to_save" in text]
    assert any("out_proj" in name for name in trainable(wrapped))


# ---- As a backbone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [lora(), PromptTuningConfig(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=2)]
)
def test_a_model_that_peft_has_wrapped_is_no_backbone(config, build, backbone, tmp_path):
    wrapped = get_peft_model(AutoModel.from_pretrained(backbone), config)
    build().save_pretrained(tmp_path)
    for load in (
        lambda: KAdapterModel.from_backbone(wrapped),
        lambda: KAdapterModel.from_pretrained(tmp_path, backbone=wrapped),
    ):
        with pytest.raises(KAdapterConfigError, match="PEFT has wrapped can't be a backbone.*merge_and_unload"):
            load()


def test_a_backbone_that_lora_was_merged_into_is_one(backbone, tmp_path):
    wrapped = get_peft_model(AutoModel.from_pretrained(backbone), lora())
    disturb_lora(wrapped)
    model = KAdapterModel.from_backbone(wrapped.merge_and_unload())
    model.save_pretrained(tmp_path)
    assert torch.equal(result(KAdapterModel.from_pretrained(tmp_path)), result(model))


# ---- Trainer --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tokenizer):
    """`trainer(model, folder, …)`: a stock Trainer on a handful of rows."""
    rows = [
        {**tokenizer(text), "labels": number % 2} for number, text in enumerate(["the cat sat", "rome is old"] * 4)
    ]

    def trainer(model, folder, **kwargs):
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            max_steps=4,
            save_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))

    return trainer


def test_trainer_trains_lora_and_its_checkpoint_is_the_whole_model(build, trainer, tmp_path):
    model = build(KAdapterForSequenceClassification)
    model.add_adapter(lora(modules_to_save=["classifier"]))
    before = result(model)
    trainer(model, tmp_path).train()
    assert not torch.allclose(result(model), before)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(result(saved), result(model))


def test_checkpoint_that_would_not_restore_lora_is_not_resumed_from(build, trainer, tmp_path):
    """Trainer restores PEFT's weights only if PEFT has wrapped the model."""
    model = build(KAdapterForSequenceClassification)
    model.add_adapter(lora())
    trainer(model, tmp_path).train()
    with pytest.raises(KAdapterLoadError, match="get_peft_model"):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_wrapped_model_is_trained_and_resumed_to_the_same_weights(build, trainer, tmp_path):
    def wrapped():
        torch.manual_seed(0)
        return get_peft_model(build(KAdapterForSequenceClassification), lora(task_type=TaskType.SEQ_CLS))

    whole, resumed = wrapped(), wrapped()
    trainer(whole, tmp_path).train()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed, whole)
    assert not torch.allclose(result(whole), result(wrapped()))
