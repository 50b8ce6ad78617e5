"""
The paper's comparison: a backbone alone, with untrained adapters, and with each set of trained ones, on several tasks and
seeds, beside the published figures (paper, tables 2 to 5).
"""

import csv
import shlex
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from kadapter_cli import _names
from kadapter_cli._source import flag

from . import finetuning, probing
from .corpora.files import read_json
from .figures import new_figure, warn_without_matplotlib
from .finetuning import FinetuningArguments, combination, finetune, new_model
from .finetuning_data import load_data
from .lama import PUBLISHED
from .modeling.heads_kadapter import KAdapterForMaskedLM
from .modeling.reading_kadapter import read_adapter
from .modeling.sources_kadapter import adapter_file
from .named_adapters import named_adapters
from .runs import Parser
from .tasks import TASKS


logger = logging.get_logger(__name__)

COLUMNS = ("task", "metric", "model", "runs", "mean", "standard_deviation", "paper", "reproduced")
BACKBONE, MULTITASK, UNTRAINED = "backbone", "multitask", "untrained"
LAMA = "lama"


@dataclass
class ReproductionArguments:
    """The comparison. All other flags are those of `kadapter finetune`, and apply to every run except for lama's."""

    data: list[str] = field(
        metadata={
            "help": "The tasks and their data as TASK=SOURCE, where SOURCE is what `kadapter finetune --data` takes; and "
            "lama=SOURCE, for which it is what `kadapter probe --data` takes."
        }
    )
    adapters: list[str] = field(
        metadata={
            "help": "The trained adapters (SOURCE or NAME=SOURCE): each is used alone, and all of them together."
        }
    )
    output_dir: str = field(metadata={"help": "The folder for the runs and their results."})
    multitask: str | None = flag(
        None, "A backbone that was trained on the adapters' tasks itself: the paper's RoBERTa + multitask."
    )
    models: list[str] | None = flag(
        None, "Compare only these: backbone, multitask, untrained, names of adapters, or names joined by +."
    )
    seeds: list[int] = field(default_factory=lambda: [42], metadata={"help": "A run for each of these seeds."})
    probe_flags: str = flag(
        "",
        "The flags of `kadapter probe` for lama, as one argument, e.g. the paper's protocol: '--protocol new-head "
        "--train_text wiki.train.raw'.",
    )

    def sources(self) -> dict[str, str]:
        """The data of each task."""
        return dict(part.partition("=")[::2] for part in self.data)

    def __post_init__(self):
        known = [*_names.TASKS, LAMA]
        for name, source in self.sources().items():
            if name not in known:
                raise ValueError(
                    f"there is no task '{name}'; there are {', '.join(known)}.{_names.did_you_mean(name, known)}"
                )
            if not source:
                raise ValueError(f"--data takes TASK=SOURCE, but there is no source for '{name}'")
        if self.probe_flags and LAMA not in self.sources():
            raise ValueError("--probe_flags are for lama, which is not among the tasks of --data")


@dataclass(frozen=True)
class Run:
    """
    A run of one model on one task.

    Attributes:
        model_flags: those of `kadapter finetune` that make the model.
        flags: further ones.
    """

    task: str
    model: str
    seed: int
    folder: Path
    source: str
    model_flags: Sequence[str]
    flags: Sequence[str]

    @property
    def metrics(self) -> Path:
        """The file that is written last."""
        return self.folder / "metrics.json"

    def read_data(self) -> None:
        """Reads the data as the run does. Raises a ValueError if it does not fit the task."""
        arguments, options, training = self._parsed()
        load_data(TASKS[self.task], arguments, options, training.seed)

    def start(self) -> None:
        """Runs, from the last checkpoint of a run that was stopped."""
        resume = self.folder.is_dir() and get_last_checkpoint(str(self.folder)) is not None
        finetune(
            TASKS[self.task], *self._parsed("--resume_from_checkpoint" if resume else "--overwrite_output_dir", "true")
        )

    def _parsed(self, *more: str) -> tuple[Any, ...]:
        flags = ["--data", self.source, *self.model_flags, "--seed", str(self.seed), *self.flags]
        return finetuning.parser(self.task).parse([*flags, "--output_dir", str(self.folder), *more])

    def results(self) -> dict[str, float]:
        """The metric on the test split (or validation, without one) in percent, by row of the table."""
        metrics: dict[str, Any] = read_json(self.metrics, dict)
        return {self.task: 100 * metrics.get("test", metrics["validation"])[TASKS[self.task].metric]}


class LamaRun(Run):
    """A run of LAMA; `flags` are those of `kadapter probe`. The table has a row for each of LAMA's parts."""

    def read_data(self) -> None:
        probing.load_data(self._probed("model"))  # which is not read

    def start(self) -> None:
        (model,) = Parser(FinetuningArguments, prog="kadapter finetune").parse(
            ["--data", self.source, *self.model_flags]
        )
        if self.model in (BACKBONE, MULTITASK):
            probing.probe(self._probed(model.backbone))
            return
        set_seed(self.seed)
        folder = self.folder / "model"
        new_model(KAdapterForMaskedLM, model).save_pretrained(folder)
        probing.probe(self._probed(str(folder)), with_backbone=False)

    def _probed(self, model: str) -> probing.ProbingArguments:
        flags = ["--model", model, "--data", self.source, "--output_dir", str(self.folder), "--seed", str(self.seed)]
        (arguments,) = probing.parser("kadapter probe").parse([*self.flags, *flags])
        return arguments

    def results(self) -> dict[str, float]:
        name = "backbone" if self.model in (BACKBONE, MULTITASK) else "kadapter"
        parts: dict[str, Any] = read_json(self.metrics, dict)["parts"]
        return {f"{LAMA} {part}": 100 * of_part[name]["p_at_1"] for part, of_part in parts.items()}


