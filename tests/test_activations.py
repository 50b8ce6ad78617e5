"""Cached states of frozen parts: the same as those that the model computes, for every head; in memory and in a folder."""

import os
import shutil
from collections import namedtuple

import psutil
import pytest
import torch
from conftest import ALL_CLASSES, disturb, inputs_for, labels_for, small_adapter
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, Trainer, TrainingArguments

from kadapter_hf import (
    HeadModel,
    KAdapterForDependencyParsing,
    KAdapterForEntityTyping,
    KAdapterForMaskedLM,
    KAdapterForQuestionAnswering,
    KAdapterForRelationClassification,
    KAdapterForSequenceClassification,
    KAdapterForTokenClassification,
    KAdapterModel,
    cross_entropy,
    encodes_inputs,
)
from kadapter_hf.activations import CachedStates, CachedStatesCollator, cached_states


PADDING = {"input_ids": 1, "attention_mask": 0, "labels": -100, "word_starts": -1, "head_labels": -100}
PADDING["relation_labels"] = -100


def collate(rows: list[dict], side: str = "right") -> dict[str, torch.Tensor]:
    """Pads every column of token or word values to its longest row."""
    batch = {}
    for name in rows[0]:
        values = [torch.tensor(row[name]) for row in rows]
        if name in PADDING and values[0].dim():
            most = max(value.shape[-1] for value in values)
            empty = {"left": lambda free: (free, 0), "right": lambda free: (0, free)}[side]
            values = [
                torch.nn.functional.pad(value, empty(most - value.shape[-1]), value=PADDING[name]) for value in values
            ]
        batch[name] = torch.stack(values)
    return batch


def examples(model_class: type) -> Dataset:
    """Rows of two lengths, with labels."""
    rows = []
    for length in (10, 14):
        inputs = inputs_for(model_class, rows=6, length=length, seed=length)
        if model_class is not KAdapterForQuestionAnswering:  # whose loss reads padding
            inputs |= labels_for(model_class, inputs)
        for number in range(len(inputs["input_ids"])):
            rows.append({name: of_rows[number].tolist() for name, of_rows in inputs.items()})
    for row in rows:  # words that are not there, at the end of a row
        words = [start for start in row.get("word_starts", ()) if start >= 0]
        for name in row.keys() & {"word_starts", "head_labels", "relation_labels"}:
            row[name] = row[name][: len(words)]
    return Dataset.from_list(rows)


def refuse(*args, **kwargs):
    raise AssertionError("a frozen part runs")


@pytest.fixture
def without(monkeypatch):
    """`without(*modules)`: these modules can't run any more."""

    def without(*modules: torch.nn.Module) -> None:
        for module in modules:
            monkeypatch.setattr(module, "forward", refuse)

    return without


def assert_same_outputs(found, expected, real: torch.Tensor) -> None:
    """Equal where the tokens are `real`, within 1e-5 of the largest value."""
    for name, tensor in expected.items():
        if not torch.is_tensor(tensor):
            continue
        pair = (found[name], tensor)
        if tensor.shape[:2] == real.shape:
            pair = (found[name][real], tensor[real])
        torch.testing.assert_close(*pair, rtol=0, atol=1e-5 * max(1, tensor.abs().max().item()))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen-adapters", "adapters-train"])
