"""`kadapter prepare`: a corpus to Parquet files, the list of its labels and a report on what was left out."""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table

from ..corpora import parse_text, read_conllu, read_docred, read_fewrel, read_semeval, read_tacred
from ..corpora.schema import Report, write_json
from ._common import plain_errors


ROWS_SHOWN = 20

File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, show_default=False, help="The corpus.")]
Output = Annotated[Path, typer.Option(show_default=False, help="The folder to write to; it is made if need be.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first record that can't be used.")]
Names = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="JSON file of relation names by Wikidata number.")
]

prepare = typer.Typer(
    help="Turn a corpus into a data set that trains an adapter.\n\n"
    "The output folder has **train.parquet**, the labels (**relations.json** or **labels.json**) and **report.json**, "
    "which names what was left out and why. Read it with `datasets.load_dataset(FOLDER)`.",
    no_args_is_help=True,
)


class Split(str, Enum):
    document = "document"
    example = "example"


class Executor(str, Enum):
    local = "local"
    slurm = "slurm"
    ray = "ray"


@prepare.command()
def trex(
    folders: Annotated[
        list[Path],
        typer.Argument(exists=True, show_default=False, help="Folders of T-REx's JSON files, or such files."),
    ],
    output: Output,
    min_examples: Annotated[int, typer.Option(min=1, help="Leave out relations with fewer examples.")] = 50,
    split: Annotated[Split, typer.Option(help="What falls into train or test as a whole.")] = Split.document,
    seed: Annotated[int, typer.Option(help="Another seed is another split.")] = 0,
    executor: Annotated[Executor, typer.Option(help="Where to run.")] = Executor.local,
    workers: Annotated[
        int, typer.Option(min=1, help="Files read at a time, each held in memory.", show_default="number of CPUs")
    ] = os.cpu_count() or 1,
    partition: Annotated[str, typer.Option(help="Slurm: the partition.")] = "normal",
    time: Annotated[str, typer.Option(help="Slurm: the time limit of each job.")] = "24:00:00",
    strict: Strict = False,
) -> None:
    """
    T-REx: Wikidata triples aligned with Wikipedia, from the raw JSON files, split 90 to 10.

    Run it again after an interruption and it goes on where it was; after a complete run it only splits anew.

    Example: `kadapter prepare trex re-nlg/ --output data/trex --workers 8`
    """
    with plain_errors():
        from ..corpora.trex import prepare_trex

        report = prepare_trex(
            folders,
            output,
            min_examples=min_examples,
            split=split.value,
            seed=seed,
            strict=strict,
            executor=executor.value,
            workers=workers,
            partition=partition,
            time=time,
        )
        if report is None:
            Console().print(f"Submitted. When the jobs are through, {output} has train.parquet and report.json.")
        else:
            show(report, output)


@prepare.command()
def fewrel(file: File, output: Output, names: Names = None, strict: Strict = False) -> None:
    """
    FewRel: Wikidata relations in Wikipedia sentences.

    Example: `kadapter prepare fewrel train_wiki.json --names pid2name.json --output data/fewrel`
    """
    with plain_errors():
        write(*read_fewrel(file, names, strict), output, "relations.json")


@prepare.command()
def docred(file: File, output: Output, names: Names = None, strict: Strict = False) -> None:
    """
    DocRED and Re-DocRED: the pairs of entities that share a sentence.

    Example: `kadapter prepare docred train_revised.json --names rel_info.json --output data/re-docred`
    """
    with plain_errors():
        write(*read_docred(file, names, strict), output, "relations.json")


@prepare.command()
def tacred(file: File, output: Output, strict: Strict = False) -> None:
    """
    TACRED, TACREV and Re-TACRED, in their JSON form.

    Example: `kadapter prepare tacred train.json --output data/tacred`
    """
    with plain_errors():
        write(*read_tacred(file, strict), output, "relations.json")


@prepare.command()
def semeval(file: File, output: Output, strict: Strict = False) -> None:
    """
    SemEval-2010 Task 8: directed relations between nominals.

    Example: `kadapter prepare semeval TRAIN_FILE.TXT --output data/semeval`
    """
    with plain_errors():
        write(*read_semeval(file, strict), output, "relations.json")


@prepare.command()
def conllu(
    file: File,
    output: Output,
    pipeline: Annotated[
        str | None, typer.Option(help="Parse FILE, one text a line, with this spaCy pipeline.", show_default=False)
    ] = None,
    strict: Strict = False,
) -> None:
    """
    Dependency trees from a CoNLL-U file, or from raw text that spaCy parses.

    Example: `kadapter prepare conllu en_ewt-ud-train.conllu --output data/ewt`

    Example: `kadapter prepare conllu news.txt --pipeline en_core_web_sm --output data/news`
    """
    with plain_errors():
        if pipeline:
            made = parse_text(lines_of(file), pipeline, strict)
        else:
            made = read_conllu(file, strict)
        write(*made, output, "labels.json")


def lines_of(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8") from None


def write(dataset: Dataset, report: Report, output: Path, labels: str) -> None:
    """The data set, its labels and the report, as files in `output`; shows the report."""
    disable_progress_bars()
    output.mkdir(parents=True, exist_ok=True)
    draft = output / ".train.draft"
    dataset.to_parquet(str(draft))
    draft.replace(output / "train.parquet")
    write_json(output / labels, sorted(report.labels))
    report.save(output / "report.json")
    show(report, output)


def show(report: Report, output: Path) -> None:
    """Prints the most frequent labels, what was left out, and where the files are."""
    console = Console()
    table = Table("label", "count")
    table.columns[1].justify = "right"
    for label, count in report.labels.most_common(ROWS_SHOWN):
        table.add_row(label, f"{count:,}")
    if len(report.labels) > ROWS_SHOWN:
        table.add_row(f"… and {len(report.labels) - ROWS_SHOWN} more", "")
    console.print(table)
    if report.dropped:
        dropped = Table("left out because", "count", "the first")
        dropped.columns[1].justify = "right"
        for reason, count in report.dropped.most_common():
            dropped.add_row(reason, f"{count:,}", ", ".join(report.first_dropped[reason][:2]))
        console.print(dropped)
    console.print(
        f"{report.kept:,} rows kept, {report.dropped.total():,} left out. Written to {output}.", markup=False
    )
