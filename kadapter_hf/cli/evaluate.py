"""`kadapter evaluate` and `kadapter predict`: runs a fine-tuned model on rows of a task."""

from pathlib import Path
from typing import Annotated

import typer

from ._arguments import AsJson, Split, checked_task, existing, existing_data, starting
from ._names import TASKS
from ._output import conclude, print_json, running, say


TaskName = Annotated[
    str,
    typer.Argument(
        callback=checked_task,
        autocompletion=starting(TASKS),
        show_default=False,
        help="The task; `kadapter finetune --help` lists all of them.",
    ),
]
Model = Annotated[
    str, typer.Option(callback=existing, help="The fine-tuned model: a folder, or a repository on the Hub.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per batch.")]
SkipBadRows = Annotated[
    bool, typer.Option(help="Skip and count rows that can't be used, instead of stopping at the first one.")
]


def evaluate(
    task: TaskName,
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            callback=existing_data, help="A file; or a folder or a data set on the Hub, of which --split is evaluated."
        ),
    ],
    split: Annotated[Split, typer.Option(help="Files by themselves are used as a whole.")] = "test",
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
    from kadapter_hf.corpora.files import write_json
    from kadapter_hf.predicting import evaluate as run, label_names, labels_of, load_finetuned
    from kadapter_hf.reports import write_report
    from kadapter_hf.tasks.task import find_task

    of_task = find_task(task)
    with running():
        splits = of_task.read_splits(data, skip_bad_rows=skip_bad_rows)
        name = "train" if Path(data).is_file() else split
        if name not in splits:
            raise ValueError(f"'{data}' has no split named {name}; it has {', '.join(splits)}.")
        rows = splits[name]
        loaded, tokenizer = load_finetuned(model, of_task)
        found, metrics = run(loaded, tokenizer, rows, of_task, batch_size)
        if output is not None:
            write_report(output, of_task, rows, found, labels_of(loaded, of_task), label_names(loaded))
            write_json(output / "metrics.json", {split: metrics})
        if as_json:
            print_json(metrics)
            return
        for key, value in metrics.items():
            say(f"{key}: {value:.4f}")
        metric = of_task.metric
        where = f"The predictions are in {output}." if output else "--output FOLDER keeps the predictions."
        conclude(f"The {metric} on {len(rows)} rows is {metrics[metric]:.4f}. {where}")


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
    from kadapter_hf.predicting import evaluate as run, load_finetuned
    from kadapter_hf.reports import write_predictions, write_submission
    from kadapter_hf.tasks.task import find_task

    of_task = find_task(task)
    path = output or input.with_name(f"{input.name}.predictions.jsonl")
    with running():
        rows, report = of_task.read(input, labelled=False, skip_bad_rows=skip_bad_rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        loaded, tokenizer = load_finetuned(model, of_task)
        found, _ = run(loaded, tokenizer, rows, of_task, batch_size)
        write_predictions(path, rows, found)
        submission = write_submission(path.parent, of_task, rows, found)
        if submission is not None:
            say(f"The file for the task's scorer is {submission}.")
        skipped = sum(report.dropped.values())
        more = f" {skipped} rows are skipped." if skipped else ""
        conclude(f"{len(found)} predictions for {len(rows)} rows are in {path}.{more}")
