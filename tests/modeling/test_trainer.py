"""The stock Trainer with every head: training, evaluation, prediction, checkpoints, and its other features."""

import dataclasses
import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import DIVIDES_GRADIENTS_AGAIN, assert_same_weights, batch, inputs_for, labels_for
from datasets import Dataset
from packaging import version
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

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


@dataclasses.dataclass(frozen=True)
class Task:
    """A head and a kind of labels for it."""

    model_class: type
    auto_class: type
    num_labels: int = 2
    problem_type: str | None = None

    def build(self, build, **kwargs):
        """The model; the adapters, the fusion and the head train, with dropout."""
        return build(self.model_class, num_labels=self.num_labels, problem_type=self.problem_type, **kwargs)

    def dataset(self, rows: int = 16, labelled: bool = True) -> Dataset:
        """Random rows. If tokens have labels, the rows have different numbers of them."""
        inputs = inputs_for(self.model_class, rows=2 * rows if self.model_class is KAdapterForMultipleChoice else rows)
        generator = torch.Generator().manual_seed(2)
        labels = labels_for(self.model_class, inputs, self.num_labels)
        if self.model_class in (KAdapterForEntityTyping, KAdapterForRelationClassification):
            for name in inputs.keys() & {"entity_start", "subject_start", "object_start"}:
                inputs[name] = inputs[name] % 10
        if self.model_class in (KAdapterForTokenClassification, KAdapterForMaskedLM):
            labels["labels"] = labels["labels"].clone()
            for row in range(rows):
                labels["labels"][row, row % 9 + 1 :] = -100
        if self.model_class is KAdapterForQuestionAnswering:
            labels = {name: torch.randint(12, (rows,), generator=generator) for name in labels}  # texts of 10 tokens
        if self.model_class is KAdapterForSequenceClassification and self.problem_type == "regression":
            shape = (rows,) if self.num_labels == 1 else (rows, self.num_labels)
            labels = {"labels": torch.randn(shape, generator=generator)}
        if self.problem_type == "multi_label_classification":
            labels = {"labels": torch.randint(2, (rows, self.num_labels), generator=generator).float()}
        return Dataset.from_dict(
            {name: value.tolist() for name, value in (inputs | (labels if labelled else {})).items()}
        )


SEQUENCE = (KAdapterForSequenceClassification, AutoModelForSequenceClassification)
TASKS = {
    "masked-lm": Task(KAdapterForMaskedLM, AutoModelForMaskedLM),
    "single-label": Task(*SEQUENCE, 3),
    "multi-label": Task(*SEQUENCE, 3, "multi_label_classification"),
    "regression": Task(*SEQUENCE, 1, "regression"),
    "regression-on-several": Task(*SEQUENCE, 2, "regression"),
    "tokens": Task(KAdapterForTokenClassification, AutoModelForTokenClassification, 3),
    "question-answering": Task(KAdapterForQuestionAnswering, AutoModelForQuestionAnswering),
    "multiple-choice": Task(KAdapterForMultipleChoice, AutoModelForMultipleChoice),
    "entity-typing": Task(KAdapterForEntityTyping, AutoModelForSequenceClassification, 3),
    "relations": Task(KAdapterForRelationClassification, AutoModelForSequenceClassification, 4),
}
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
# One task for each kind: labels of tokens with the backbone's own head, one label, marked positions.
SOME_TASKS = ("masked-lm", "single-label", "entity-typing")
some_tasks = pytest.mark.parametrize("task", [TASKS[name] for name in SOME_TASKS], ids=SOME_TASKS)
every_task_and_backbone = pytest.mark.parametrize(
    ("task", "freeze_backbone"),
    [
        *(pytest.param(task, True, id=f"{name}-frozen") for name, task in TASKS.items()),
        *(pytest.param(TASKS[name], False, id=f"{name}-unfrozen") for name in SOME_TASKS),
    ],
)
# For tests that don't depend on the loss: one task per class.
every_class_and_backbone = pytest.mark.parametrize(
    ("task", "freeze_backbone"),
    [
        *(
            pytest.param(task, True, id=f"{name}-frozen")
            for name, task in TASKS.items()
            if name == "single-label" or task.model_class is not KAdapterForSequenceClassification
        ),
        *(pytest.param(TASKS[name], False, id=f"{name}-unfrozen") for name in SOME_TASKS),
    ],
)


