"""
The paper's comparison: a backbone alone, with untrained adapters, and with each set of trained ones, on several tasks and
seeds, beside the published figures (paper, tables 2 to 5).
"""

import csv
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from .corpora.schema import read_json
from .figures import new_figure, warn_without_matplotlib
from .finetuning import combination, find_task, finetune, parser
from .named_adapters import named_adapters
from .runs import Parser
from .tasks import TASKS


COLUMNS = ("task", "metric", "model", "runs", "mean", "standard_deviation", "paper", "reproduced")
BACKBONE, MULTITASK, UNTRAINED = "backbone", "multitask", "untrained"


@dataclass
class ReproductionArguments:
    """What is compared. All other flags are those of `kadapter finetune` and hold for every run."""

    data: list[str] = field(
        metadata={
            "help": "The tasks and their data as TASK=SOURCE, where SOURCE is what `kadapter finetune --data` takes."
        }
    )
    adapters: list[str] = field(
        metadata={
            "help": "The trained adapters (SOURCE or NAME=SOURCE): each is used alone, and all of them together."
        }
    )
    output_dir: str = field(metadata={"help": "The folder for the runs and their results."})
    multitask: str | None = field(
        default=None,
        metadata={
            "help": "A backbone that was trained on the adapters' tasks itself: the paper's RoBERTa + multitask."
        },
    )
    models: list[str] | None = field(
        default=None,
        metadata={
            "help": "Compare only these: backbone, multitask, untrained, names of adapters, or names joined by +."
        },
    )
    seeds: list[int] = field(default_factory=lambda: [42], metadata={"help": "A run for each of these seeds."})

    def sources(self) -> dict[str, str]:
        """The data of each task."""
        return dict(part.partition("=")[::2] for part in self.data)

    def __post_init__(self):
        for name, source in self.sources().items():
            find_task(name)
            if not source:
                raise ValueError(f"--data takes TASK=SOURCE, but there is no source for '{name}'")


@dataclass(frozen=True)
class Run:
    """A run of one model on one task."""

    task: str
    model: str
    seed: int
    folder: Path
    flags: tuple[str, ...]


def planned(arguments: ReproductionArguments, flags: Sequence[str]) -> list[Run]:
    """
    All runs, task by task.

    Raises:
        ValueError: a model is unknown.
    """
    models = flags_by_model(arguments)
    unknown = [name for name in arguments.models or [] if name not in models]
    if unknown:
        raise ValueError(f"--models {' '.join(unknown)}: there are {', '.join(models)}.")
    return [
        Run(task, name, seed, folder, ("--data", source, *models[name], "--seed", str(seed), *flags))
        for task, source in arguments.sources().items()
        for name in arguments.models or models
        for seed in arguments.seeds
        for folder in [Path(arguments.output_dir, task, name, f"seed-{seed}")]
    ]


def flags_by_model(arguments: ReproductionArguments) -> dict[str, tuple[str, ...]]:
    """The flags of `kadapter finetune` for each model of the comparison."""
    found = named_adapters(arguments.adapters)
    adapters = {name: f"{name}={source}" for name, (source, _) in found.items()}
    first, config = next(iter(found.values()))
    backbone = ("--backbone", str(config.backbone_name_or_path))
    models: dict[str, tuple[str, ...]] = {BACKBONE: backbone}
    if arguments.multitask is not None:
        models[MULTITASK] = ("--backbone", arguments.multitask)
    models[UNTRAINED] = ("--untrained_adapters", str(len(adapters)), "--untrained_like", first)
    models |= {name: ("--adapters", source) for name, source in adapters.items()}
    if len(adapters) > 1:
        models["+".join(adapters)] = ("--adapters", *adapters.values())
    return models


def reproduce(arguments: ReproductionArguments, flags: Sequence[str], report: Callable[[str], object] = print) -> Path:
    """
    Does all runs that are not done yet, and writes `results.md`, `results.csv` and `results.png` after each of them.

    A run that was stopped goes on from its last checkpoint. Of a finished run, the checkpoints and weights are deleted.

    Args:
        report: called with a line about each run.

    Returns:
        The path of `results.md`.
    """
    warn_without_matplotlib("results.png")
    runs, output = planned(arguments, flags), Path(arguments.output_dir)
    published = published_names(arguments)  # which reads the adapters
    output.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs, start=1):
        if not (run.folder / "metrics.json").exists():
            report(f"Run {number} of {len(runs)}: {run.task}, {run.model}, seed {run.seed}")
            resume = run.folder.is_dir() and get_last_checkpoint(str(run.folder)) is not None
            more = ("--resume_from_checkpoint" if resume else "--overwrite_output_dir", "true")
            task = TASKS[run.task]
            parsed = parser(run.task).parse([*run.flags, "--output_dir", str(run.folder), *more])
            finetune(task, *parsed)
            _remove_weights(run.folder)
        write_tables(runs, published, output)
    return output / "results.md"


