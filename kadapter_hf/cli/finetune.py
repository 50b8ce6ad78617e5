"""`kadapter finetune`: fine-tunes a K-Adapter on a downstream task, with the stock Trainer."""

import shlex
from typing import Annotated

import typer

from ..messages import did_you_mean
from ._common import plain_errors


def finetune(
    context: typer.Context,
    task: Annotated[str, typer.Argument(help="The task.", show_default=False)] = "",
) -> None:
    """
    Fine-tune a backbone with knowledge adapters on a task, and evaluate it.

    Tasks of the paper: `open-entity`, `figer`, `tacred`, `cosmos-qa`, `search-qa`, `quasar-t`; and `semeval-2010-task-8`. Their
    defaults are the paper's settings.

    Tasks for data of your own (CSV, TSV, JSON, Parquet, the Hub): `relation`, `typing`, `classification`, `multiple-choice`,
    `extractive-qa`, `ner`.

    All flags of transformers' TrainingArguments are supported too; `kadapter finetune TASK --help` lists them.

    Example: `kadapter finetune open-entity --data OpenEntity --adapters factual-adapter linguistic-adapter --output_dir out`

    Example: `kadapter finetune relation --data relations.csv --adapters factual-adapter --output_dir out`
    """
    if task in ("", "-h", "--help"):  # after a task, --help lists all of its flags
        typer.echo(context.get_help())
        raise typer.Exit(0 if task else 2)
    from ..finetuning import finetune as run, parser, trained_parts
    from ..runs import schedule
    from ..tasks import TASKS

    if task not in TASKS:
        raise typer.BadParameter(
            f"'{task}' is not one of {', '.join(TASKS)}.{did_you_mean(task, TASKS)}", param_hint="TASK"
        )
    with plain_errors():
        arguments, options, training = parser(task).parse(context.args)
    try:
        with plain_errors():
            if training.should_save:  # of several processes, one reports
                typer.echo(f"Training {trained_parts(arguments)}: {schedule(training)}.")
            results = run(TASKS[task], arguments, options, training)
    except KeyboardInterrupt as stop:
        typer.echo(str(stop) or "Stopped.", err=True)
        raise typer.Exit(130) from None
    if not training.should_save:
        return
    for split, metrics in results.items():
        for key, value in metrics.items():
            typer.echo(f"{split} {key}: {value:.4f}")
    folder = shlex.quote(str(training.output_dir))
    typer.echo(f"The model is in {folder}. Predict with it: `kadapter predict {task} --model {folder} --input FILE`.")