@pytest.fixture
def trainer_for(tmp_path):
    """`trainer_for(model, train_dataset, **arguments)`: a stock Trainer that logs each step and writes to `tmp_path`."""

    def trainer_for(model, train_dataset=None, output_dir=tmp_path / "run", *, args_class=TrainingArguments, **kwargs):
        fields = {field.name for field in dataclasses.fields(TrainingArguments)}
        arguments = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no"}
        arguments |= {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
        args = TrainingArguments(
            output_dir=str(output_dir), use_cpu=True, report_to=[], logging_steps=1, disable_tqdm=True, **arguments
        )
        return Trainer(model, args, train_dataset=train_dataset, **kwargs)

    return trainer_for


@pytest.fixture
def warned():
    """The warnings that transformers logs during the test."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def collated(dataset: Dataset) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(dataset[:][name]) for name in dataset.column_names}


def steps_of(trainer) -> list[tuple[float, float]]:
    """The loss and the norm of the gradients of each step."""
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]


def assert_close_weights(model, other, **tolerance) -> None:
    found = model.state_dict()
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(found[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ---- Training, evaluating, predicting -------------------------------------------------------------------------------


@every_task
def test_training_lowers_the_loss_that_evaluation_reports(task, build, trainer_for):
    dataset = task.dataset()
    trainer = trainer_for(task.build(build), dataset, eval_dataset=dataset, max_steps=12, learning_rate=1e-3)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


@every_task
def test_evaluation_finds_labels_loss_and_metrics_without_help(task, build, trainer_for):
    model, dataset = task.build(build), task.dataset(8)
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"rows": len(prediction.predictions[0] if isinstance(prediction.predictions, tuple) else dataset)}

    trainer = trainer_for(model, eval_dataset=dataset, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    inputs = collated(dataset)
    with torch.no_grad():
        output = model(**inputs)
    assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-6)
    assert metrics["eval_rows"] == 8
    names = ["start_positions", "end_positions"] if task.model_class is KAdapterForQuestionAnswering else ["labels"]
    labels = seen[0].label_ids if len(names) == 2 else (seen[0].label_ids,)
    for found, name in zip(labels, names, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), inputs[name])
    predictions = seen[0].predictions if len(names) == 2 else (seen[0].predictions,)
    for found, expected in zip(predictions, output.to_tuple()[1:], strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected)


@every_task
def test_prediction_needs_no_labels(task, build, trainer_for):
    model, dataset = task.build(build), task.dataset(8, labelled=False)
    result = trainer_for(model, per_device_eval_batch_size=3).predict(dataset)
    with torch.no_grad():
        expected = model(**collated(dataset)).to_tuple()
    assert result.label_ids is None and "test_loss" not in result.metrics
    predictions = result.predictions if isinstance(result.predictions, tuple) else (result.predictions,)
    for found, wanted in zip(predictions, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), wanted)


def test_prediction_without_a_head_gives_the_states_by_adapter(build, trainer_for):
    model, inputs = build(KAdapterModel), batch(5)
    dataset = Dataset.from_dict({name: value.tolist() for name, value in inputs.items()})
    fused, backbone, knowledge = trainer_for(model, per_device_eval_batch_size=2).predict(dataset).predictions
    with torch.no_grad():
        expected = model(**inputs)
    torch.testing.assert_close(torch.from_numpy(fused), expected.last_hidden_state)
    torch.testing.assert_close(torch.from_numpy(backbone), expected.backbone_last_hidden_state)
    assert knowledge.keys() == {"factual", "linguistic"}
    for name, states in knowledge.items():
        torch.testing.assert_close(torch.from_numpy(states), expected.knowledge_states[name])


def test_columns_that_the_head_does_not_take_are_left_out_and_marker_positions_are_kept(build, trainer_for, tokenizer):
    """With the collator for texts of different lengths."""
    task = TASKS["entity-typing"]
    texts = ["the city of @ rome is in italy", "@ dante wrote", "who founded @ vienna ? he , she and it"]
    rows = [dict(tokenizer(text)) for text in texts]
    for row, text in zip(rows, texts, strict=True):
        row |= {"entity_start": row["input_ids"].index(tokenizer.convert_tokens_to_ids("@")), "text": text}
        row["labels"] = [1.0, 0.0, 1.0]
    model = without_dropout(task.build(build))
    trainer = trainer_for(
        model,
        Dataset.from_list(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
        max_steps=1,
        learning_rate=0.0,
    )
    trainer.train()
    alone = [
        model(**{name: torch.tensor([row[name]]) for name in row.keys() - {"text", "token_type_ids"}}).loss.item()
        for row in rows
    ]
    assert steps_of(trainer)[0][0] == pytest.approx(sum(alone) / 3, rel=1e-5)


# ---- Gradient accumulation ------------------------------------------------------------------------------------------


@every_task
def test_accumulated_gradients_are_those_of_the_one_large_batch(task, build, trainer_for):
    """Also in the last step of an epoch, which has fewer micro-batches."""
    dataset = task.dataset(12)
    runs = []
    for size, accumulate, scale in ((8, 1, 1), (2, 4, 4 if DIVIDES_GRADIENTS_AGAIN else 1)):
        model = without_dropout(task.build(build))
        trainer = trainer_for(
            model,
            dataset,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=4,
            optim="sgd",
            learning_rate=1e-2 * scale,
            max_grad_norm=1e9,
        )
        trainer.train()
        runs.append(([(loss, norm * scale) for loss, norm in steps_of(trainer)], model))
    (large, model), (small, other) = runs
    assert len(large) == 4
    assert small == [pytest.approx(step, rel=1e-4) for step in large]
    assert_close_weights(other, model, rtol=1e-4, atol=1e-6)


def test_accumulation_weighs_micro_batches_by_their_labels(build, trainer_for, tokenizer):
    """Texts of different lengths, padded by the stock collator: the loss is averaged over labels, not micro-batches."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(5, 60, (length,), generator=generator).tolist(), "labels": [length % 3] * length}
        for length in (3, 19, 7, 2)
    ]
    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])
    model = without_dropout(TASKS["tokens"].build(build))
    losses = []  # of each text, summed over tokens
    for row in rows:
        single = {name: torch.tensor([value]) for name, value in row.items()}
        losses.append(model(**single).loss.item() * len(row["labels"]))

    trainer = trainer_for(
        model,
        Dataset.from_list(rows),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=1,
    )
    trainer.train()
    assert steps_of(trainer)[0][0] == pytest.approx(sum(losses) / 31, rel=1e-4)


