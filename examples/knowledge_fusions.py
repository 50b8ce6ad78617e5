"""
Compares fusions, and how concat starts, on two tasks of knowledge.py: SemEval-2010 Task 8, and the relations of Re-DocRED that
the factual adapter has not seen.

Each is trained with an untrained adapter, with the factual adapter, and with both the factual and the linguistic adapter,
which knowledge.py describes; the backbone and the adapters are frozen. All runs of a task have the same states; a seed chooses
the examples and the start.

    python examples/knowledge_fusions.py --data DIR --output_dir knowledge-output/fusions --factual knowledge-output/factual \
        --linguistic knowledge-output/linguistic

DIR is the same as for knowledge.py. Results are stored in results.json, from which an interrupted run is resumed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from knowledge import Arguments, fit, gains, mean_and_spread, pretrain_adapter, scores_of, with_states
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
from torch import nn
from transformers import AutoTokenizer, set_seed

from kadapter_hf import KAdapterForRelationClassification
from kadapter_hf.features import encode, relation_features


def random_start(fusion: Any) -> None:
    """torch's, as in the original."""
    for module in fusion.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()


# Each with its fusion, the fusion's configuration, and what sets another start.
FUSIONS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "concat, starts as the backbone": ("concat", {"start": 0.0}, None),
    "concat, random start": ("concat", {}, random_start),
    "concat, starts as H + 0.1 y": ("concat", {}, None),
    "concat, starts as H + y": ("concat", {"start": 1.0}, None),
    "add": ("add", {}, None),
    "add, scale 0.1": ("add", {"scale": 0.1}, None),
    "gate": ("gate", {}, None),
    "attention": ("attention", {}, None),
}
UNTRAINED, FACTUAL, BOTH = "untrained adapter", "factual adapter", "factual and linguistic"
SETS = {UNTRAINED: ["untrained"], FACTUAL: ["factual"], BOTH: ["factual", "linguistic"]}
console = Console()


@dataclass
class FusionArguments(Arguments):
    output_dir: str = flag("knowledge-output/fusions", "Output folder for the results.")
    fusions: list[str] | None = flag(None, "Names of the fusions to run. Default: all.")
    learning_rate: float = flag(1e-3, "Peak learning rate on the tasks.")
    seeds: int = flag(5, "Number of runs of each setting, each with a new head and another sample of examples.")


def compare(
    task: Task, adapters: dict[str, Any], tokenizer: Any, args: FusionArguments, results: list[dict[str, Any]]
) -> None:
    """Adds a record for each fusion, set of adapters and seed that `results` lacks."""
    labels, parts = task.labels, {"train": task.train, "test": task.test}
    kwargs = {"labels": labels, "markers": task.markers}
    data = {name: encode(rows, relation_features, tokenizer, **kwargs) for name, rows in parts.items()}
    whole = KAdapterForRelationClassification.from_backbone(args.backbone, adapters)
    states = {name: states_at_markers(whole, rows, tokenizer) for name, rows in data.items()}
    given = {
        chosen: {part: with_states(data[part], states[part], names) for part in data} for chosen, names in SETS.items()
    }
    size = len(data["train"])
    done = {(result["task"], result["learning_rate"], result["setting"], result["seed"]) for result in results}
    settings = [
        (fusion, names, seed)
        for seed in range(args.seeds)
        for fusion in args.fusions or FUSIONS
        for names in SETS
        if (task.name, args.learning_rate, f"{fusion}: {names}", seed) not in done
    ]
    for fusion, names, seed in track(settings, task.name, console=console):
        kind, values, start = FUSIONS[fusion]
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: args.few].tolist()
        rows = {"train": [given[names]["train"][place] for place in chosen], "test": given[names]["test"]}
        set_seed(seed)
        model = KAdapterForRelationClassification.from_backbone(
            args.backbone,
            {name: adapters[name] for name in SETS[names]},
            fusion=kind,
            fusion_config=values,
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
        )
        if start is not None:
            start(model.fusion)
        model.freeze_knowledge_adapters()
        score = fit(model, rows, task.metrics(), args, seed)[task.metric]
        record = {"task": task.name, "learning_rate": args.learning_rate, "setting": f"{fusion}: {names}"}
        results.append(record | {"seed": seed, "score": score})
        Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def report(results: list[dict[str, Any]], tasks: list[Task], args: FusionArguments) -> str:
    """The scores as a page of Markdown."""
    lines = ["# Comparison of fusions", "", "Generated by `make knowledge-fusions`.", ""]
    lines += [f"Mean ± standard deviation over {args.seeds} seeds, in percent. A gain is computed per seed.", ""]
    for task in tasks:
        chosen = (task.name, args.learning_rate)
        found = [result for result in results if (result["task"], result["learning_rate"]) == chosen]
        lines += [f"## {task.name}, {args.few} examples: {task.metric.replace('_f1', '-F1')}", ""]
        lines += [f"| fusion | {UNTRAINED} | {FACTUAL} | gain | {BOTH} | gain over factual |", "|---|" + "---|" * 5]
        for fusion in args.fusions or FUSIONS:
            untrained, factual, both = (f"{fusion}: {names}" for names in SETS)
            cells = [mean_and_spread(scores_of(found, setting)) for setting in (untrained, factual)]
            cells.append(mean_and_spread(gains(found, factual, untrained), "+"))
            cells += [mean_and_spread(scores_of(found, both)), mean_and_spread(gains(found, both, factual), "+")]
            lines.append(f"| {fusion} | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"- {machine()}", f"- backbone: {DEFAULT_BACKBONE}"]
    lines += [f"- {args.steps} steps of 64 examples, learning rate {args.learning_rate:g}", ""]
    return "\n".join(lines)


def run(args: FusionArguments) -> None:
    unknown = sorted(set(args.fusions or ()) - set(FUSIONS))
    if unknown:
        raise ValueError(f"there is no fusion {unknown[0]!r}; there are {list(FUSIONS)}")
    args.backbone = args.backbone or default_backbone()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "results.json"
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
    corpora, (semeval, unseen, _) = read_corpora(Path(args.data), folder, args.max_rows)
    adapters: dict[str, Any] = {
        name: getattr(args, name) or pretrain_adapter(name, corpora[name], args, folder) for name in SETS[BOTH]
    }
    adapters["untrained"] = args.adapter_config()
    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    for task in (unseen, semeval):
        compare(task, adapters, tokenizer, args, results)
    page = report(results, [unseen, semeval], args)
    (folder / "fusion-results.md").write_text(page, encoding="utf-8")
    console.print(page, markup=False, highlight=False)


def main() -> None:
    run_script(FusionArguments, __doc__, run)


if __name__ == "__main__":
    main()
