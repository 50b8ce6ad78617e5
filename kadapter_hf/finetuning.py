"""
Fine-tuning on a downstream task, with the stock Trainer (paper, section 4).

A task defines how its files are read, its features, head and metrics; see `kadapter_hf.tasks`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from kadapter_cli._flags import EVERY_EPOCH, check_least, check_rows, fusion_values
from kadapter_cli._source import flag

from .activations import CachedStatesCollator
from .corpora import names_beside
from .features import load_tokenizer, most_tokens
from .figures import warn_without_matplotlib
from .finetuning_data import load_data
from .modeling.configuration_kadapter import DEFAULT_BACKBONE, KnowledgeAdapterConfig
from .modeling.format_kadapter import KAdapterLoadError
from .modeling.heads_kadapter import KAdapterForQuestionAnswering, KAdapterPreTrainedModel
from .modeling.reading_kadapter import read_adapter
from .modeling.sources_kadapter import adapter_file
from .named_adapters import fusion_config, named_adapters
from .predicting import label_names, predict_with
from .reports import mean_fusion_weights, write_report
from .runs import (
    Parser,
    StopOnInterrupt,
    check_report_to,
    checkpoint_to_resume,
    label_fields,
    save_and_push,
    show_progress,
    train,
    use_cached_states,
)
from .tasks import Options, Task
from .tasks.task import find_task


logger = logging.get_logger(__name__)

# The letters by which the paper names adapters, by objective.
LETTERS = {"factual": "F", "linguistic": "L"}
# Fields of an adapter's configuration that belong to its weights.
NOT_SIZES = ("backbone_name_or_path", "backbone_fingerprint", "provenance")


@dataclass
class FinetuningArguments:
    """Arguments in addition to those of the task and of Trainer."""

    data: str | None = flag(
        None,
        "A folder whose files name their splits (train, dev or validation, test), a file with rows to train on, or a data set "
        "on the Hub.",
    )
    train_file: str | None = flag(None, "Instead of --data: the file with the rows to train on.")
    validation_file: str | None = flag(None, "With --train_file: the rows to choose the best checkpoint by.")
    test_file: str | None = flag(None, "With --train_file: the rows for the final evaluation.")
    adapters: list[str] | None = flag(
        None,
        "Trained knowledge adapters: repositories, folders or files. NAME=SOURCE renames an adapter, or chooses "
        "one of several, which are all used without. Default: none, which fine-tunes the backbone alone.",
    )
    untrained_adapters: int = flag(
        0, "Use this many new adapters with random weights instead, which the paper calls K-Adapter without knowledge."
    )
    untrained_like: str | None = flag(
        None, "An adapter (repository, folder or file) whose sizes the untrained ones have. Default: the paper's."
    )
    backbone: str | None = flag(
        None, f"A repository or folder. Default: as recorded in the first adapter, otherwise {DEFAULT_BACKBONE}."
    )
    fusion: Literal["add", "attention", "concat", "gate"] = flag(
        "concat", "How the outputs of the backbone and the adapters are combined: concat, add, gate or attention."
    )
    fusion_config: str | None = flag(
        None,
        """The configuration of the fusion as JSON, e.g. '{"scale": 0.1}' for add: a learnt factor per adapter.""",
    )
    freeze_backbone: bool = flag(
        False, "Train the fusion and the head only, and with --freeze_adapters false the adapters."
    )
    freeze_adapters: bool = flag(True, "Keep the adapters as they are, as the paper does.")
    cache_activations: str | None = flag(
        None,
        "With --freeze_backbone: a folder for the states that the frozen parts compute, which other runs on the same rows "
        "read. Default: if the adapters are frozen too, the states are computed once and kept in memory.",
    )
    max_length: int | None = flag(
        None, "Maximum number of tokens. Default: the paper's, or the backbone's if it is less."
    )
    eval_size: float = flag(0.1, "Fraction of the rows to hold out if the data has no split for validation.")
    max_train_samples: int | None = flag(None, "Train on at most this many rows, chosen at random.")
    max_eval_samples: int | None = flag(None, "Evaluate on at most this many rows of each split, chosen at random.")
    overwrite_output_dir: bool = flag(
        False, "Replace the model and the checkpoints of an earlier run in --output_dir."
    )
    skip_bad_rows: bool = flag(False, "Skip and count rows that can't be used, instead of stopping at the first one.")

    def __post_init__(self):
        if (self.data is None) == (self.train_file is None):
            raise ValueError("give either --data or --train_file")
        if self.data is not None and (self.validation_file or self.test_file):
            raise ValueError("--validation_file and --test_file belong to --train_file, not to --data")
        if self.adapters and self.untrained_adapters:
            raise ValueError("give either --adapters or --untrained_adapters")
        if self.untrained_like is not None and not self.untrained_adapters:
            raise ValueError("--untrained_like belongs to --untrained_adapters")
        if self.cache_activations is not None and not self.freeze_backbone:
            raise ValueError(
                "--cache_activations belongs to --freeze_backbone: a backbone that trains changes its states"
            )
        check_rows(self)
        check_least(self, {"untrained_adapters": 0})
        fusion_values(self.fusion, self.fusion_config)  # also before the package is imported, unlike the next line
        fusion_config(self.fusion, self.fusion_config)


def combination(adapters: dict[str, KnowledgeAdapterConfig]) -> str:
    """The paper's name for a set of adapters: `F` (factual), `L` (linguistic), `F+L`, or the empty string without any."""
    kinds = {(config.provenance or {}).get("objective", name) for name, config in adapters.items()}
    return "+".join(letter for kind, letter in LETTERS.items() if kind in kinds)


