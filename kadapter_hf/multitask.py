"""
The paper's "RoBERTa + multitask": a backbone that is trained on the adapters' objectives itself, all at once, instead of
with adapters (paper, section 4).
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer, TrainingArguments, set_seed

from kadapter_cli import _names
from kadapter_cli._flags import check_rows
from kadapter_cli._source import flag

from .corpora.files import write_json
from .features import encode, load_tokenizer, most_tokens
from .modeling.backbone_kadapter import load_backbone
from .modeling.configuration_kadapter import DEFAULT_BACKBONE
from .modeling.modeling_kadapter import KAdapterPreTrainedModel
from .objectives import OBJECTIVES
from .pretraining import known_labels, split_rows
from .runs import (
    Parser,
    StopOnInterrupt,
    checkpoint_to_resume,
    label_fields,
    quality,
    sample,
    show_progress,
    train,
)


@dataclass
class MultitaskArguments:
    """Arguments in addition to those of Trainer."""

    data: list[str] = field(
        metadata={
            "help": "The objectives and their data as OBJECTIVE=SOURCE, e.g. factual=fewrel linguistic=trees; SOURCE is what "
            "`kadapter pretrain --data` takes."
        }
    )
    backbone: str = flag(DEFAULT_BACKBONE, "The backbone: a repository or folder.")
    eval_size: float = flag(0.1, "Fraction of the rows to hold out without an evaluation split.")
    max_train_samples: int | None = flag(None, "At most this many rows of each objective.")
    max_eval_samples: int | None = flag(None, "At most this many held-out rows of each.")
    max_length: int | None = flag(None, "Maximum number of tokens. Default: the backbone's.")
    overwrite_output_dir: bool = flag(False, "Replace the results of an earlier run.")

    def __post_init__(self):
        for name, source in self.sources().items():
            if name not in _names.OBJECTIVES:
                raise ValueError(
                    f"--data takes OBJECTIVE=SOURCE, and there is no objective '{name}'; there are "
                    f"{', '.join(_names.OBJECTIVES)}.{_names.did_you_mean(name, _names.OBJECTIVES)}"
                )
            if not source:
                raise ValueError(f"--data takes OBJECTIVE=SOURCE, but there is no source for '{name}'")
        check_rows(self)

    def sources(self) -> dict[str, str]:
        """The data of each objective."""
        return dict(part.partition("=")[::2] for part in self.data)


class MultitaskModel(nn.Module):
    """
    One backbone with several heads. `objective` names the head that a batch is for.

    Args:
        models: the models by objective. They have the same backbone and no adapters.
    """

    def __init__(self, models: Mapping[str, KAdapterPreTrainedModel]):
        super().__init__()
        self.backbone = next(iter(models.values())).backbone
        # Each tensor once: Trainer's checkpoints can't hold the backbone under several names.
        self.heads = nn.ModuleDict({name: nn.ModuleList(model.head_modules()) for name, model in models.items()})
        self.__dict__["models"] = dict(models)

    def forward(self, objective: str, **inputs: Any) -> Any:
        return self.__dict__["models"][objective](**inputs)

    def train(self, mode: bool = True) -> "MultitaskModel":
        for model in self.__dict__["models"].values():
            model.train(mode)
        self.training = mode
        return self


class Groups(TorchDataset):
    """The rows of several data sets in groups of one objective each, in random order."""

    def __init__(self, data: Mapping[str, Any], size: int, seed: int):
        self.data = data
        shuffle = random.Random(seed).shuffle
        self.groups: list[tuple[str, list[int]]] = []
        for name, rows in data.items():
            numbers = list(range(len(rows)))
            shuffle(numbers)
            self.groups += [(name, numbers[first : first + size]) for first in range(0, len(numbers), size)]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> tuple[str, list[dict[str, Any]]]:
        name, rows = self.groups[number]
        return name, [self.data[name][row] for row in rows]


def train_backbone(arguments: MultitaskArguments, training: TrainingArguments) -> dict[str, dict[str, float]]:
    """
    Trains a backbone on several objectives at once and saves it, without the heads, in `training.output_dir`: a backbone for
    `kadapter finetune --backbone`.

    Each step is for one objective, and the number of steps is proportional to the number of rows. Runs in one process.

    Returns:
        The metrics on the held-out rows by objective.

    Raises:
        ValueError: the data does not fit an objective.
        KeyboardInterrupt: Ctrl-C; its message says what was saved.
    """
    if training.world_size > 1:
        raise ValueError("training on several objectives at once runs in a single process.")
    checkpoint = checkpoint_to_resume(training, arguments.overwrite_output_dir)
    set_seed(training.seed)
    backbone = load_backbone(arguments.backbone)
    tokenizer = load_tokenizer(arguments.backbone)
    models: dict[str, KAdapterPreTrainedModel] = {}
    data: dict[str, dict[str, Any]] = {"train": {}, "eval": {}}
    labels: dict[str, list[str]] = {}
    for name, source in arguments.sources().items():
        objective = OBJECTIVES[name]
        rows = split_rows(objective, [source], arguments.eval_size, training.seed)
        labels[name] = objective.labels_of(rows["train"])
        if objective.schema is not None:
            rows["eval"] = known_labels(rows["eval"], objective.schema, set(labels[name]))
        fields = {"freeze_backbone": False, **label_fields(labels[name])}
        models[name] = objective.model_class.from_backbone(backbone, **fields)
        features = partial(objective.features, labels=labels[name]) if labels[name] else objective.features
        most = most_tokens(tokenizer, arguments.max_length, backbone.config)
        limits = {"train": arguments.max_train_samples, "eval": arguments.max_eval_samples}
        for split, part in rows.items():
            chosen = sample(part, training.seed, limits[split])
            data[split][name] = encode(chosen, features, tokenizer, max_length=most)
    groups = Groups(data["train"], training.per_device_train_batch_size, training.seed)
    training.per_device_train_batch_size = 1  # group
    training.remove_unused_columns = False
    collators = {name: OBJECTIVES[name].collator(tokenizer) for name in models}

    def collate(batch: Sequence[tuple[str, list[dict[str, Any]]]]) -> dict[str, Any]:
        ((name, rows),) = batch
        return {**collators[name](rows), "objective": name}

    stop = StopOnInterrupt()
    trainer = Trainer(MultitaskModel(models), training, data_collator=collate, train_dataset=groups, callbacks=[stop])
    trainer.model_accepts_loss_kwargs = False  # labels of different objectives can't be counted together
    show_progress(trainer)
    train(trainer, checkpoint, stop)
    metrics = dict(_metrics(models, data["eval"], labels, collators))
    folder = Path(str(training.output_dir))
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer.save_state()
    write_json(folder / "metrics.json", metrics)
    return metrics


def _metrics(
    models: Mapping[str, KAdapterPreTrainedModel],
    data: Mapping[str, Any],
    labels: Mapping[str, list[str]],
    collators: Mapping[str, Any],
) -> Iterator[tuple[str, dict[str, float]]]:
    with TemporaryDirectory() as folder:  # Trainer wants one
        training = TrainingArguments(
            folder, per_device_eval_batch_size=32, report_to="none", dataloader_pin_memory=torch.cuda.is_available()
        )
        for name, model in models.items():
            objective = OBJECTIVES[name]
            trainer = Trainer(
                model,
                training,
                data_collator=collators[name],
                compute_metrics=objective.metrics(labels[name]) if objective.metrics else None,
                preprocess_logits_for_metrics=objective.preprocess_logits,
            )
            show_progress(trainer)
            yield name, quality(trainer.evaluate(data[name]))


def parser() -> Parser:
    """The parser of the flags of `kadapter pretrain multitask`."""
    made = Parser(
        (MultitaskArguments, TrainingArguments),
        prog="kadapter pretrain multitask",
        description="Trains a backbone itself on several objectives at once: the paper's RoBERTa + multitask. Example: "
        "kadapter pretrain multitask --data factual=fewrel linguistic=trees --output_dir multitask-backbone",
    )
    made.set_defaults(learning_rate=1e-5, per_device_train_batch_size=32, warmup_steps=0.1)
    return made
