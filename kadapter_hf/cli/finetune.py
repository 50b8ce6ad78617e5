"""`kadapter finetune`: fine-tunes a K-Adapter on a downstream task, with the stock Trainer."""

import shlex
from typing import Annotated

import typer

from ._arguments import check_name, starting
from ._flags import check_flags
from ._names import TASKS
from ._output import conclude, running, say


def finetune(
    context: typer.Context,
    task: Annotated[str, typer.Argument(help="The task.", show_default=False, autocompletion=starting(TASKS))] = "",
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
    check_name(task, TASKS, "TASK")
    check_flags("finetune", task, context.args)
    from kadapter_hf.finetuning import finetune as run, parser, trained_parts
    from kadapter_hf.runs import schedule
    from kadapter_hf.tasks.task import find_task

    with running():
        arguments, options, training = parser(task).parse(context.args)
        if training.should_save:  # of several processes, one reports
            say(f"Training {trained_parts(arguments)}: {schedule(training)}.")
        results = run(find_task(task), arguments, options, training)
        if training.should_save:
            for split, metrics in results.items():
                for key, value in metrics.items():
                    say(f"{split} {key}: {value:.4f}")
            folder = shlex.quote(str(training.output_dir))
            conclude(
                f"The model is in {folder}. Predict with it: `kadapter predict {task} --model {folder} --input FILE`."
            )