def defaults(task: Task, adapters: Sequence[str], freeze_backbone: bool) -> dict[str, Any]:
    """The values of TrainingArguments for a task: the paper's for these adapters, and the choice of the best checkpoint."""
    configs = {name: config for name, (_, config) in named_adapters(adapters).items()}
    settings = task.settings(combination(configs))
    settings.pop("max_length", None)
    if freeze_backbone:
        # The paper always trains the backbone. A new fusion and a new head alone need larger steps; see docs/knowledge.md.
        settings |= {"learning_rate": 1e-3, "warmup_steps": 0.1}
    return settings | {
        "per_device_eval_batch_size": 32,
        "train_sampling_strategy": "group_by_length",  # little padding
        **EVERY_EPOCH,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": task.metric,
        "greater_is_better": True,
    }


class OrderedTrainer(Trainer):
    """
    A Trainer that evaluates rows in their order, as predictions are matched with rows by position. With `group_by_length`,
    transformers' Trainer reorders the rows of the evaluation, too.
    """

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


def finetune(
    task: Task, arguments: FinetuningArguments, options: Options, training: TrainingArguments
) -> dict[str, dict[str, float]]:
    """
    Fine-tunes a K-Adapter on a task and saves it in `training.output_dir`, with the results on the validation and test rows:
    `metrics.json`, `predictions.jsonl`, and for tasks with labels `per_class.csv` and `confusion_matrix.png`.

    Returns:
        The metrics by split.

    Raises:
        ValueError: the data does not fit the task.
        KeyboardInterrupt: Ctrl-C; its message says what was saved.
    """
    check_report_to(training)
    warn_without_matplotlib("confusion_matrix.png")
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # it is for copies to an accelerator; torch warns without one
    checkpoint = checkpoint_to_resume(training, arguments.overwrite_output_dir)
    set_seed(training.seed)
    labels, splits = load_data(task, arguments, options, training.seed)
    model = new_model(task.model_class, arguments, labels)
    tokenizer = load_tokenizer(str(model.config.backbone_name_or_path))
    length = arguments.max_length or task.paper.get("max_length")
    length = most_tokens(tokenizer, length, model.backbone.config)
    model.config.task = {"name": task.name, "schema": task.schema.name, "max_length": length, **asdict(options)}
    if names := names_beside(arguments.data or arguments.train_file or ""):
        model.config.task["label_names"] = {label: names[label] for label in labels if label in names}
    with training.main_process_first(desc="features"):
        data = {name: task.encode(rows, tokenizer, labels, length, options) for name, rows in splits.items()}
    _warn_of_warmup(training, len(data["train"]))
    stop = StopOnInterrupt()
    trainer = OrderedTrainer(
        model,
        training,
        data_collator=CachedStatesCollator(task.collator(tokenizer)),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        compute_metrics=task.metrics_on(splits["validation"], data["validation"], labels, options),
        callbacks=[stop],
    )
    show_progress(trainer)
    inputs = _inputs(trainer, data, arguments)
    trainer.train_dataset, trainer.eval_dataset = inputs["train"], inputs["validation"]
    train(trainer, checkpoint, stop)
    folder = Path(str(training.output_dir))
    results: dict[str, dict[str, float]] = {}
    for name in ("validation", "test"):
        if name not in splits:
            continue
        found, results[name] = predict_with(trainer, task, splits[name], data[name], labels, options, inputs[name])
        if trainer.is_world_process_zero():  # the test split, if there is one
            write_report(folder, task, splits[name], found, labels, label_names(model))
    model.config.task["results"] = results
    if weights := mean_fusion_weights(trainer, data["validation"]):
        model.config.task["fusion_weights"] = weights
    save_and_push(trainer, f"Upload a K-Adapter fine-tuned on {task.name}", {"metrics.json": results})
    return results