@pytest.mark.parametrize("name", ["masked-lm", "tokens", "question-answering"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_any_label_changes_nothing(name, accumulate, build, trainer_for):
    task = TASKS[name]
    dataset = task.dataset(8)
    label_columns = [column for column in dataset.column_names if column == "labels" or column.endswith("_positions")]
    for column in label_columns:
        nothing = [[-100] * 10 for _ in range(8)] if column == "labels" else [-1] * 8
        dataset = dataset.remove_columns(column).add_column(column, nothing)
    model = task.build(build)
    expected = task.build(build)
    trainer = trainer_for(model, dataset, gradient_accumulation_steps=accumulate, max_steps=2)
    trainer.train()
    assert steps_of(trainer) == [(0.0, 0.0)] * 2
    assert_same_weights(model, expected)


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


@every_class_and_backbone
def test_a_checkpoint_is_a_model_and_holds_the_backbone_only_if_that_trains(
    task, freeze_backbone, build, trainer_for, tmp_path, tokenizer
):
    model = task.build(build, freeze_backbone=freeze_backbone)
    trainer = trainer_for(
        model, task.dataset(), max_steps=1, save_strategy="steps", save_steps=1, processing_class=tokenizer
    )
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert (checkpoint / "backbone.safetensors").exists() is not freeze_backbone
    assert {path.name for path in (checkpoint / "adapters").iterdir()} == {
        "factual.safetensors",
        "linguistic.safetensors",
    }
    for loader in (task.model_class, task.auto_class):
        loaded = loader.from_pretrained(checkpoint)
        assert type(loaded) is task.model_class
        assert_same_weights(loaded, model)
    base = AutoModel.from_pretrained(checkpoint)
    assert torch.equal(
        base.adapters["factual"].layers[0].up_project.weight, model.adapters["factual"].layers[0].up_project.weight
    )


@every_class_and_backbone
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(task, freeze_backbone, build, trainer_for, warned):
    """With dropout in all trained parts, so that the state of the random number generator matters too."""
    dataset = task.dataset()
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "freeze_backbone": freeze_backbone}
    freeze = {"freeze_backbone": arguments.pop("freeze_backbone")}
    whole = trainer_for(task.build(build, **freeze), dataset, **arguments)
    whole.train()
    resumed = trainer_for(task.build(build, seed=1, **freeze), dataset, **arguments)
    warned.clear()
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-3")))
    assert [message for message in warned if "keys" in message] == []
    assert_same_weights(resumed.model, whole.model)
    assert steps_of(resumed) == steps_of(whole)
    start = task.build(build, **freeze)
    same_backbone = all(map(torch.equal, start.backbone.parameters(), whole.model.backbone.parameters()))
    assert same_backbone is freeze_backbone


@some_tasks
def test_a_run_goes_on_from_a_changed_and_frozen_backbone(task, build, trainer_for, tmp_path, warned):
    """Such a backbone is stored in the repository and its checkpoints."""
    changed = task.build(build)
    with torch.no_grad():
        next(changed.backbone.encoder.parameters()).mul_(2)
    changed.save_pretrained(tmp_path / "changed")
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_for(task.model_class.from_pretrained(tmp_path / "changed"), task.dataset(), **arguments)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "backbone.safetensors").exists()
    resumed = trainer_for(task.model_class.from_pretrained(tmp_path / "changed"), task.dataset(), **arguments)
    warned.clear()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert [message for message in warned if "keys" in message] == []
    assert_same_weights(resumed.model, whole.model)


