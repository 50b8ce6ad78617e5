"""
Trains adapters on real corpora and evaluates them on tasks that they were not trained for.

1. Train a factual adapter on the relations of FewRel and Re-DocRED, and a linguistic one on the trees of UD English EWT.
2. Evaluate on relation classification, with backbone and adapters frozen and only the fusion and the head trained:
   SemEval-2010 Task 8, the relations of Re-DocRED that the factual adapter has not seen, and, as a control, those that
   it has seen, in unseen documents. Each task is run with the backbone alone, with untrained adapters, with each adapter
   and with both; with all examples and with a few; and with several seeds.

    python examples/knowledge.py --data DIR --output_dir knowledge-output

DIR contains fewrel/val_wiki.json, re-docred/dev_revised.json, ud-english-ewt/en_ewt-ud-{train,dev}.conllu and
semeval-2010-task-8/{TRAIN_FILE.TXT,TEST_FILE_FULL.TXT}.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.figure
import torch
import transformers
from datasets import Dataset
from knowledge_corpora import (
    DEFAULT_BACKBONE,
    Task,
    default_backbone,
    flag,
    machine,
    read_corpora,
    run_script,
    states_at_markers,
)
from rich.console import Console
from rich.progress import track
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from kadapter_hf import KAdapterForRelationClassification, KAdapterModel, KnowledgeAdapterConfig
from kadapter_hf.features import encode, relation_features
from kadapter_hf.pretraining import PretrainingArguments, pretrain


BASELINES = ("backbone alone", "one untrained adapter", "two untrained adapters")
SETTINGS = {  # each with its adapters
    BASELINES[0]: [],
    BASELINES[1]: ["untrained"],
    BASELINES[2]: ["untrained", "untrained2"],
    "factual adapter": ["factual"],
    "linguistic adapter": ["linguistic"],
    "both adapters": ["factual", "linguistic"],
}
console = Console()


@dataclass
class Arguments:
    data: str = field(metadata={"help": "The folder with the corpora."})
    backbone: str | None = flag(None, f"A repository or folder. Default: {DEFAULT_BACKBONE}.")
    output_dir: str = flag("knowledge-output", "Output folder for adapters and results.")
    factual: str | None = flag(None, "An existing factual adapter to use instead of training one.")
    linguistic: str | None = flag(None, "An existing linguistic adapter to use instead of training one.")
    adapter_size: int = flag(192, "Width of the adapters' transformer layers, a multiple of 64.")
    adapter_depth: int = flag(1, "Transformer layers in each adapter layer.")
    factual_epochs: float = flag(9, "Epochs of the factual adapter's pre-training.")
    factual_learning_rate: float = flag(5e-4, "Peak learning rate of the factual adapter's pre-training.")
    linguistic_epochs: float = flag(3, "Epochs of the linguistic adapter's pre-training.")
    linguistic_learning_rate: float = flag(1e-3, "Peak learning rate of the linguistic adapter's pre-training.")
    few: int = flag(600, "Number of examples in the settings with few examples.")
    steps: int = flag(400, "Training steps on each task.")
    learning_rate: float = flag(3e-3, "Peak learning rate on the tasks.")
    fusion: str = flag("concat", "How the backbone's and the adapters' states are fused: concat or add.")
    seeds: int = flag(
        3, "Number of repetitions of each task, each with a new head and another sample of few examples."
    )
    max_rows: int | None = flag(None, "Maximum number of rows of each corpus, for a quick run.")

    def adapter_config(self) -> KnowledgeAdapterConfig:
        return KnowledgeAdapterConfig(
            hidden_size=self.adapter_size,
            intermediate_size=4 * self.adapter_size,
            num_attention_heads=self.adapter_size // 64,
            num_hidden_layers=self.adapter_depth,
        )


# ---- Adapters -------------------------------------------------------------------------------------------------------


def pretrain_adapter(objective: str, data: str, args: Arguments, folder: Path) -> str:
    """Does the same as `kadapter pretrain`."""
    output = folder / objective
    arguments = PretrainingArguments(
        data=data,
        backbone=str(args.backbone),
        cache_activations=str(folder / "activations"),
        activations_dtype="bfloat16",
        overwrite_output_dir=True,
        adapter_hidden_size=args.adapter_size,
        adapter_intermediate_size=4 * args.adapter_size,
        adapter_num_attention_heads=args.adapter_size // 64,
        adapter_num_hidden_layers=args.adapter_depth,
    )
    training = TrainingArguments(
        output_dir=str(output),
        learning_rate=getattr(args, f"{objective}_learning_rate"),
        num_train_epochs=getattr(args, f"{objective}_epochs"),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    pretrain(objective, arguments, training)
    return str(output)


# ---- Tasks ----------------------------------------------------------------------------------------------------------


def fit(
    model: KAdapterForRelationClassification, states: dict[str, list[dict]], metrics: Any, args: Arguments, seed: int
) -> dict[str, float]:
    training = TrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=512,
        warmup_steps=0.1,
        weight_decay=0.01,
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        training,
        train_dataset=states["train"],
        eval_dataset=states["test"],
        data_collator=transformers.default_data_collator,
        compute_metrics=metrics,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items() if name.endswith("f1")}


def with_states(rows: Dataset, states: dict[str, torch.Tensor], names: list[str]) -> list[dict[str, Any]]:
    """Rows with what the fusion reads at both markers, as frozen parts compute the same states in every step."""
    stacked = torch.stack([states[name] for name in ("", *names)], dim=1)
    labels = rows["labels"]
    return [
        {"fusion_states": stacked[row], "subject_start": 0, "object_start": 1, "labels": labels[row]}
        for row in range(len(rows))
    ]


def compare(task: Task, adapters: dict[str, Any], tokenizer: Any, args: Arguments) -> list[dict[str, Any]]:
    """Returns a record for each number of examples, seed and setting."""
    labels, results = task.labels, []
    parts = {"train": task.train, "test": task.test}
    kwargs = {"labels": labels, "markers": task.markers}
    data = {name: encode(rows, relation_features, tokenizer, **kwargs) for name, rows in parts.items()}
    whole = KAdapterForRelationClassification.from_backbone(args.backbone, adapters)
    states = {name: states_at_markers(whole, rows, tokenizer) for name, rows in data.items()}
    size = len(data["train"])
    settings = [
        (examples, seed, setting)
        for examples in sorted({size, min(args.few, size)}, reverse=True)
        for seed in range(args.seeds)
        for setting in SETTINGS
    ]
    given = {
        setting: {part: with_states(data[part], states[part], names) for part in data}
        for setting, names in SETTINGS.items()
    }
    for examples, seed, setting in track(settings, task.name, console=console):
        names, rows = SETTINGS[setting], dict(given[setting])
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:examples].tolist()
        rows["train"] = [rows["train"][place] for place in chosen]
        set_seed(seed)
        model = KAdapterForRelationClassification.from_backbone(
            args.backbone,
            {name: adapters[name] for name in names},
            fusion=args.fusion,
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
        )
        model.freeze_knowledge_adapters()
        scores = fit(model, rows, task.metrics(), args, seed)
        results.append(
            {"task": task.name, "metric": task.metric, "examples": examples, "seed": seed, "setting": setting}
            | {"score": scores[task.metric], "scores": scores}
        )
    return results


# ---- Results --------------------------------------------------------------------------------------------------------


def scores_of(results: list[dict[str, Any]], setting: str) -> list[float]:
    """The scores of a setting, in the order of the seeds."""
    return [result["score"] for result in results if result["setting"] == setting]


def gains(results: list[dict[str, Any]], setting: str, baseline: str) -> list[float]:
    return [a - b for a, b in zip(scores_of(results, setting), scores_of(results, baseline), strict=True)]


def mean_and_spread(values: list[float], sign: str = "") -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):{sign}.1f}{spread}"


def groups(results: list[dict[str, Any]]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault((result["task"], result["metric"], result["examples"]), []).append(result)
    return found


def report(results: list[dict[str, Any]], adapters: dict[str, Any], settings: dict[str, Any], seconds: float) -> str:
    """The results as a page of Markdown."""
    lines = ["# Results", "", "Generated by `make knowledge`.", "", "## Pre-training", ""]
    lines += ["| adapter | training rows | held-out rows | metrics on held-out rows |", "|---|---|---|---|"]
    for name in ("factual", "linguistic"):
        provenance = adapters[name].provenance
        metrics = ", ".join(
            f"{metric.replace('_', '-')} {100 * provenance['metrics'][f'eval_{metric}']:.1f}"
            for metric in ("micro_f1", "macro_f1", "uas", "las")
            if f"eval_{metric}" in provenance["metrics"]
        )
        lines.append(f"| {name} | {provenance['rows']:,} | {provenance['held_out_rows']:,} | {metrics} |")
    lines += ["", "## Transfer to other tasks", ""]
    lines += ["Mean ± standard deviation over the seeds, in percent. Gains are computed per seed.", ""]
    lines += ["![A bar for each setting, a dot for each seed](results.png)", ""]
    for (task, metric, examples), group in groups(results).items():
        metric = metric.replace("_f1", "-F1")
        lines += [f"### {task}, {examples:,} examples", ""]
        header = f"| | {metric} | gain over {BASELINES[0]} | gain over the same number of untrained adapters |"
        lines += [header, "|---|---|---|---|"]
        for setting, names in SETTINGS.items():
            untrained = BASELINES[len(names)]
            cells = [
                mean_and_spread(gains(group, setting, baseline), "+") if baseline != setting else ""
                for baseline in (BASELINES[0], untrained if setting not in BASELINES else setting)
            ]
            lines.append(f"| {setting} | {mean_and_spread(scores_of(group, setting))} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Setup", "", f"- {machine()}"]
    lines += [f"- {name}: {value}" for name, value in settings.items()]
    lines += [f"- total time: {seconds / 60:.0f} minutes", ""]
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draws a column for each task and in it a panel for each number of examples, with bars for settings and dots for seeds."""
    found = groups(results)
    columns = [[key for key in found if key[0] == task] for task in dict.fromkeys(task for task, *_ in found)]
    height = max(map(len, columns))
    figure = matplotlib.figure.Figure(figsize=(4 * len(columns), 3.6 * height), layout="constrained")
    panels = figure.subplots(height, len(columns), squeeze=False)
    placed = {key: panels[row, column] for column, keys in enumerate(columns) for row, key in enumerate(keys)}
    for key, axes in placed.items():
        (task, metric, examples), group = key, found[key]
        for place, setting in enumerate(SETTINGS):
            scores = scores_of(group, setting)
            color = "0.75" if setting in BASELINES else f"C{place - len(BASELINES)}"
            axes.bar(place, statistics.mean(scores), color=color)
            axes.plot([place] * len(scores), scores, "k.", markersize=4)
        axes.set_xticks(range(len(SETTINGS)), SETTINGS, rotation=40, ha="right", fontsize=8)
        axes.set_title(f"{task}\n{examples:,} examples", fontsize=9)
        axes.set_ylabel(metric.replace("_f1", "-F1"))
        lowest = min(result["score"] for result in group)
        axes.set_ylim(bottom=max(0, lowest - 0.1))
    figure.savefig(path, dpi=120)


def run(args: Arguments) -> None:
    started = time.monotonic()
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "output_dir") and value}
    args.backbone = args.backbone or default_backbone()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    corpora, tasks = read_corpora(Path(args.data), folder, args.max_rows)
    files = {name: getattr(args, name) or pretrain_adapter(name, corpora[name], args, folder) for name in corpora}
    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    untrained = {name: args.adapter_config() for name in SETTINGS[BASELINES[2]]}
    learned = {
        name: KAdapterModel.config_class.from_pretrained(file).knowledge_adapters[name] for name, file in files.items()
    }
    results: list[dict[str, Any]] = []
    for task in tasks:  # written after each task, as a run takes long
        results += compare(task, files | untrained, tokenizer, args)
        (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        page = report(results, learned, {"backbone": DEFAULT_BACKBONE} | settings, time.monotonic() - started)
        (folder / "results.md").write_text(page, encoding="utf-8")
        draw(results, folder / "results.png")
    console.print(page, markup=False, highlight=False)


def main() -> None:
    run_script(Arguments, __doc__, run)


if __name__ == "__main__":
    main()