def _remove_weights(folder: Path) -> None:
    """Dozens of models would fill a disk, and are not needed for the comparison."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix in (".safetensors", ".bin", ".py"):
            path.unlink()


def results_of(runs: Sequence[Run]) -> dict[tuple[str, str], list[float]]:
    """The metric on the test split (or validation, without one) of each finished run, in percent, by task and model."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        path = run.folder / "metrics.json"
        if path.exists():
            metrics: dict[str, Any] = read_json(path, dict)
            split = metrics.get("test", metrics["validation"])
            found.setdefault((run.task, run.model), []).append(100 * split[TASKS[run.task].metric])
    return found


def write_tables(runs: Sequence[Run], published: dict[str, str], output: Path) -> None:
    """Writes the results of all finished runs as Markdown, CSV and a figure; `published` as `published_names` returns."""
    found = results_of(runs)
    tasks = list(dict.fromkeys(run.task for run in runs))
    models = list(dict.fromkeys(run.model for run in runs))
    rows: list[dict[str, Any]] = []
    for task in tasks:
        for model in models:
            values = found.get((task, model))
            if values:
                rows.append(
                    {
                        "task": task,
                        "metric": TASKS[task].metric,
                        "model": model,
                        "runs": len(values),
                        "mean": round(statistics.fmean(values), 2),
                        "standard_deviation": round(statistics.stdev(values), 2) if len(values) > 1 else "",
                        "paper": TASKS[task].published.get(published[model], ""),
                        "reproduced": TASKS[task].reproduced.get(published[model], ""),
                    }
                )
    with open(output / "results.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| task | metric | model | runs | here | paper | reproductions |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        spread = f" ± {row['standard_deviation']}" if row["standard_deviation"] != "" else ""
        measured = f"{row['mean']:.1f}{spread}"
        cells = [row["task"], row["metric"].replace("_", " "), row["model"], row["runs"], measured]
        cells += [row["paper"] or "–", row["reproduced"] or "–"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    (output / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(tasks, models, found, output / "results.png")


def published_names(arguments: ReproductionArguments) -> dict[str, str]:
    """The key of each model in `Task.published`; one that the paper does not have has none."""
    configs = {name: config for name, (_, config) in named_adapters(arguments.adapters).items()}
    names = {BACKBONE: "", MULTITASK: MULTITASK, UNTRAINED: UNTRAINED}
    for model in flags_by_model(arguments):
        if model not in names:
            names[model] = combination({name: configs[name] for name in model.split("+")}) or "not in the paper"
    return names


def draw(tasks: Sequence[str], models: Sequence[str], found: dict[tuple[str, str], list[float]], path: Path) -> None:
    """Draws a bar for each model, with the standard deviation, by task."""
    figure = new_figure(max(2 * len(tasks), 5), 4)
    if figure is None:
        return
    axes = figure.add_subplot()
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        places = [place for place, task in enumerate(tasks) if (task, model) in found]
        values = [found[tasks[place], model] for place in places]
        axes.bar(
            [place + (number - (len(models) - 1) / 2) * width for place in places],
            [statistics.fmean(of_one) for of_one in values],
            width,
            yerr=[statistics.stdev(of_one) if len(of_one) > 1 else 0 for of_one in values],
            label=model,
        )
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set(ylabel="test metric, percent")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def parse(flags: Sequence[str]) -> tuple[ReproductionArguments, list[str]]:
    """The arguments, and the flags that are passed on to each run; exits with code 2 if they are wrong."""
    made = Parser(
        ReproductionArguments,
        prog="kadapter reproduce",
        description="Compares a backbone alone, with untrained and with trained adapters on tasks. All other flags are passed "
        "on to `kadapter finetune`. Finished runs are not repeated, and a stopped one goes on, if the command is given again.",
    )
    arguments, rest = made.parse_known(flags)
    return arguments, rest
