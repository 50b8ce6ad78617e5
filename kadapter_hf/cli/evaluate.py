"""`kadapter evaluate` and `kadapter predict`: runs a fine-tuned model on rows of a task."""

from pathlib import Path
from typing import Annotated

import typer

from ._common import AsJson, checked_task, plain_errors, print_json


TaskName = Annotated[
    str,
    typer.Argument(
        callback=checked_task, show_default=False, help="The task; `kadapter finetune --help` lists all of them."
    ),
]
Model = Annotated[str, typer.Option(help="The fine-tuned model: a folder, or a repository on the Hub.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per batch.")]
SkipBadRows = Annotated[
    bool, typer.Option(help="Skip and count rows that can't be used, instead of stopping at the first one.")
]


def evaluate(
    task: TaskName,
    model: Model,
    data: Annotated[
        str, typer.Option(help="A file; or a folder or a data set on the Hub, of which --split is evaluated.")
    ],
    split: Annotated[
        str, typer.Option(help="train, validation or test. Files by themselves are used as a whole.")
    ] = "test",
    output: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            show_default=False,
            help="A folder for the metrics, the predictions, and the table by class.",
        ),
    ] = None,
    batch_size: BatchSize = 32,
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """
    Evaluate a fine-tuned model on rows with labels.

    Example: `kadapter evaluate open-entity --model open-entity-model --data OpenEntity/test.json`
    """
    from ..corpora.schema import write_json
    from ..reports import write_report
    from ..tasks import TASKS

    with plain_errors():
        rows = _rows(task, data, split, skip_bad_rows)
        found, metrics, labels = _run(task, model, rows, batch_size)
        if output is not None:
            write_report(output, TASKS[task], rows, found, labels)
            write_json(output / "metrics.json", {split: metrics})
    if as_json:
        print_json(metrics)
        return
    for key, value in metrics.items():
        typer.echo(f"{key}: {value:.4f}")
    if output is not None:
        typer.echo(f"The predictions are in {output}.")


def predict(
    task: TaskName,
    model: Model,
    input: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="A file with rows, with or without labels.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            show_default=False,
            help="The JSON Lines file to write. Default: INPUT.predictions.jsonl, beside the input.",
        ),
    ] = None,
    batch_size: BatchSize = 32,
    skip_bad_rows: SkipBadRows = False,
) -> None:
    """
    Predict with a fine-tuned model, and write each row with its prediction.

    Example: `kadapter predict relation --model relation-model --input sentences.csv`
    """
    from ..reports import write_predictions, write_submission
    from ..tasks import TASKS

    path = output or input.with_name(f"{input.name}.predictions.jsonl")
    with plain_errors():
        rows, report = TASKS[task].read(input, labelled=False, skip_bad_rows=skip_bad_rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        found, _, _ = _run(task, model, rows, batch_size)
        write_predictions(path, rows, found)
        submission = write_submission(path.parent, TASKS[task], rows, found)
    skipped = sum(report.dropped.values())
    typer.echo(
        f"{len(found)} predictions for {len(rows)} rows are in {path}.{f' {skipped} rows are skipped.' if skipped else ''}"
    )
    if submission is not None:
        typer.echo(f"The file for the task's scorer is {submission}.")


def _rows(task: str, data: str, split: str, skip_bad_rows: bool):
    from ..tasks import TASKS

    splits = TASKS[task].read_splits(data, skip_bad_rows=skip_bad_rows)
    if Path(data).is_file():
        return splits["train"]
    if split not in splits:
        raise ValueError(f"'{data}' has no split named {split}; it has {', '.join(splits)}.")
    return splits[split]


def _run(task: str, model: str, rows, batch_size: int):
    """The predictions by row, the metrics if the rows have labels, and the labels."""
    from ..predicting import evaluate as run, labels_of, load_finetuned
    from ..tasks import TASKS

    loaded, tokenizer = load_finetuned(model, TASKS[task])
    found, metrics = run(loaded, tokenizer, rows, TASKS[task], batch_size)
    return found, metrics, labels_of(loaded, TASKS[task])