class Falling:
    """A metric that is best at the first evaluation."""

    def __init__(self):
        self.next = itertools.count()

    def __call__(self, prediction) -> dict[str, float]:
        return {"score": -float(next(self.next))}


BEST = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


@every_class_and_backbone
def test_the_best_model_is_loaded_at_the_end(task, freeze_backbone, build, trainer_for, tmp_path, warned):
    dataset = task.dataset(8)
    model = task.build(build, freeze_backbone=freeze_backbone)
    trainer = trainer_for(model, dataset, eval_dataset=dataset, compute_metrics=Falling(), max_steps=3, **BEST)
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    assert [message for message in warned if "keys" in message] == []
    assert_same_weights(model, task.model_class.from_pretrained(tmp_path / "run" / "checkpoint-1"))
    last = task.model_class.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert not all(map(torch.equal, model.parameters(), last.parameters()))


@some_tasks
def test_the_best_model_may_be_one_whose_backbone_had_not_changed_yet(task, build, trainer_for):
    """Warm-up starts with a learning rate of 0, and later changes of the backbone must not remain in the best model."""
    dataset = task.dataset(8)
    model = task.build(build, freeze_backbone=False)
    trainer = trainer_for(
        model, dataset, eval_dataset=dataset, compute_metrics=Falling(), max_steps=3, warmup_steps=2, **BEST
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    assert_same_weights(model, task.build(build, freeze_backbone=False))


def test_only_as_many_checkpoints_are_kept_as_asked_for(build, trainer_for, tmp_path):
    task = TASKS["single-label"]
    dataset = task.dataset(8)
    model = task.build(build)
    trainer = trainer_for(
        model, dataset, eval_dataset=dataset, compute_metrics=Falling(), max_steps=4, save_total_limit=2, **BEST
    )
    trainer.train()
    # The best one is never deleted.
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    for name in ("checkpoint-1", "checkpoint-4"):
        task.model_class.from_pretrained(tmp_path / "run" / name)


def test_save_model_gives_a_repository(build, trainer_for, tmp_path, tokenizer):
    task = TASKS["relations"]
    trainer = trainer_for(task.build(build), task.dataset(), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert json.loads((tmp_path / "final" / "config.json").read_text())["architectures"] == [task.model_class.__name__]
    assert_same_weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "final"), trainer.model)


# ---- What is frozen -------------------------------------------------------------------------------------------------


def forward_twice(model, inputs):
    """The outputs of two forward passes in training mode, with different random numbers."""
    model.train()
    torch.manual_seed(0)
    first = model(**inputs)
    torch.manual_seed(1)
    return first, model(**inputs)


