"""
Trains variants of the factual adapter, each with one change, to find out what limits its usefulness.

Each variant is trained as by `kadapter pretrain factual` and evaluated with linear probes: logistic regression on the
states of the backbone and the adapter at the two markers, with everything else fixed. This measures the information in
the states, independently of a task's fusion, head and learning rate. The probes predict relations that the adapter was
trained on (in unseen rows and documents), relations that it was not trained on, and those of another task.

    python examples/knowledge_variants.py --data DIR --output_dir knowledge-output/variants

DIR is the same as for knowledge.py. Results are stored in results.json, from which an interrupted run is resumed.
"""

import json
import statistics
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from knowledge_corpora import (
    DEFAULT_BACKBONE,
    Task,
    default_backbone,
    flag,
    machine,
    read_corpora,
    run_script,
    some,
    states_at_markers,
)
from rich.console import Console
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from kadapter_hf import KAdapterForRelationClassification, KnowledgeAdapterConfig
from kadapter_hf.corpora import read_fewrel
from kadapter_hf.features import encode, relation_features
from kadapter_hf.pretraining import PretrainingArguments, pretrain


UNTRAINED = "untrained adapter"
REFERENCE = "3 epochs"
BACKBONE = "the whole backbone in place of the adapter"
# Changes relative to the first: flags of `kadapter pretrain` or Trainer, or the rows (a fraction, or relations of one corpus).
VARIANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
    "1 epoch": {"num_train_epochs": 1},
    "9 epochs, as in knowledge.py": {"num_train_epochs": 9},
    "learning rate 1e-4": {"learning_rate": 1e-4},
    "learning rate 2e-3": {"learning_rate": 2e-3},
    "twice as wide": {"adapter_hidden_size": 384},
    "twice as deep": {"adapter_num_hidden_layers": 2},
    "reads layers 0 to 6": {"adapter_layers": [0, 1, 2, 3, 4, 5, 6]},
    "fusion concat": {"fusion": "concat"},
    "a quarter of the rows": {"rows": 0.25},
    "FewRel's relations alone": {"rows": "fewrel"},
    "Re-DocRED's other relations alone": {"rows": "docred"},
    BACKBONE: {},
}


console = Console()


@dataclass
class Arguments:
    data: str = field(metadata={"help": "The folder with the corpora."})
    backbone: str | None = flag(None, f"A repository or folder. Default: {DEFAULT_BACKBONE}.")
    output_dir: str = flag("knowledge-output/variants", "Output folder for adapters and results.")
    variants: list[str] | None = flag(None, "Names of the variants to run. Default: all.")
    few: int = flag(600, "Number of examples in the settings with few examples.")
    draws: int = flag(3, "Number of samples of few examples.")
    max_rows: int | None = flag(None, "Maximum number of rows of each corpus, for a quick run.")


