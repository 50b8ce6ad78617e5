"""PEFT's adapters on a K-Adapter: LoRA trains, saves and loads, and nothing of the K-Adapter is lost or changed."""

import json
import os

import pytest
import torch
from conftest import SMALL_ADAPTER, assert_same_weights, batch, contents, disturb
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from kadapter_hf import (
    KAdapterForMaskedLM,
    KAdapterForSequenceClassification,
    KAdapterLoadError,
    KAdapterModel,
    KnowledgeAdapterConfig,
)
from kadapter_hf.modeling.replacing_kadapter import finish_replacing


LABELS = torch.tensor([0, 1, 1])


def lora(**kwargs) -> LoraConfig:
    """On the backbone's attention, with dropout off so that runs can be compared."""
    return LoraConfig(r=4, lora_alpha=16, target_modules=kwargs.pop("target_modules", ["query", "value"]), **kwargs)


def train(model, steps: int = 3) -> None:
    """A few steps; PEFT starts LoRA's second matrix from zero, so the first of them moves that alone."""
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


def plain(model) -> dict[str, torch.Tensor]:
    """Copies of the tensors that are not PEFT's, under the names that they have without it."""
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
    """Its file records the fingerprint of the backbone's own weights, those that LoRA wraps included."""
    model = build()
    model.add_adapter(lora())
    disturb(model.adapters["factual"])
    path = model.save_knowledge_adapter(tmp_path, "factual")
    build(adapters=()).load_knowledge_adapter(path)


# ---- Saving and loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [KAdapterModel, KAdapterForSequenceClassification, KAdapterForMaskedLM])
def test_model_with_lora_comes_back_whole(model_class, build, tmp_path):
    """The K-Adapter was never saved before: its own parts must be in there too."""
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
    """A save replaces what an earlier one left: an old LoRA would be loaded on top of the new model."""
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
    """A folder with nothing but PEFT's two files, which name the K-Adapter that they are for."""
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
    assert "backbone.safetensors" in contents(tmp_path)  # it is not the named one any more
    assert_same_weights(KAdapterForSequenceClassification.from_pretrained(tmp_path), merged)


def test_a_lora_interrupted_in_saving_is_not_loaded_onto_another_save(build, tmp_path, monkeypatch):
    """The new model's files half moved: its LoRA, or the old one's, must not end up on the other."""
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
    """Trainer restores what PEFT has added only to a model that PEFT has wrapped."""
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