def test_training_mode_puts_dropout_only_into_what_trains(build):
    model = build(KAdapterModel)
    model.train_knowledge_adapter("factual")
    one, two = forward_twice(model, batch())
    assert torch.equal(one.backbone_last_hidden_state, two.backbone_last_hidden_state)
    assert torch.equal(one.knowledge_states["linguistic"], two.knowledge_states["linguistic"])
    assert not torch.equal(one.knowledge_states["factual"], two.knowledge_states["factual"])
    model.unfreeze_backbone()
    one, two = forward_twice(model, batch())
    assert not torch.equal(one.backbone_last_hidden_state, two.backbone_last_hidden_state)


@pytest.mark.parametrize("task", [TASKS[name] for name in TASKS if name != "masked-lm"])
def test_a_frozen_head_has_no_dropout_either(task, build):
    model = task.build(build)
    inputs = {name: value for name, value in collated(task.dataset(4)).items() if name != "labels"}
    model.freeze_knowledge_adapters()
    one, two = forward_twice(model, inputs)
    assert not torch.equal(one.to_tuple()[-1], two.to_tuple()[-1])
    model.freeze_head()
    one, two = forward_twice(model, inputs)
    assert torch.equal(one.to_tuple()[-1], two.to_tuple()[-1])
    model.unfreeze_head()
    one, two = forward_twice(model, inputs)
    assert not torch.equal(one.to_tuple()[-1], two.to_tuple()[-1])


class Watch(TrainerCallback):
    """Records which parts are in training mode at the start of each step."""

    def __init__(self):
        self.modes = []

    def on_substep_end(self, args, state, control, model, **kwargs):
        self.on_step_end(args, state, control, model, **kwargs)

    def on_step_end(self, args, state, control, model, **kwargs):
        parts = {"backbone": model.backbone, **model.adapters, "head": model.classifier}
        self.modes.append({name: part.training for name, part in parts.items()})


def test_trainer_leaves_frozen_parts_in_evaluation_mode_and_unchanged(build, trainer_for):
    task = TASKS["single-label"]
    model = task.build(build)
    model.train_knowledge_adapter("factual", train_head=True)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    watch = Watch()
    dataset = task.dataset()
    trainer = trainer_for(
        model, dataset, eval_dataset=dataset, eval_strategy="steps", eval_steps=1, callbacks=[watch], max_steps=3
    )
    trainer.train()
    assert watch.modes == [{"backbone": False, "factual": True, "linguistic": False, "head": True}] * 3
    for name, tensor in model.state_dict().items():
        trains = name.startswith(("adapters.factual.", "classifier.", "fusion."))
        assert torch.equal(tensor, frozen[name]) is not trains, name


# ---- bfloat16, gradient checkpointing, compilation ------------------------------------------------------------------


@every_task_and_backbone
def test_bf16_computes_in_bfloat16_and_keeps_the_weights_in_float32(task, freeze_backbone, build, trainer_for):
    dataset = task.dataset()
    losses = []
    for bf16 in (False, True):
        model = without_dropout(task.build(build, freeze_backbone=freeze_backbone))
        seen = set()
        model.adapters["factual"].layers[0].down_project.register_forward_hook(
            lambda module, args, output, seen=seen: seen.add(output.dtype)
        )
        trainer = trainer_for(model, dataset, bf16=bf16, eval_dataset=dataset, learning_rate=1e-3)
        trainer.train()
        losses.append([loss for loss, _ in steps_of(trainer)] + [trainer.evaluate()["eval_loss"]])
        assert seen == {torch.bfloat16 if bf16 else torch.float32}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=3e-2)
    assert losses[1] != losses[0]


def run_with(build, trainer_for, task, freeze_backbone, **arguments):
    """A short run with dropout; returns the model, its steps, and whether the states have a graph."""
    model = task.build(build, freeze_backbone=freeze_backbone)
    graphs, runs = set(), []
    model.backbone.register_forward_hook(
        lambda module, args, output: graphs.add(output.last_hidden_state.requires_grad) if model.training else None
    )
    model.adapters["factual"].layers[1].encoder.layer[0].attention.register_forward_pre_hook(
        lambda module, args: runs.append(module)
    )
    trainer = trainer_for(model, task.dataset(), optim="sgd", **arguments)
    trainer.train()
    return model, steps_of(trainer), graphs, len(runs)


