"""The results of a task: predictions with their rows, a table by class, a confusion matrix, and the weights of adapters."""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer

from .figures import new_figure
from .tasks import Task


PREDICTIONS = "predictions.jsonl"
# With more classes, the names in a confusion matrix can't be read.
MOST_CLASSES = 60
# Rows whose weights of adapters are averaged.
MOST_ROWS = 1000


def write_report(
    folder: Path,
    task: Task,
    rows: Dataset,
    found: Mapping[int, dict[str, Any]],
    labels: Sequence[str],
    names: Mapping[str, str],
) -> None:
    """Writes all files about predictions for rows that have labels; `names` are those of labels that are ids."""
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / PREDICTIONS, rows, found)
    write_submission(folder, task, rows, found)
    table = per_class(task, rows, found)
    if names:
        table = [{"class": row["class"], "name": names.get(row["class"], "")} | row for row in table]
    if table:
        with open(folder / "per_class.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    if table and isinstance(rows[0][task.schema.labels], str) and len(labels) <= MOST_CLASSES:
        draw_confusion_matrix(task, rows, found, labels, names, folder / "confusion_matrix.png")


@torch.no_grad()
def mean_fusion_weights(trainer: Trainer, features: Dataset) -> dict[str, float]:
    """
    The mean weight of each adapter at the positions that the head reads, of real tokens and in rows of this process; empty if
    the fusion has no weights.
    """
    model: Any = trainer.model
    names = model.active_knowledge_adapters
    state = torch.zeros(1, model.fusion.width, device=model.own_device(), dtype=model.own_dtype())
    if not names or model.fusion.weights(state, dict.fromkeys(names, state)) is None:
        return {}
    model.eval()
    totals, count = Counter[str](), 0.0
    for batch in trainer.get_test_dataloader(features.select(range(min(MOST_ROWS, len(features))))):
        for name, weights in model(**batch, output_fusion_weights=True).fusion_weights.items():
            mask = batch["attention_mask"]
            read = mask.float() if mask.shape == weights.shape else torch.ones_like(weights)
            totals[name] += (weights * read).sum().item()
            count += read.sum().item() / len(names)
    return {name: round(total / count, 4) for name, total in totals.items()}


def write_submission(folder: Path, task: Task, rows: Dataset, found: Mapping[int, dict[str, Any]]) -> Path | None:
    """Writes the file for the task's leaderboard or scorer, if it has one, and returns its path."""
    submission = task.submission(rows, found)
    if submission is None:
        return None
    name, text = submission
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def write_predictions(path: Path, rows: Dataset, found: Mapping[int, dict[str, Any]]) -> None:
    """Writes a JSON line for each prediction: the columns of its row, and the prediction."""
    with open(path, "w", encoding="utf-8") as file:
        for number in sorted(found):
            file.write(json.dumps(rows[number] | found[number], ensure_ascii=False) + "\n")


def per_class(task: Task, rows: Dataset, found: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and the number of true cases of each class; empty for tasks without classes."""
    right, predicted, correct = Counter[str](), Counter[str](), Counter[str]()
    for number, row in enumerate(rows):
        answer = task.cases(row[task.schema.labels])
        if answer is None:
            return []
        guess = (task.cases(found[number]["prediction"]) if number in found else None) or set()
        for counts, cases in ((right, answer), (predicted, guess), (correct, answer & guess)):
            counts.update(case[0] for case in cases)
    table = []
    for name in sorted(right.keys() | predicted.keys()):
        precision = correct[name] / predicted[name] if predicted[name] else 0.0
        recall = correct[name] / right[name] if right[name] else 0.0
        f1 = 2 * precision * recall / (precision + recall) if correct[name] else 0.0
        scores = {"precision": precision, "recall": recall, "f1": f1}
        table.append(
            {"class": name} | {key: round(value, 4) for key, value in scores.items()} | {"support": right[name]}
        )
    return table


def draw_confusion_matrix(
    task: Task,
    rows: Dataset,
    found: Mapping[int, dict[str, Any]],
    labels: Sequence[str],
    names: Mapping[str, str],
    path: Path,
) -> None:
    """Draws how often each true class was predicted as each other one, as a share of the true class."""
    size = 3 + len(labels) * 0.25
    figure = new_figure(size, size)
    if figure is None:
        return
    counts = np.zeros((len(labels), len(labels)))
    for number, prediction in found.items():
        counts[labels.index(rows[number][task.schema.labels]), labels.index(prediction["prediction"])] += 1
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(labels))
    shown = [names.get(label, label) for label in labels]
    axes.set_xticks(ticks, shown, rotation=90)
    axes.set_yticks(ticks, shown)
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, shrink=0.6)
    figure.savefig(path, dpi=120)
