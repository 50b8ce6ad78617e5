"""`kadapter prepare`: converts a corpus to Parquet files, a list of its labels and a report on dropped records."""

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from ._arguments import Split
from ._output import conclude, fail, print_table, running


if TYPE_CHECKING:
    from datasets import Dataset

    from kadapter_hf.corpora import Report


ROWS_SHOWN = 20
REPORT = "report.json"

Files = Annotated[
    list[Path],
    typer.Argument(
        exists=True, dir_okay=False, show_default=False, help="The files of the corpus, joined in this order."
    ),
]
Output = Annotated[
    Path, typer.Option(file_okay=False, show_default=False, help="The output folder, created if needed.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first unusable record.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the rows of an earlier run.")]
Names = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="JSON file that maps Wikidata numbers to relation names."),
]


SplitName = Annotated[Split, typer.Option(help="The split that the rows are for, which names the file written.")]

prepare = typer.Typer(
    help="Convert a corpus to a data set for training an adapter.\n\n"
    "The output folder contains **train.parquet**, the labels (**relations.json** or **labels.json**) and "
    "**report.json**, which lists dropped records and the reasons. Load it with `datasets.load_dataset(FOLDER)`.",
    no_args_is_help=True,
)


@prepare.command()
def trex(
    folders: Annotated[
        list[Path],
        typer.Argument(exists=True, show_default=False, help="JSON files of T-REx, or folders of them."),
    ],
    output: Output,
    min_examples: Annotated[int, typer.Option(min=1, help="Drop relations with fewer examples.")] = 50,
    split: Annotated[
        Literal["document", "example"], typer.Option(help="The unit to split into train and test.")
    ] = "document",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
    names: Names = None,
    executor: Annotated[Literal["local", "slurm", "ray"], typer.Option(help="Where to run.")] = "local",
    workers: Annotated[
        int, typer.Option(min=1, help="Files to read in parallel, each held in memory.", show_default="number of CPUs")
    ] = os.cpu_count() or 1,
    partition: Annotated[str, typer.Option(help="Slurm: partition.")] = "normal",
    time: Annotated[str, typer.Option(help="Slurm: time limit of each job.")] = "24:00:00",
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """
    T-REx: Wikidata triples aligned with Wikipedia, from the raw JSON files, split 90 to 10.

    An interrupted run is resumed by running the command again; after a complete run, `--overwrite` repeats only the split.

    Example: `kadapter prepare trex re-nlg/ --output data/trex --workers 8`
    """
    check_not_there(output, "train", overwrite)
    with running():
        from kadapter_hf.corpora.trex import prepare_trex  # needs packages of the extra `knowledge`

        report = prepare_trex(
            folders,
            output,
            min_examples=min_examples,
            split=split,
            seed=seed,
            names=names,
            strict=strict,
            executor=executor,
            workers=workers,
            partition=partition,
            time=time,
        )
        if report is None:
            conclude(f"Submitted. When the jobs have finished, {output} contains train.parquet and report.json.")
        else:
            show(report, output, "relation")


@dataclass(frozen=True)
class Corpus:
    """
    A corpus that is read from files, as a command of `kadapter prepare`.

    Attributes:
        reader: the name of a function of `kadapter_hf.corpora`: `read(path, strict=…)` returns a data set and a report.
        help: what the command's `--help` says.
        example: the arguments of the example in `--help`.
        takes_names: whether the reader takes `names`, and the command `--names`.
    """

    reader: str
    help: str
    example: str
    takes_names: bool = False


# The commands except for those with options of their own (trex, conllu).
CORPORA: dict[str, Corpus] = {
    "fewrel": Corpus(
        "read_fewrel",
        "FewRel: Wikidata relations in Wikipedia sentences.",
        "train_wiki.json --names pid2name.json --output data/fewrel",
        takes_names=True,
    ),
    "docred": Corpus(
        "read_docred",
        "DocRED and Re-DocRED: pairs of entities in the same sentence.",
        "train_revised.json --names rel_info.json --output data/re-docred",
        takes_names=True,
    ),
    "tacred": Corpus(
        "read_tacred", "TACRED, TACREV and Re-TACRED, in JSON format.", "train.json --output data/tacred"
    ),
    "semeval": Corpus(
        "read_semeval",
        "SemEval-2010 Task 8: directed relations between nominals.",
        "TRAIN_FILE.TXT --output data/semeval",
    ),
}


def add_command(name: str, corpus: Corpus) -> None:
    """Adds the command for a corpus."""

    def convert(
        files: Files,
        output: Output,
        names: Names = None,
        split: SplitName = "train",
        strict: Strict = False,
        overwrite: Overwrite = False,
    ) -> None:
        options = {"strict": strict} if names is None else {"names": names, "strict": strict}
        check_not_there(output, split, overwrite)
        from kadapter_hf import corpora

        with running():
            read = getattr(corpora, corpus.reader)
            write(files, [read(file, **options) for file in files], output, split)

    def convert_without_names(
        files: Files,
        output: Output,
        split: SplitName = "train",
        strict: Strict = False,
        overwrite: Overwrite = False,
    ) -> None:
        convert(files, output, split=split, strict=strict, overwrite=overwrite)

    help = f"{corpus.help}\n\nExample: `kadapter prepare {name} {corpus.example}`"
    prepare.command(name, help=help)(convert if corpus.takes_names else convert_without_names)


for name, corpus in CORPORA.items():
    add_command(name, corpus)


@prepare.command()
def conllu(
    files: Files,
    output: Output,
    pipeline: Annotated[
        str | None,
        typer.Option(help="Parse FILES, with one text per line, with this spaCy pipeline.", show_default=False),
    ] = None,
    split: SplitName = "train",
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """
    Dependency trees from a CoNLL-U file, or from raw text that spaCy parses.

    Example: `kadapter prepare conllu en_ewt-ud-train.conllu --output data/ewt`

    Example: `kadapter prepare conllu news.txt --pipeline en_core_web_sm --output data/news`
    """
    check_not_there(output, split, overwrite)
    from kadapter_hf.corpora import parse_text, read_conllu
    from kadapter_hf.corpora.files import read_text

    with running():
        if pipeline:
            made = [parse_text(read_text(file).splitlines(), pipeline, strict) for file in files]
        else:
            made = [read_conllu(file, strict) for file in files]
        write(files, made, output, split)


def check_not_there(output: Path, split: Split, overwrite: bool) -> None:
    """Exits if the rows of this split would be replaced unasked."""
    file = output / f"{split}.parquet"
    if file.exists() and not overwrite:
        fail(f"'{file}' exists: replace it with --overwrite, or choose another --output.")


def write(files: list[Path], made: "list[tuple[Dataset, Report]]", output: Path, split: Split) -> None:
    """Writes the rows of all files as one split to `output`, with labels and a report, and prints the report."""
    from datasets import concatenate_datasets, disable_progress_bars

    from kadapter_hf.corpora import Report
    from kadapter_hf.corpora.files import write_json

    disable_progress_bars()
    dataset, report = concatenate_datasets([rows for rows, _ in made]), Report()
    for file, (_, of_file) in zip(files, made, strict=True):
        report.add(of_file if len(files) == 1 else of_file.renamed(file.name))
    output.mkdir(parents=True, exist_ok=True)
    draft = output / f".{split}.draft"
    dataset.to_parquet(str(draft))
    draft.replace(output / f"{split}.parquet")
    reports = {split: vars(report)} | {
        other: content for other, content in read_reports(output).items() if other != split
    }
    labels = {label for content in reports.values() for label in content["labels"]}
    relations = "relation" in dataset.column_names
    write_json(output / ("relations.json" if relations else "labels.json"), sorted(labels))
    write_json(output / REPORT, reports.pop("train", {}) | reports)
    show(report, output, "relation" if relations else "dependency")


def read_reports(output: Path) -> dict[str, dict[str, Any]]:
    """
    The reports on the splits that `output` has. In the file, the report on the training rows is at the top level, and contains
    those on the other splits.
    """
    if not (output / REPORT).exists():
        return {}
    content = json.loads((output / REPORT).read_text(encoding="utf-8"))
    reports = {split: content.pop(split) for split in get_args(Split) if split in content}
    reports |= {"train": content} if content else {}
    return {split: report for split, report in reports.items() if (output / f"{split}.parquet").exists()}


def show(report: "Report", output: Path, schema: str) -> None:
    """Prints the most frequent labels, the dropped records, and the location of the files."""
    from rich.table import Table
    from rich.text import Text

    from kadapter_hf.messages import shortened

    table = Table("label", "count")
    table.columns[1].justify = "right"
    for label, count in report.labels.most_common(ROWS_SHOWN):
        table.add_row(Text(shortened(label)), f"{count:,}")
    if len(report.labels) > ROWS_SHOWN:
        table.add_row(f"… and {len(report.labels) - ROWS_SHOWN} more", "")
    print_table(table)
    if report.dropped:
        dropped = Table("dropped because", "count", "first records")
        dropped.columns[1].justify = "right"
        for reason, count in report.dropped.most_common():
            dropped.add_row(reason, f"{count:,}", Text(", ".join(report.first_dropped[reason][:2])))
        print_table(dropped)
    objective, folder = {"relation": "factual", "dependency": "linguistic"}[schema], shlex.quote(str(output))
    conclude(
        f"{report.kept:,} rows kept, {report.dropped.total():,} dropped. Written to {folder}. Train on it: "
        f"`kadapter pretrain {objective} --data {folder} --output_dir {objective}-adapter`."
    )