def rows_to_learn(folder: Path, facts: Path, data: str, which: Any) -> str:
    """The training rows selected by `which`, with the same held-out rows."""
    if which is None:
        return str(facts)
    rows = load_dataset("parquet", data_dir=str(facts))
    if isinstance(which, float):
        rows["train"] = rows["train"].shuffle(seed=0).select(range(round(which * len(rows["train"]))))
    else:
        fewrel = set(read_fewrel(Path(data) / "fewrel" / "val_wiki.json")[0]["relation"])
        rows = rows.filter(lambda row: (row["relation"] in fewrel) == (which == "fewrel"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in rows.items():
        part.to_parquet(folder / f"{name}.parquet")
    return str(folder)


def train_adapter(change: dict[str, Any], facts: Path, args: Arguments, folder: Path) -> str:
    change = dict(change)
    adapter: dict[str, Any] = {
        "data": rows_to_learn(folder / "rows", facts, args.data, change.pop("rows", None)),
        "backbone": args.backbone,
        "cache_activations": f"{args.output_dir}/activations",
        "activations_dtype": "bfloat16",
        "overwrite_output_dir": True,
        "adapter_hidden_size": 192,
        "adapter_num_hidden_layers": 1,
    }
    training = training_arguments(folder)
    for name, value in change.items():
        if hasattr(training, name):
            setattr(training, name, value)
        else:
            adapter[name] = value
    width = adapter["adapter_hidden_size"]
    adapter |= {"adapter_num_attention_heads": width // 64, "adapter_intermediate_size": 4 * width}
    pretrain("factual", PretrainingArguments(**adapter), training)
    return str(folder)


def training_arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        learning_rate=5e-4,
        num_train_epochs=3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def train_backbone(facts: Path, args: Arguments, folder: Path) -> str:
    """Fine-tunes the complete backbone on the same rows without an adapter, as an upper bound."""
    set_seed(0)
    rows = load_dataset("parquet", data_dir=str(facts))
    labels = sorted(set(rows["train"]["relation"]))
    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    data = encode(rows["train"], relation_features, tokenizer, labels=labels)
    model = KAdapterForRelationClassification.from_backbone(args.backbone, num_labels=len(labels))
    model.unfreeze_backbone()
    training = training_arguments(folder)
    training.learning_rate = 1e-4
    Trainer(model, training, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer)).train()
    model.save_pretrained(folder)
    return str(folder)


# ---- Probes ---------------------------------------------------------------------------------------------------------


class Probes:
    """The rows of the tasks, and linear probes on the states of a model."""

    def __init__(self, tasks: list[Task], args: Arguments):
        self.args = args
        self.cache = f"{args.output_dir}/activations"
        self.tasks = tasks
        self.tokenizer = AutoTokenizer.from_pretrained(args.backbone)
        self.rows: list[dict[str, Dataset]] = [
            {
                name: encode(rows, relation_features, self.tokenizer, labels=task.labels, markers=task.markers)
                for name, rows in (("train", task.train), ("test", task.test))
            }
            for task in tasks
        ]

    def measure(self, model: KAdapterForRelationClassification) -> dict[str, list[float]]:
        """The accuracies for each task and number of examples, one for each sample of the training examples."""
        scores: dict[str, list[float]] = {}
        for task, rows in zip(self.tasks, self.rows, strict=True):
            states = {name: states_at_markers(model, part, self.tokenizer, self.cache) for name, part in rows.items()}
            read = {name: torch.cat([*found.values()], dim=-1).flatten(1).numpy() for name, found in states.items()}
            scale = StandardScaler().fit(read["train"])
            read = {name: scale.transform(values) for name, values in read.items()}
            labels = {name: torch.tensor(part["labels"][:]).numpy() for name, part in rows.items()}
            for size in sorted({len(labels["train"]), min(self.args.few, len(labels["train"]))}, reverse=True):
                draws = self.args.draws if size < len(labels["train"]) else 1
                for draw in range(draws):
                    generator = torch.Generator().manual_seed(draw)
                    chosen = torch.randperm(len(labels["train"]), generator=generator)[:size].numpy()
                    probe = LogisticRegression(C=0.01, max_iter=300)
                    probe.fit(read["train"][chosen], labels["train"][chosen])
                    score = float(probe.score(read["test"], labels["test"]))
                    scores.setdefault(f"{task.name}, {size:,}", []).append(score)
        return scores


def run(args: Arguments) -> None:
    args.backbone = args.backbone or default_backbone()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    corpora, tasks = read_corpora(Path(args.data), folder, args.max_rows)
    facts = Path(corpora["factual"])
    held_out = load_dataset("parquet", data_dir=str(facts))["validation"].train_test_split(0.5, seed=0)
    own = Task("held-out rows", "micro_f1", held_out["train"], held_out["test"])
    semeval, unseen, seen = tasks
    semeval = replace(semeval, train=some(semeval.train, 3000), test=some(semeval.test, 1500))
    probes = Probes([own, seen, unseen, semeval], args)
    untrained = KnowledgeAdapterConfig(
        hidden_size=192, num_hidden_layers=1, num_attention_heads=3, intermediate_size=768
    )
    for variant in args.variants or [UNTRAINED, *VARIANTS]:
        if variant in results:
            continue
        started = time.monotonic()
        place = folder / variant.replace(" ", "-").replace("'", "")
        pretraining: dict[str, Any] = {}
        if variant == UNTRAINED:
            model = KAdapterForRelationClassification.from_backbone(args.backbone, {"factual": untrained})
        elif variant == BACKBONE:
            model = KAdapterForRelationClassification.from_pretrained(train_backbone(facts, args, place))
            model.freeze_backbone()
            model.add_knowledge_adapter("factual", untrained)
        else:
            model = KAdapterForRelationClassification.from_pretrained(
                train_adapter(VARIANTS[variant], facts, args, place)
            )
            pretraining = model.config.knowledge_adapters["factual"].provenance["metrics"]
        minutes = (time.monotonic() - started) / 60
        results[variant] = {"pretraining": pretraining, "minutes": minutes, "probes": probes.measure(model)}
        kept.write_text(json.dumps(results, indent=1), encoding="utf-8")
        console.print(f"{variant}: {(time.monotonic() - started) / 60:.1f} minutes", highlight=False)
    page = report(results, args)
    (folder / "variants.md").write_text(page, encoding="utf-8")
    console.print(page, markup=False, highlight=False)


def report(results: dict[str, dict[str, Any]], args: Arguments) -> str:
    """The gain of each variant over an untrained adapter, as a Markdown page."""
    lines = [
        "# Variants of the factual adapter",
        "",
        "Generated by `make knowledge-variants`. Accuracy of linear probes in percent: for an untrained",
    ]
    lines += ["adapter, and the gain of each variant over it.", ""]
    columns = list(next(iter(results.values()))["probes"])
    lines += [f"| | pre-training micro-F1 | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    baseline = results.get(UNTRAINED)
    for variant, result in results.items():
        own = result["pretraining"].get("eval_micro_f1")
        cells = [f"{100 * own:.1f}" if own else ""]
        for column in columns:
            value = 100 * statistics.mean(result["probes"][column])
            if baseline is None or variant == UNTRAINED:
                cells.append(f"{value:.1f}")
            else:
                cells.append(f"{value - 100 * statistics.mean(baseline['probes'][column]):+.1f}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    lines += ["", f"- {machine()}", f"- results with few examples: mean over {args.draws} samples"]
    lines += [f"- total training time: {sum(result['minutes'] for result in results.values()):.0f} minutes", ""]
    return "\n".join(lines)


def main() -> None:
    warnings.simplefilter("ignore", ConvergenceWarning)
    run_script(Arguments, __doc__, run)


if __name__ == "__main__":
    main()
