"""Evaluation of fine-tuned models, and their predictions."""

from collections.abc import Sequence
from dataclasses import asdict
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from .corpora import names_beside
from .corpora.schema import label_set
from .features import load_tokenizer
from .messages import shortened
from .modeling.configuration_kadapter import KAdapterConfig
from .modeling.format_kadapter import KAdapterLoadError
from .modeling.modeling_kadapter import KAdapterModel, KAdapterPreTrainedModel
from .modeling.registry_kadapter import HEADS
from .runs import quality, show_progress
from .tasks import TASKS, Options, Task
from .tasks.task import find_task


def load_finetuned(source: str, task: Task | None = None) -> tuple[KAdapterPreTrainedModel, PreTrainedTokenizerBase]:
    """
    Loads a saved model, as the class that it was saved from, and its tokenizer, from a folder or a repository. Names of labels
    are read from a relations.json in the folder.

    Raises:
        ValueError: it is not a K-Adapter, its class is unknown, or it was fine-tuned on another kind of task than `task`.
        OSError: it can't be loaded.
    """
    try:
        content, _ = KAdapterConfig.get_config_dict(source)
    except OSError as error:
        raise KAdapterLoadError(
            f"'{source}' is neither a folder with a model nor a repository that can be loaded: {error}"
        ) from error
    if content.get("model_type") != KAdapterConfig.model_type:
        kind = (
            f"a model of the type {content['model_type']}" if content.get("model_type") else "a folder without a model"
        )
        raise ValueError(f"'{source}' is no K-Adapter, but {kind}.")
    saved = next(iter(content.get("architectures") or []), None)
    if task is not None and saved != task.model_class.__name__:
        raise ValueError(f"'{task.name}' needs a {task.model_class.__name__}, but '{source}' is a {saved}.")
    classes: dict[Any, Any] = {KAdapterModel.__name__: KAdapterModel} | {
        name: head for name, (head, _) in HEADS.items()
    }
    if task is None and saved not in classes:
        raise ValueError(f"'{source}' is a {saved}, which is none of the classes {', '.join(classes)}.")
    model_class = classes[saved] if task is None else task.model_class
    model = model_class.from_pretrained(source)
    if names := names_beside(source):
        model.config.task = (model.config.task or {}) | {"label_names": names}
    return model, load_tokenizer(source)


def evaluate(
    model: KAdapterPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    task: Task | None = None,
    batch_size: int = 32,
) -> tuple[dict[int, dict[str, Any]], dict[str, float]]:
    """
    Predictions for rows of a task, by row number, and the metrics, if the rows have labels.

    Args:
        rows: as `Task.read` returns them.
        task: by default the one that the model was fine-tuned on. How its input is made, e.g. the markers, comes from
            `model.config.task`.

    Raises:
        ValueError: the model was not fine-tuned on a task of this kind, or does not know a label.
    """
    task = task_of(model, task)
    options, labels = options_of(model, task), labels_of(model, task)
    if labels and task.schema.labels in rows.column_names:
        unknown = sorted(label_set(rows, task.schema).difference(labels))
        if unknown:
            raise ValueError(
                f"the model does not know {len(unknown)} of the labels: {', '.join(map(shortened, unknown[:5]))}. It was "
                f"fine-tuned on {len(labels)}: {', '.join(map(shortened, labels[:5]))}{', …' if len(labels) > 5 else ''}"
            )
    features = task.encode(rows, tokenizer, labels, (model.config.task or {}).get("max_length"), options)
    with TemporaryDirectory() as folder:  # Trainer wants one
        training = TrainingArguments(
            folder,
            per_device_eval_batch_size=batch_size,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(model, training, data_collator=task.collator(tokenizer))
        show_progress(trainer)
        return predict_with(trainer, task, rows, features, labels, options)


def predict(
    model: KAdapterPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    task: Task | None = None,
    batch_size: int = 32,
) -> list[dict[str, Any] | None]:
    """
    The prediction for each of a few rows, which have the columns for data of your own, also with a model of the paper's tasks:

        predict(model, tokenizer, [{"question": "Where is Rome?", "context": "Rome is in Italy."}])

    Returns:
        A dict with `prediction` and more for each row; None for a row that does not fit into the maximum length.

    Raises:
        ValueError: a row lacks something, or the model was not fine-tuned on a task of this kind.
    """
    task = task_of(model, task)
    # Of tasks with the same columns, the one for data of your own is the base class, registered first.
    reader = next(other for other in TASKS.values() if other.schema is task.schema)
    read, _ = reader.read(Dataset.from_list(list(rows)), labelled=False)
    found, _ = evaluate(model, tokenizer, read, task, batch_size)
    return [found.get(number) for number in range(len(read))]


def task_of(model: KAdapterPreTrainedModel, task: Task | None = None) -> Task:
    """The task, after checking that the model was fine-tuned on one of this kind; by default the model's own."""
    recorded = (model.config.task or {}).get("name")
    if task is None:
        if recorded is None:
            raise ValueError("the model does not record the task that it was fine-tuned on: name the task.")
        return find_task(recorded)
    if not isinstance(model, task.model_class):
        raise ValueError(
            f"'{task.name}' needs a {task.model_class.__name__}, but the model is a {type(model).__name__}"
            f"{f', fine-tuned on {recorded}' if recorded else ''}."
        )
    return task


def options_of(model: KAdapterPreTrainedModel, task: Task) -> Options:
    """The task's options as recorded in the model; those that are not recorded have their defaults."""
    names = asdict(task.options()).keys()
    return task.options(**{name: value for name, value in (model.config.task or {}).items() if name in names})


def labels_of(model: KAdapterPreTrainedModel, task: Task) -> list[str]:
    """The labels in the order of the model's outputs; empty for a task without labels."""
    if not task.has_labels:
        return []
    return [label for _, label in sorted((model.config.id2label or {}).items())]


def predict_with(
    trainer: Trainer,
    task: Task,
    rows: Dataset,
    features: Dataset,
    labels: Sequence[str],
    options: Options,
    inputs: Any = None,
) -> tuple[dict[int, dict[str, Any]], dict[str, float]]:
    """
    As `evaluate`, with the model of a Trainer. Predictions of labels that have names also have a `name`, or `names`.

    Args:
        inputs: what the model takes, by default the features.
    """
    has_labels = task.schema.labels in rows.column_names
    trainer.compute_metrics = task.metrics_on(rows, features, labels, options) if has_labels else None
    output = trainer.predict(features if inputs is None else inputs, metric_key_prefix="")
    metrics = {name.removeprefix("_"): value for name, value in quality(output.metrics or {}).items()}
    found = task.predictions(output.predictions, rows, features, labels, options)
    names = label_names(trainer.model)
    for prediction in found.values():
        label = prediction["prediction"]
        if isinstance(label, str) and label in names:
            prediction["name"] = names[label]
        elif isinstance(label, list) and names.keys() & set(label):
            prediction["names"] = [names.get(one, one) for one in label]
    return found, metrics


def label_names(model: Any) -> dict[str, str]:
    """The names of labels that are ids, e.g. Wikidata's relations, which the model has recorded; empty if there are none."""
    return (model.config.task or {}).get("label_names", {})