@pytest.mark.parametrize("freeze_backbone", [True, False], ids=["frozen", "unfrozen"])
@pytest.mark.parametrize(("name", "use_reentrant"), [*((name, False) for name in SOME_TASKS), ("single-label", True)])
def test_gradient_checkpointing_trains_as_without_it(name, freeze_backbone, use_reentrant, build, trainer_for):
    task = TASKS[name]
    model, steps, graphs, runs = run_with(build, trainer_for, task, freeze_backbone)
    assert graphs == {not freeze_backbone} and runs == len(steps) == 4
    again, its_steps, its_graphs, its_runs = run_with(
        build,
        trainer_for,
        task,
        freeze_backbone,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert its_runs == 2 * runs  # the backward pass computes each layer again
    assert its_graphs == graphs  # a frozen backbone has no activations to recompute
    # Identical except for the order of summing the gradients of states that several parts read.
    tolerance = {"rtol": 0, "atol": 0} if freeze_backbone else {"rtol": 1e-4, "atol": 1e-5}
    assert its_steps == steps if freeze_backbone else its_steps == [pytest.approx(step, rel=1e-4) for step in steps]
    assert_close_weights(again, model, **tolerance)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_lets_gradients_reach_lora_in_an_adapter(use_reentrant, build, trainer_for):
    """No input of the adapter's layers requires gradients, as its projections are frozen."""
    task = TASKS["single-label"]
    runs = []
    for checkpointing in (False, True):
        model = task.build(build)
        torch.manual_seed(0)
        model.add_adapter(
            LoraConfig(r=2, target_modules=r"adapters\.factual\..*\.(query|value)", init_lora_weights=False)
        )
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trainer = trainer_for(
            model,
            task.dataset(),
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant} if checkpointing else None,
        )
        trainer.train()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) is ("lora_" not in name), name
        runs.append((steps_of(trainer), model))
    assert runs[0][0] == runs[1][0] and all(norm > 0 for _, norm in runs[0][0])
    assert_same_weights(runs[1][1], runs[0][1])


def test_a_frozen_backbone_keeps_no_graph_but_lets_gradients_reach_given_embeddings(build):
    model = build(KAdapterModel).train()
    embeddings = model.get_input_embeddings()(batch()["input_ids"]).detach()
    assert not model(inputs_embeds=embeddings).backbone_last_hidden_state.requires_grad
    embeddings.requires_grad_()
    model(inputs_embeds=embeddings).last_hidden_state.sum().backward()
    assert embeddings.grad.abs().sum() > 0


def trained_and_evaluated(task, build, trainer_for, **arguments):
    """
    A run without dropout: its losses, gradient norms and evaluation, and the model.

    With SGD, as Adam would make whole steps of the rounding errors that are a key bias's only gradient.
    """
    dataset = task.dataset(8)
    model = without_dropout(task.build(build, adapters=["factual"]))
    arguments |= {"eval_dataset": dataset, "per_device_eval_batch_size": 4, "optim": "sgd", "learning_rate": 0.1}
    trainer = trainer_for(model, dataset, max_steps=2, **arguments)
    trainer.train()
    return [*itertools.chain(*steps_of(trainer)), trainer.evaluate()["eval_loss"]], trainer


@pytest.mark.skipif(
    version.parse(torch.__version__) < version.parse("2.7"),
    reason="torch 2.6 can't compile transformers' own encoders where they give their hidden states",
)
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("entity-typing", "aot_eager"),
        *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in ("masked-lm", "tokens", "relations")),
    ],
)
def test_torch_compile_trains_and_evaluates_as_without_it(name, backend, build, trainer_for, tmp_path):
    task = TASKS[name]
    expected, plain = trained_and_evaluated(task, build, trainer_for)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found, compiled = trained_and_evaluated(
        task, build, trainer_for, torch_compile=True, torch_compile_backend=backend
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # at least one per mode
    assert found == pytest.approx(expected, rel=1e-4)
    assert_close_weights(compiled.model, plain.model, rtol=1e-3, atol=1e-5)
    compiled.save_model(tmp_path / "compiled")
    assert_same_weights(task.model_class.from_pretrained(tmp_path / "compiled"), compiled.model)
