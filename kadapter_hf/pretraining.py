"""
Pre-training of one knowledge adapter on a frozen backbone, with the stock Trainer (paper, section 3.3).

An objective defines what the adapter learns; see `kadapter_hf.objectives`.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoConfig, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from kadapter_cli._flags import check_adapter_name, check_least, check_rows
from kadapter_cli._names import did_you_mean
from kadapter_cli._source import flag

from . import precision
from .activations import CachedStatesCollator
from .corpora.schema import Schema, as_labels, label_set
from .features import encode, load_tokenizer, most_tokens
from .figures import new_figure, warn_without_matplotlib
from .messages import shortened
from .modeling.configuration_kadapter import DEFAULT_BACKBONE, KAdapterConfig, KnowledgeAdapterConfig
from .objectives import OBJECTIVES, Objective
from .objectives.objective import LARGE_WIDTH
from .rows import load_rows
from .runs import (
    Parser,
    StopOnInterrupt,
    check_report_to,
    checkpoint_to_resume,
    label_fields,
    quality,
    sample,
    save_and_push,
    show_progress,
    train,
    use_cached_states,
)


logger = logging.get_logger(__name__)


@dataclass
class PretrainingArguments:
    """Arguments in addition to those of Trainer."""

    data: str | list[str] = field(
        metadata={
            "help": "Training rows: a folder written by `kadapter prepare`; a Parquet, JSON Lines, JSON, CSV or TSV file, or a "
            "folder of them; or a data set on the Hub. Several are joined. A split named validation or test is used for "
            "evaluation."
        }
    )
    name: str | None = flag(None, "Name of the adapter. Default: the name of the objective.")
    backbone: str = flag(DEFAULT_BACKBONE, "The frozen backbone: a repository or folder.")
    backbone_dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto",
        "Data type of the frozen backbone: float32; bfloat16; or auto, which is bfloat16 where the processor multiplies it "
        "faster. The adapters stay in float32; --bf16 true computes them in bfloat16 too.",
    )
    eval_size: float = flag(0.1, "Fraction of the rows to hold out if the data has no split for evaluation.")
    max_train_samples: int | None = flag(None, "Train on at most this many rows, chosen at random.")
    max_eval_samples: int | None = flag(None, "Evaluate on at most this many rows, chosen at random.")
    max_length: int | None = flag(None, "Maximum number of tokens of a row. Default: the backbone's maximum.")
    cache_activations: str | None = flag(
        None, "Folder to cache the backbone's states in, so that it runs once per row instead of in each epoch."
    )
    activations_dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto",
        "Data type of the cached states: auto, which is that in which the backbone computes them; float32; or bfloat16, for "
        "half the disk space.",
    )
    adapter_layers: list[int] | None = flag(
        None, "The backbone states that the adapter reads. Default: the first, middle and second-to-last."
    )
    adapter_hidden_size: int = flag(768, "Width of the adapter's transformer layers, or of its bottlenecks.")
    adapter_num_hidden_layers: int = flag(
        2,
        "Transformer layers in each adapter layer. With 0, it is a bottleneck: project down, activation, project up.",
    )
    adapter_num_attention_heads: int = flag(12, "Attention heads of the transformer layers.")
    adapter_intermediate_size: int = flag(3072, "Width of the feed-forward part of the transformer layers.")
    dropout: float = flag(0.1, "Dropout in the adapter and in the head.")
    overwrite_output_dir: bool = flag(
        False, "Replace the adapter and the checkpoints of an earlier run in --output_dir."
    )
    language: str | None = flag(None, "Language of the corpus (en, …), for the model card.")
    license: str | None = flag(None, "Licence of the adapter (apache-2.0, cc-by-sa-4.0, …), for the model card.")
    fusion: Literal["add", "attention", "concat", "gate"] = flag(
        "add",
        "How the outputs of the backbone and the adapter are combined for the head: add; concat as in the original; gate; or "
        "attention. With all but add, part of what is learned ends up in the fusion, which is discarded with the head.",
    )

    def __post_init__(self):
        self.data = [self.data] if isinstance(self.data, str) else self.data
        check_rows(self)
        sizes = {"adapter_hidden_size": 1, "adapter_num_hidden_layers": 0, "adapter_num_attention_heads": 1}
        check_least(self, sizes)
        if self.name is not None:
            check_adapter_name(self.name)
        if self.adapter_num_hidden_layers and self.adapter_hidden_size % self.adapter_num_attention_heads:
            raise ValueError(
                f"--adapter_num_attention_heads ({self.adapter_num_attention_heads}) must divide --adapter_hidden_size "
                f"({self.adapter_hidden_size})"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be in [0, 1), not {self.dropout}")
        self.adapter_config()

    def adapter_config(self) -> KnowledgeAdapterConfig:
        return KnowledgeAdapterConfig(
            backbone_layers=self.adapter_layers,
            hidden_size=self.adapter_hidden_size,
            num_hidden_layers=self.adapter_num_hidden_layers,
            num_attention_heads=self.adapter_num_attention_heads,
            intermediate_size=self.adapter_intermediate_size,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
        )


def find_objective(name: str) -> Objective:
    """
    The objective of this name.

    Raises:
        ValueError: there is none; the message lists all.
    """
    if name not in OBJECTIVES:
        raise ValueError(
            f"there is no objective '{name}'; there are {sorted(OBJECTIVES)}.{did_you_mean(name, OBJECTIVES)}"
        )
    return OBJECTIVES[name]


def pretrain(objective: str, arguments: PretrainingArguments, training: TrainingArguments) -> dict[str, float]:
    """
    Trains an adapter and saves it as an adapter repository in `training.output_dir`.

    Besides the adapter and its provenance, the folder contains the head it was trained with (ignored when the adapter is
    loaded into another model), the tokenizer, `trainer_state.json` and a plot of the losses.

    Returns:
        The metrics on the held-out rows.

    Raises:
        ValueError: the objective is unknown, or the data does not fit it or has fewer than two labels.
        KeyboardInterrupt: Ctrl-C; its message says what was saved.
    """
    task, name = find_objective(objective), arguments.name or objective
    warn_without_matplotlib("training.png")
    check_report_to(training)
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # it is for copies to an accelerator; torch warns without one
    checkpoint = checkpoint_to_resume(training, arguments.overwrite_output_dir)
    set_seed(training.seed)
    source = "', '".join(arguments.data)  # as quoted in errors
    rows = split_rows(task, arguments.data, arguments.eval_size, training.seed)
    labels = task.labels_of(rows["train"])
    if task.schema is not None and len(labels) < 2:
        raise ValueError(f"'{source}' has only the label {shortened(labels)}: at least two are needed.")
    if task.schema is not None:
        rows["eval"] = known_labels(rows["eval"], task.schema, set(labels))
        if not len(rows["eval"]):
            raise ValueError(
                f"'{source}': no held-out row is left, as their labels don't occur in training. Use more rows for each "
                "label, or a larger --eval_size."
            )
    rows["train"] = sample(rows["train"], training.seed, arguments.max_train_samples, _rows_in_max_steps(training))
    rows["eval"] = sample(rows["eval"], training.seed, arguments.max_eval_samples)
    compute_metrics = task.metrics(labels) if task.metrics else None
    fields = {"classifier_dropout": arguments.dropout, "fusion": arguments.fusion, **label_fields(labels)}
    model = task.model_class.from_backbone(arguments.backbone, {name: arguments.adapter_config()}, **fields)
    tokenizer = load_tokenizer(arguments.backbone)
    model.train_knowledge_adapter(name, train_head=True)
    precision.cast_backbone(model, arguments.backbone_dtype, training.device)
    features = partial(task.features, labels=labels) if labels else task.features
    with training.main_process_first(desc="features"):
        most = most_tokens(tokenizer, arguments.max_length, model.backbone.config)
        data = {split: encode(split_rows, features, tokenizer, max_length=most) for split, split_rows in rows.items()}
    stop = StopOnInterrupt()
    # Made before the activations are computed, so that errors in its arguments come first.
    trainer = Trainer(
        model,
        training,
        data_collator=CachedStatesCollator(task.collator(tokenizer)),
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits,
        callbacks=[stop],
    )
    show_progress(trainer)
    if arguments.cache_activations is not None:
        dtype = None if arguments.activations_dtype == "auto" else getattr(torch, arguments.activations_dtype)
        cached = use_cached_states(trainer, data, arguments.cache_activations, dtype)
        trainer.train_dataset, trainer.eval_dataset = cached["train"], cached["eval"]
    train(trainer, checkpoint, stop)
    metrics = quality(trainer.evaluate())
    on_hub = [data for data in arguments.data if not Path(data).exists()]
    described = {
        "dataset": on_hub[0] if len(on_hub) == 1 else on_hub,
        "language": arguments.language,
        "license": arguments.license,
    }
    model.config.knowledge_adapters[name].provenance = {  # type: ignore[index]
        "objective": objective,
        "corpus": ", ".join(data if data in on_hub else Path(data).resolve().name for data in arguments.data),
        **{key: value for key, value in described.items() if value},
        "rows": len(data["train"]),
        "labels": len(labels),
        "held_out_rows": len(data["eval"]),
        "metrics": metrics,
        "training": _course(trainer.state.log_history),
        "seed": training.seed,
        "versions": {package: version(package) for package in ("kadapter-hf", "torch", "transformers", "datasets")},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if trainer.is_world_process_zero():
        _draw_losses(trainer.state.log_history, Path(str(training.output_dir), "training.png"))
    save_and_push(trainer, f"Upload the {name} knowledge adapter")
    return metrics


def split_rows(objective: Objective, sources: Sequence[str], eval_size: float, seed: int) -> dict[str, Dataset]:
    """The rows of all sources, joined, to train (`train`) and to evaluate (`eval`) on."""
    loaded = [load_rows(data, objective.schema) for data in sources]
    splits = {
        name: concatenate_datasets([source[name] for source in loaded if name in source])
        for name in ("train", "validation", "test")
        if any(name in source for source in loaded)
    }
    for name in ("validation", "test"):
        if name in splits:
            return {"train": splits["train"], "eval": splits[name]}
    if len(splits["train"]) < 2:
        names = "', '".join(sources)
        raise ValueError(f"'{names}' has {len(splits['train'])} rows, which is too few to train on.")
    parts = splits["train"].train_test_split(eval_size, seed=seed)
    return {"train": parts["train"], "eval": parts["test"]}


def known_labels(rows: Dataset, schema: Schema, known: set[str]) -> Dataset:
    """Drops, with a warning, rows with labels that don't occur in training and so can't be predicted."""
    unknown = sorted(label_set(rows, schema) - known)
    if not unknown:
        return rows
    kept = [number for number, value in enumerate(rows[schema.labels][:]) if known.issuperset(as_labels(value))]
    logger.warning(
        f"{len(rows) - len(kept)} held-out rows are dropped, as their labels don't occur in training: "
        f"{', '.join(map(shortened, unknown[:5]))}"
    )
    return rows.select(kept)


def _rows_in_max_steps(training: TrainingArguments) -> int | None:
    """The number of rows that --max_steps will use; None if the number of epochs limits the training."""
    if training.max_steps <= 0:
        return None
    per_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    return training.max_steps * per_step


def _course(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The losses and metrics at each evaluation."""
    rows: list[dict[str, float]] = []
    loss: dict[str, float] = {}
    for entry in history:
        if "loss" in entry:
            loss = {"loss": entry["loss"]}
        if "eval_loss" in entry and (not rows or rows[-1]["step"] != entry["step"]):
            measured = {key: value for key, value in entry.items() if key.startswith("eval_")}
            rows.append({"epoch": entry["epoch"], "step": entry["step"], **loss, **quality(measured)})
    return rows