def _inputs(trainer: Trainer, data: dict[str, Dataset], arguments: FinetuningArguments) -> dict[str, Any]:
    """The rows of each split, with the states that the frozen parts compute for them, if these only depend on the row."""
    model: Any = trainer.model
    folder = arguments.cache_activations
    reads_padding = isinstance(model, KAdapterForQuestionAnswering) or any(
        config.attend_to_padding for config in (model.config.knowledge_adapters or {}).values()
    )
    if folder is not None and reads_padding:
        raise ValueError(
            "--cache_activations can't be used with extractive questions, whose loss counts the padding, or with adapters that "
            "attend to padding."
        )
    if folder is None and (reads_padding or not (arguments.freeze_backbone and arguments.freeze_adapters)):
        return dict(data)
    try:
        return dict(use_cached_states(trainer, data, folder))
    except MemoryError as error:
        logger.warning(f"The frozen parts run in every epoch: {error} That is what --cache_activations does.")
        return dict(data)


def _warn_of_warmup(training: TrainingArguments, rows: int) -> None:
    """The paper's warm-up is longer than all of the training on a small sample."""
    steps = training.max_steps
    if steps <= 0:
        per_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        steps = math.ceil(math.ceil(rows / per_step) * training.num_train_epochs)
    if training.warmup_steps >= 1 and training.get_warmup_steps(steps) >= steps:  # less than 1 is a share
        logger.warning(
            f"The warm-up of {training.warmup_steps:g} steps is as long as the whole training ({steps} steps): the learning "
            "rate stays low. With so few rows, use e.g. --warmup_steps 0.1, a tenth of the steps."
        )


def new_model(
    model_class: type[KAdapterPreTrainedModel], arguments: FinetuningArguments, labels: Sequence[str] = ()
) -> KAdapterPreTrainedModel:
    """The model that the arguments describe: its backbone, adapters and fusion, and which of them are frozen."""
    sources = named_adapters(arguments.adapters or [])
    adapters: dict[str, Any] = {name: source for name, (source, _) in sources.items()}
    recorded = [config.backbone_name_or_path for _, config in sources.values()]
    if arguments.untrained_adapters:
        config = KnowledgeAdapterConfig()
        if arguments.untrained_like is not None:
            config = read_adapter(adapter_file(arguments.untrained_like, None)).config
            recorded = [config.backbone_name_or_path]
        sizes = {key: value for key, value in config.to_dict().items() if key not in NOT_SIZES}
        adapters = {f"untrained{n}": sizes for n in range(1, arguments.untrained_adapters + 1)}
    backbone = arguments.backbone or next((name for name in recorded if name), None)
    if backbone is None:
        if sources:
            raise KAdapterLoadError(f"'{', '.join(sources)}' does not name its backbone: specify it with --backbone.")
        backbone = DEFAULT_BACKBONE
    values = fusion_config(arguments.fusion, arguments.fusion_config)
    fields = {"fusion_config": values, "freeze_backbone": arguments.freeze_backbone, **label_fields(labels)}
    model = model_class.from_backbone(backbone, adapters, arguments.fusion, **fields)
    if arguments.freeze_adapters:
        model.freeze_knowledge_adapters()
    else:
        model.unfreeze_knowledge_adapters()
    return model


def parser(name: str) -> Parser:
    """The parser of the flags of `kadapter finetune` for a task."""
    task = find_task(name)
    made = Parser(
        (FinetuningArguments, task.options, TrainingArguments),
        prog=f"kadapter finetune {name}",
        usage=f"kadapter finetune {name} --data DATA [--adapters ADAPTER ...] --output_dir FOLDER [more flags]",
        description=f"Fine-tunes a K-Adapter on {name}. Example: kadapter finetune {name} --data {name} --adapters "
        f"factual-adapter linguistic-adapter --output_dir {name}-model",
        defaults=lambda flags: {
            **defaults(task, flags.adapters or [], flags.freeze_backbone),
            # The best checkpoint is known only if each is evaluated.
            "load_best_model_at_end": flags.save_strategy in ("best", flags.eval_strategy),
        },
    )
    made.set_defaults(**defaults(task, [], False))  # as --help shows them
    return made


def trained_parts(arguments: FinetuningArguments) -> str:
    """What trains, in words."""
    has_adapters = bool(arguments.adapters or arguments.untrained_adapters)
    parts = {
        "the backbone": not arguments.freeze_backbone,
        "the adapters": has_adapters and not arguments.freeze_adapters,
        "the fusion": has_adapters,
        "the head": True,
    }
    *others, last = (name for name, trains in parts.items() if trains)
    return f"{', '.join(others)} and {last}" if others else last


def main(arguments: Sequence[str]) -> dict[str, dict[str, float]]:
    """`kadapter finetune`: the name of the task, then the flags of the arguments, the task's options and Trainer."""
    name, *flags = arguments
    return finetune(find_task(name), *parser(name).parse(flags))