def published_of(row: str) -> tuple[str, Mapping[str, float], Mapping[str, str]]:
    """The metric of a row of the table, and the figures of the paper and of others by combination of adapters."""
    if row in TASKS:
        return TASKS[row].metric, TASKS[row].published, TASKS[row].reproduced
    return "P@1", PUBLISHED.get(row.removeprefix(f"{LAMA} "), {}), {}


def planned(arguments: ReproductionArguments, flags: Sequence[str]) -> list[Run]:
    """
    All runs, task by task.

    Raises:
        ValueError: a model is unknown, or flags are for no task.
    """
    if flags and not arguments.sources().keys() - {LAMA}:
        raise ValueError(f"{shlex.join(flags)}: the flags for {LAMA} belong in --probe_flags.")
    models = flags_by_model(arguments)
    unknown = [name for name in arguments.models or [] if name not in models]
    if unknown:
        raise ValueError(f"--models {' '.join(unknown)}: there are {', '.join(models)}.")
    probe_flags = shlex.split(arguments.probe_flags)
    return [
        LamaRun(task, name, seed, folder, source, models[name], probe_flags)
        if task == LAMA
        else Run(task, name, seed, folder, source, models[name], flags)
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


def reproduce(arguments: ReproductionArguments, flags: Sequence[str]) -> Path:
    """
    Does all runs that are not done yet, and writes `results.md`, `results.csv` and `results.png` after each of them.

    The adapters and the data of each task are read before the first run, so that a bad file is reported now and not after
    hours. A run that was stopped is resumed from its last checkpoint. The weights of a finished run are deleted.

    Returns:
        The path of `results.md`.
    """
    warn_without_matplotlib("results.png")
    runs, output = planned(arguments, flags), Path(arguments.output_dir)
    for name, (source, _) in named_adapters(arguments.adapters).items():
        read_adapter(adapter_file(source, name))
    published = published_names(arguments)  # also reads the adapters
    output.mkdir(parents=True, exist_ok=True)
    for run in {run.task: run for run in runs if not run.metrics.exists()}.values():  # one of each task
        run.read_data()
    for number, run in enumerate(runs, start=1):
        if not run.metrics.exists():
            logger.info(f"Run {number} of {len(runs)}: {run.task}, {run.model}, seed {run.seed}")
            run.start()
            _remove_weights(run.folder)
        write_tables(runs, published, output)
    return output / "results.md"


def _remove_weights(folder: Path) -> None:
    """Removes checkpoints and weights: dozens of models would fill a disk, and the comparison does not need them."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix in (".safetensors", ".bin", ".py"):
            path.unlink()


def results_of(runs: Sequence[Run]) -> dict[tuple[str, str], list[float]]:
    """The results of each finished run, by row of the table and model."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run.metrics.exists():
            for row, value in run.results().items():
                found.setdefault((row, run.model), []).append(value)
    return found


def write_tables(runs: Sequence[Run], published: dict[str, str], output: Path) -> None:
    """Writes the results of all finished runs as Markdown, CSV and a figure; `published` as `published_names` returns."""
    found = results_of(runs)
    tasks = list(dict.fromkeys(task for task, _ in found))
    models = list(dict.fromkeys(run.model for run in runs))
    rows: list[dict[str, Any]] = []
    for task in tasks:
        metric, of_paper, of_others = published_of(task)
        for model in models:
            values = found.get((task, model))
            if values:
                rows.append(
                    {
                        "task": task,
                        "metric": metric,
                        "model": model,
                        "runs": len(values),
                        "mean": round(statistics.fmean(values), 2),
                        "standard_deviation": round(statistics.stdev(values), 2) if len(values) > 1 else "",
                        "paper": of_paper.get(published[model], ""),
                        "reproduced": of_others.get(published[model], ""),
                    }
                )
    lines = ["| task | metric | model | runs | here | paper | reproductions |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        spread = f" ± {row['standard_deviation']}" if row["standard_deviation"] != "" else ""
        measured = f"{row['mean']:.1f}{spread}"
        cells = [row["task"], row["metric"].replace("_", " "), row["model"], row["runs"], measured]
        cells += [row["paper"] or "–", row["reproduced"] or "–"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    # Whole files replace whole files, as several processes may share the folder.
    with TemporaryDirectory(dir=output) as folder:
        new = Path(folder)
        with open(new / "results.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        (new / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        draw(tasks, models, found, new / "results.png")
        for path in new.iterdir():
            path.replace(output / path.name)


def published_names(arguments: ReproductionArguments) -> dict[str, str]:
    """The key of each model in `Task.published`, which has no figures for models that are not in the paper."""
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
            [statistics.fmean(runs) for runs in values],
            width,
            yerr=[statistics.stdev(runs) if len(runs) > 1 else 0 for runs in values],
            label=model,
        )
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set(ylabel="metric, percent")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def parser() -> Parser:
    """The parser of the flags; those that it doesn't know are passed on to each run."""
    return Parser(
        ReproductionArguments,
        prog="kadapter reproduce",
        description="Compares a backbone alone, with untrained and with trained adapters on tasks. All other flags are passed "
        "on to `kadapter finetune`. Finished runs are not repeated, and a stopped one goes on, if the command is given again.",
    )