def _draw_losses(history: list[dict[str, float]], path: Path) -> None:
    figure = new_figure(6, 4)
    if figure is None:
        return
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=150)


def _width_of(backbone: str) -> int:
    """The width of a backbone; 0 if its configuration can't be read, which is reported when it is loaded."""
    if backbone == DEFAULT_BACKBONE:  # needs no network
        return KAdapterConfig().hidden_size
    try:
        return getattr(AutoConfig.from_pretrained(backbone), "hidden_size", 0)
    except Exception:  # a foreign configuration class may raise anything
        return 0


def parser(name: str) -> Parser:
    """The parser of the flags of `kadapter pretrain` for an objective."""
    objective = find_objective(name)

    def defaults(flags: argparse.Namespace) -> dict[str, Any]:
        return objective.defaults_for(_width_of(flags.backbone))

    made = Parser(
        (PretrainingArguments, TrainingArguments),
        prog=f"kadapter pretrain {name}",
        description=f"Trains a knowledge adapter on a frozen backbone ({name}). Example: kadapter pretrain {name} "
        f"--data corpus --backbone FacebookAI/roberta-large --output_dir {name}-adapter",
        defaults=defaults,
    )
    made.set_defaults(**objective.defaults)  # as --help shows them
    large = objective.large_defaults
    for action in made._actions:
        if action.dest in large:
            action.help = (
                f"{action.help} For a backbone of width {LARGE_WIDTH} or more, the default is {large[action.dest]}."
            )
    return made


def main(arguments: Sequence[str]) -> dict[str, float]:
    """`kadapter pretrain`: the name of the objective, then the flags of `PretrainingArguments` and `TrainingArguments`."""
    objective, *flags = arguments
    return pretrain(objective, *parser(objective).parse(flags))
