"""
T-REx (Elsahar et al., 2018): millions of Wikidata triples aligned with Wikipedia, from its raw JSON files.

Two stages, each a datatrove pipeline that runs on one machine, on a Slurm cluster or on Ray:

1. extract: one task per file reads its documents and writes a Parquet shard of usable triples, and their counts.
2. split: one task sums the counts, drops rare relations and streams the shards into a training and a test set.
"""

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from transformers.utils import logging

from ..figures import warn_without_matplotlib
from .fewrel import relation_names
from .files import write_json
from .schema import Report
from .trex_steps import ExtractTrex, Split, SplitTrex


# Imported after the steps, whose errors tell how to install missing packages.
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor  # isort: skip
from loguru import logger  # isort: skip


def prepare_trex(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    min_examples: int = 50,
    split: Split = "document",
    seed: int = 0,
    names: str | Path | None = None,
    strict: bool = False,
    executor: Literal["local", "slurm", "ray"] = "local",
    workers: int = 1,
    partition: str = "normal",
    time: str = "24:00:00",
) -> Report | None:
    """
    Converts T-REx to a training and a test set (90 to 10) of the relation schema, as Parquet files in `output`.

    Extracted triples are kept in `output/extracted`. Another call resumes an interrupted run; after a complete run, it only
    repeats the split.

    Args:
        folders: JSON files of T-REx, or folders of them.
        min_examples: relations with fewer examples are dropped; "instance of" (P31) is always dropped.
        split: "document" keeps all sentences of a document in the same set; "example" splits like the original.
        names: JSON file that maps Wikidata numbers to names of relations, e.g. FewRel's pid2name.json or DocRED's
            rel_info.json. Relations that it lacks keep their numbers.
        workers: number of files to read in parallel, each held in memory; on Slurm, the number of parallel jobs.
        partition, time: the partition of the Slurm cluster, and the time limit of each job.

    Returns:
        The report; None with Slurm, where the call only submits the jobs.

    Raises:
        ValueError: there are no files; the output folder was created from other files; nothing is usable; with `strict`, a
            file or triple is unusable.
        ImportError: Ray was requested and is not installed.
    """
    warn_without_matplotlib("relations.png")
    output = Path(output).resolve()
    files = corpus_files(folders)
    is_new, extracted = not output.exists(), output / "extracted"
    _remember(files, extracted)
    shards, reports = str(extracted / "shards"), str(extracted / "reports")
    last = SplitTrex(shards, reports, str(output), min_examples, split, seed, relation_names(names), strict)
    kind, options = _executor(executor, partition, time)
    logs = extracted / "logs"
    first = kind(
        [ExtractTrex(files, shards, reports, strict)],
        tasks=len(files),
        workers=min(workers, len(files)),
        logging_dir=str(logs / "extract"),
        **options("trex-extract"),
    )
    # Never skipped: the split may be repeated with different options.
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
    try:
        with _progress_bar(logs / "extract" / "completions", len(files)):
            second.run()
    except ValueError:
        if is_new and not any(Report.load(path).kept for path in Path(reports).glob("*.json")):
            # There is nothing that another run could resume.
            shutil.rmtree(output)
        raise
    return Report.load(output / "report.json")


def corpus_files(folders: Sequence[str | Path]) -> list[str]:
    """The JSON files in the folders, sorted by name, and files given directly; raises a ValueError if there are none."""
    files = []
    for folder in map(Path, folders):
        if not folder.exists():
            raise ValueError(f"{folder} does not exist")
        files += [folder] if folder.is_file() else sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"no JSON files in {', '.join(map(str, folders))}")
    return [str(file.resolve()) for file in files]


def _remember(files: list[str], folder: Path) -> None:
    """Checks that the list of files has not changed, because completed tasks are identified by their number."""
    listing = [[file, Path(file).stat().st_size] for file in files]
    known = folder / "files.json"
    if known.exists() and json.loads(known.read_text(encoding="utf-8")) != listing:
        raise ValueError(f"{folder} was created from other files: choose another output folder, or delete this one")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(known, listing)


def _executor(kind: str, partition: str, time: str) -> tuple[Any, Callable[[str], dict[str, Any]]]:
    """One of datatrove's executors, and a function from a job's name to its specific options."""
    if kind == "slurm":
        activate = Path(sys.prefix, "bin", "activate")
        environment = {"venv_path": str(activate)} if activate.exists() else {}
        cluster = {"partition": partition, "time": time, "mem_per_cpu_gb": 4, **environment}
        return SlurmPipelineExecutor, lambda name: {"job_name": name, **cluster}
    # datatrove's logs would disrupt the progress bar; errors are raised.
    logger.disable("datatrove")
    if kind == "ray":
        try:
            import ray  # noqa: F401
        except ImportError:
            raise ImportError('the executor ray needs Ray: pip install "datatrove[ray]"') from None
    return {"local": QuietExecutor, "ray": QuietRayExecutor}[kind], lambda name: {}


class QuietExecutor(LocalPipelineExecutor):
    """Does not write to standard error, not even in worker processes."""

    def _run_for_rank(self, *args: Any, **kwargs: Any) -> Any:
        logger.disable("datatrove")
        return super()._run_for_rank(*args, **kwargs)


class QuietRayExecutor(RayPipelineExecutor):
    """
    Like `QuietExecutor`, and raises the errors of tasks, as it does.

    datatrove's Ray executor only logs errors, and dependent tasks then wait forever. Here, tasks write errors to files.
    """

    def run(self) -> None:
        errors = Path(self.logging_dir.path, "errors")
        shutil.rmtree(errors, ignore_errors=True)
        if not self.skip_completed:  # otherwise a task completed by an earlier run would count as completed
            shutil.rmtree(errors.with_name("completions"), ignore_errors=True)
        super().run()
        for rank in self.get_incomplete_ranks(skip_completed=True):
            error = errors / f"{rank:05d}"
            if error.exists():
                raise ValueError(error.read_text(encoding="utf-8"))
            raise ChildProcessError(f"Ray lost task {rank} without an error: see Ray's logs")

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
    """Counts the files that datatrove writes for completed tasks, which works for all executors."""
    done = threading.Event()

    def watch() -> None:
        shown = 0
        with logging.tqdm(desc="T-REx files", total=tasks, leave=False, dynamic_ncols=True) as bar:
            while not done.wait(0.5):
                found = sum(1 for _ in completions.glob("*"))
                bar.update(found - shown)
                shown = found

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