@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_every_head_gives_the_same_on_cached_states(model_class, frozen, build, without):
    model = build(model_class)
    disturb(model)
    if frozen:
        model.freeze_knowledge_adapters()
    rows = examples(model_class)
    cached = cached_states(model, rows, collate, batch_size=3)
    places = [0, len(rows) - 1, len(rows) // 2 - 1]
    batch = collate(rows.select(places).to_list())
    with torch.no_grad():
        expected = model(**batch)
        without(model.backbone, *(model.adapters.values() if frozen else ()))
        found = model(**CachedStatesCollator(collate)(cached.__getitems__(places)))
    assert_same_outputs(found, expected, batch["attention_mask"].bool())


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen-adapters", "adapters-train"])
def test_rows_with_fewer_words_than_those_they_were_computed_with(frozen, build):
    """A parser reads as many positions as the longest row of a batch has words."""
    words = [[1, 2], [1, 3, 5, 6, 7, 8], [2, 4, 8]]
    tokens = inputs_for(KAdapterForDependencyParsing, rows=3)["input_ids"].tolist()
    rows = Dataset.from_list(
        [
            {"input_ids": of_row, "attention_mask": [1] * len(of_row), "word_starts": starts}
            for of_row, starts in zip(tokens, words, strict=True)
        ]
    )
    model = build(KAdapterForDependencyParsing, fusion="gate").eval()
    if frozen:
        model.freeze_knowledge_adapters()
    collator = CachedStatesCollator(collate)
    cached = cached_states(model, rows, collator, batch_size=3)
    for chosen in ([0], [0, 2], [1, 2]):
        batch = collate([rows[row] for row in chosen])
        with torch.no_grad():
            expected, found = model(**batch), model(**collator([cached[row] for row in chosen]))
        assert_same_outputs(found, expected, batch["attention_mask"].bool())


def test_padding_may_be_on_the_left(build, without):
    model = build(KAdapterForTokenClassification)
    rows = examples(KAdapterForTokenClassification)

    def collate_left(features):
        return collate(features, side="left")

    cached = cached_states(model, rows, collate_left, batch_size=len(rows))
    places = [0, len(rows) - 1]
    batch = collate_left(rows.select(places).to_list())
    with torch.no_grad():
        expected = model(**batch)
        without(model.backbone)
        found = model(**CachedStatesCollator(collate_left)([cached[place] for place in places]))
    assert_same_outputs(found, expected, batch["attention_mask"].bool())


class MeanOfTwo(HeadModel):
    """A head of one's own, which reads two positions of its choice."""

    @encodes_inputs
    def forward(self, encoded, starts=None, labels=None):
        logits = self.classifier(self.fused(encoded, starts).mean(dim=1))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def test_a_head_of_ones_own_trains_with_the_stock_trainer_as_it_does_without_a_cache(build, tmp_path, without):
    rows = [{"input_ids": [0, *[7] * length, 2], "attention_mask": [1] * (length + 2)} for length in range(3, 11)]
    rows = [row | {"starts": [1, number % 3], "labels": number % 2, "note": "x"} for number, row in enumerate(rows)]
    data = Dataset.from_list(rows)
    losses = {}
    for name in ("plain", "cached"):
        model = build(MeanOfTwo, num_labels=2)
        model.freeze_knowledge_adapters()
        collator = CachedStatesCollator(collate)
        train = data.remove_columns("note") if name == "plain" else cached_states(model, data, collator)
        if name == "cached":
            without(model.backbone, *model.adapters.values())
        arguments = TrainingArguments(
            str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = Trainer(model, arguments, train_dataset=train, data_collator=collator)
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["cached"] == pytest.approx(losses["plain"], abs=1e-5) and len(losses["plain"]) == 4


def test_the_model_is_left_as_it_was(build):
    model = build(KAdapterForRelationClassification).train()
    cached_states(model, examples(KAdapterForRelationClassification), collate)
    assert model.training and not model.backbone.training
    assert model.active_knowledge_adapters == ["factual", "linguistic"]
    assert not model.fusion._forward_pre_hooks and not model.backbone._forward_hooks


# ---- In a folder ----------------------------------------------------------------------------------------------------

TEXTS = ["the river", "the city of rome is in italy", "a"]


@pytest.fixture
def cached(tokenizer, tmp_path):
    """`cached(model, texts, dtype)`: the texts with their states, in one folder for all."""

    def cached(model, texts, dtype=None) -> CachedStates:
        rows = Dataset.from_dict(dict(tokenizer(texts)) | {"entity_start": [1] * len(texts)})
        return cached_states(model, rows, DataCollatorWithPadding(tokenizer), tmp_path / "cache", dtype=dtype)

    return cached


def states_of(cached: CachedStates) -> dict[str, torch.Tensor]:
    """All states of each kind, one row after the other."""
    return {kind: torch.cat([cached[row][kind] for row in range(len(cached))]) for kind in cached.states}


def test_another_text_backbone_layer_dtype_head_or_frozen_adapter_is_another_cache(build, cached, tmp_path):
    model = build(KAdapterModel, adapters=["factual"])
    changed = build(KAdapterModel, adapters=["factual"])
    with torch.no_grad():
        changed.backbone.embeddings.word_embeddings.weight += 1
    other_layers = build(KAdapterModel, adapters=[])
    other_layers.add_knowledge_adapter("factual", small_adapter(backbone_layers=[1]))
    frozen, changed_adapter = (build(KAdapterModel, adapters=["factual"], seed=seed) for seed in (0, 1))
    frozen.freeze_knowledge_adapters()
    changed_adapter.freeze_knowledge_adapters()
    for number, arguments in enumerate(
        [
            (model, TEXTS),
            (model, TEXTS[::-1]),
            (changed, TEXTS),
            (other_layers, TEXTS),
            (model, TEXTS, torch.bfloat16),
            (build(KAdapterForEntityTyping, adapters=["factual"]), TEXTS),
            (frozen, TEXTS),
            (changed_adapter, TEXTS),
        ]
    ):
        cached(*arguments)
        cached(*arguments)
        assert len(list((tmp_path / "cache").iterdir())) == number + 1


def test_another_name_or_provenance_of_an_adapter_is_the_same_cache(build, cached, tmp_path):
    for name in ("factual", "facts"):
        model = build(KAdapterForEntityTyping, adapters=[name])
        model.freeze_knowledge_adapters()
        model.config.knowledge_adapters[name].provenance = {"corpus": name}
        cached(model, TEXTS)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_states_have_the_dtype_in_which_they_are_computed_or_half_of_the_bits(build, cached):
    model = build(KAdapterModel, adapters=["factual"])
    exact, half = (states_of(cached(model, TEXTS, dtype)) for dtype in (None, torch.bfloat16))
    for kind, states in exact.items():
        assert states.dtype == torch.float32 and states.nbytes == 2 * half[kind].nbytes
        torch.testing.assert_close(half[kind].float(), states, rtol=1e-2, atol=1e-2)
    model.backbone.to(torch.bfloat16)
    assert {states.dtype for states in states_of(cached(model, TEXTS)).values()} == {torch.bfloat16}


def test_a_disk_that_is_too_small_is_named_and_nothing_is_left(build, cached, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100))
    with pytest.raises(OSError, match="GB left, and the frozen states need .* GB"):
        cached(build(KAdapterModel, adapters=["factual"]), TEXTS)
    assert list((tmp_path / "cache").iterdir()) == []


def test_states_that_would_fill_the_memory_are_refused(build, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("memory", "available")(100))
    with pytest.raises(MemoryError, match="more than half of the 0.00 GB of free memory: keep them in a folder"):
        cached_states(build(KAdapterForEntityTyping), examples(KAdapterForEntityTyping), collate)


def test_a_backbone_that_trains_or_an_adapter_that_reads_padding_can_not_be_cached(build, cached):
    model = build(KAdapterModel, adapters=["factual"])
    model.unfreeze_backbone()
    with pytest.raises(ValueError, match="freeze_backbone"):
        cached(model, TEXTS)
    model = build(KAdapterModel, adapters=[])
    model.add_knowledge_adapter("original", small_adapter(attend_to_padding=True))
    with pytest.raises(ValueError, match="attend_to_padding"):
        cached(model, TEXTS)


def test_a_collator_that_masks_at_random_is_refused(build, tokenizer):
    model = build(KAdapterForMaskedLM)
    rows = Dataset.from_dict(dict(tokenizer(TEXTS)))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
    with pytest.raises(ValueError, match="another batch of the same rows each time"):
        cached_states(model, rows, collator)


def test_interrupted_states_are_continued_and_are_the_same(build, cached, tmp_path, interrupt_at):
    model = build(KAdapterModel, adapters=["factual"])
    texts = [" ".join(["river"] * count) for count in range(1, 60)] * 2  # four batches
    whole = states_of(cached(model, texts))
    shutil.rmtree(tmp_path / "cache")
    interrupt_at(3)
    with pytest.raises(KeyboardInterrupt, match="states of 64 of 118 examples in .*The same command continues"):
        cached(model, texts)
    for file in (tmp_path / "cache").glob("*/*.[bc]*"):  # as a kill leaves it, after what the index counts
        with open(file, "ab") as opened:
            opened.write(b"unfinished")
    interrupt_at(0)
    again = states_of(cached(model, texts))
    assert again.keys() == whole.keys() == {"backbone_states", "fusion_states"}
    assert all(torch.equal(again[kind], whole[kind]) for kind in whole)
    assert interrupt_at(0) == 2
    cached(model, texts)
    assert interrupt_at(0) == 0


@pytest.mark.parametrize("damage", ["states cut", "counts cut", "states missing", "index empty", "index halved"])
def test_damaged_states_are_computed_again(damage, build, cached, tmp_path):
    model = build(KAdapterModel, adapters=["factual"])
    model.freeze_knowledge_adapters()
    before = states_of(cached(model, TEXTS))
    (states,), (counts,), (index,) = (
        list((tmp_path / "cache").rglob(name)) for name in ("*.bin", "*.counts", "index.json")
    )
    if damage == "states missing":
        states.unlink()
    else:
        file, size = {"states": (states, 100), "counts": (counts, 8), "index": (index, 0)}[damage.split()[0]]
        os.truncate(file, index.stat().st_size // 2 if damage == "index halved" else size)
    after = states_of(cached(model, TEXTS))
    for kind in before:
        torch.testing.assert_close(after[kind], before[kind])


def test_states_of_adapters_chosen_for_a_while_no_rows_and_a_file_for_a_folder_are_refused(build, tmp_path):
    model = build(KAdapterForSequenceClassification, adapters=["factual", "linguistic"])
    rows = examples(KAdapterForSequenceClassification)
    with model.using_knowledge_adapters("factual"), pytest.raises(ValueError, match="set_active_knowledge_adapters"):
        cached_states(model, rows, collate)
    with pytest.raises(ValueError, match="no rows"):
        cached_states(model, rows.select([]), collate)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="'.*file' is a file"):
        cached_states(model, rows, collate, tmp_path / "file")
