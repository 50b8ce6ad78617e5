"""
T-REx (Elsahar et al., 2018): Wikidata triples aligned with Wikipedia, in millions, from its raw JSON files.

Two stages, each a datatrove pipeline, so that they run on one machine, a Slurm cluster or Ray:

1. extract: a task for each file reads its documents and writes the usable triples as one Parquet shard, and their counts.
2. split: one task adds the counts up, drops rare relations and streams the shards into a training and a test set.
"""

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress

from .schema import Report, write_json
from .trex_steps import ExtractTrex, Split, SplitTrex


# After the steps, which say how to install what is missing.
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor  # isort: skip
from loguru import logger  # isort: skip


def prepare_trex(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    min_examples: int = 50,
    split: Split = "document",
    seed: int = 0,
    strict: bool = False,
    executor: Literal["local", "slurm", "ray"] = "local",
    workers: int = 1,
    partition: str = "normal",
    time: str = "24:00:00",
) -> Report | None:
    """
    T-REx as a training and a test set (90 to 10) of the relation schema, in Parquet files in `output`.

    What was extracted stays in `output/extracted`. A second call goes on where the first was interrupted, or, after a
    complete one, only splits anew.

    Args:
        folders: with T-REx's JSON files in them, or such files.
        min_examples: relations with fewer are left out, as "instance of" (P31) always is.
        split: "document" keeps all sentences of a document in one set; "example" is the original's way.
        workers: files that are read at a time, each held in memory; on Slurm, jobs that run at a time.
        partition, time: of the Slurm cluster, and the limit for each job.

    Returns:
        The report, or None with Slurm, where this only submits the jobs.

    Raises:
        ValueError: no files, or other ones than the output was begun with; nothing usable; with `strict`, a file or a
            triple that is not.
        ImportError: Ray is asked for and not installed.
    """
    output = Path(output).resolve()
    files = corpus_files(folders)
    extracted = output / "extracted"
    _remember(files, extracted)
    shards, reports = str(extracted / "shards"), str(extracted / "reports")
    last = SplitTrex(shards, reports, str(output), min_examples, split, seed, strict)
    kind, options = _executor(executor, partition, time)
    logs = extracted / "logs"
    first = kind(
        [ExtractTrex(files, shards, reports, strict)],
        tasks=len(files),
        workers=min(workers, len(files)),
        logging_dir=str(logs / "extract"),
        **options("trex-extract"),
    )
    # Never complete: the shards may be split anew, with other options.
    second = kind(
        [last],
        tasks=1,
        workers=1,
        depends=first,
        skip_completed=False,
        logging_dir=str(logs / "split"),
        **options("trex-split"),
    )
    if executor == "slurm":
        second.run()
        return None
    with _progress_bar(logs / "extract" / "completions", len(files)):
        second.run()
    return Report.load(output / "report.json")


def corpus_files(folders: Sequence[str | Path]) -> list[str]:
    """The JSON files in the folders, or the files themselves, in order of their names; a ValueError if there are none."""
    files = []
    for folder in map(Path, folders):
        if not folder.exists():
            raise ValueError(f"{folder} does not exist")
        files += [folder] if folder.is_file() else sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"no JSON files in {', '.join(map(str, folders))}")
    return [str(file.resolve()) for file in files]


def _remember(files: list[str], folder: Path) -> None:
    """A task that was completed is known by its number, so a folder goes with one list of files."""
    listing = [[file, Path(file).stat().st_size] for file in files]
    known = folder / "files.json"
    if known.exists() and json.loads(known.read_text(encoding="utf-8")) != listing:
        raise ValueError(f"{folder} was made from other files: choose another output folder, or delete this one")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(known, listing)


def _executor(kind: str, partition: str, time: str) -> tuple[Any, Callable[[str], dict[str, Any]]]:
    """One of datatrove's executors, and the options that it needs beside the common ones, given a job's name."""
    if kind == "slurm":
        activate = Path(sys.prefix, "bin", "activate")
        environment = {"venv_path": str(activate)} if activate.exists() else {}
        cluster = {"partition": partition, "time": time, "mem_per_cpu_gb": 4, **environment}
        return SlurmPipelineExecutor, lambda name: {"job_name": name, **cluster}
    # What datatrove writes to standard error would tear the progress bar; what fails is raised.
    logger.disable("datatrove")
    if kind == "ray":
        try:
            import ray  # noqa: F401
        except ImportError:
            raise ImportError('the executor ray needs Ray: pip install "datatrove[ray]"') from None
    return {"local": QuietExecutor, "ray": QuietRayExecutor}[kind], lambda name: {}


class QuietExecutor(LocalPipelineExecutor):
    """Says nothing on standard error, in its worker processes neither."""

    def _run_for_rank(self, *args: Any, **kwargs: Any) -> Any:
        logger.disable("datatrove")
        return super()._run_for_rank(*args, **kwargs)


class QuietRayExecutor(RayPipelineExecutor):
    """
    As quiet as that, and raises what a task raised, as it does.

    datatrove's own only logs it, and what depends on the task then waits for ever. So a task leaves its error as a text.
    """

    def run(self) -> None:
        errors = Path(self.logging_dir.path, "errors")
        shutil.rmtree(errors, ignore_errors=True)
        if not self.skip_completed:  # else a task that was complete once would seem so
            shutil.rmtree(errors.with_name("completions"), ignore_errors=True)
        super().run()
        for rank in self.get_incomplete_ranks(skip_completed=True):
            error = errors / f"{rank:05d}"
            if error.exists():
                raise ValueError(error.read_text(encoding="utf-8"))
            raise ChildProcessError(f"Ray lost task {rank} without an error: see its own logs")

    def _run_for_rank(self, rank: int, *args: Any, **kwargs: Any) -> Any:
        logger.disable("datatrove")
        try:
            return super()._run_for_rank(rank, *args, **kwargs)
        except Exception as error:
            with self.logging_dir.open(f"errors/{rank:05d}", "w", encoding="utf-8") as file:
                file.write(str(error))
            raise


@contextmanager
def _progress_bar(completions: Path, tasks: int) -> Iterator[None]:
    """Counts the files that datatrove leaves for complete tasks, which any kind of worker does."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("T-REx files", total=tasks)
            while not done.wait(0.5):
                bar.update(task, completed=sum(1 for _ in completions.glob("*")))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
