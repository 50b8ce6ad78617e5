"""`kadapter pretrain`: trains a knowledge adapter on rows of a schema, with the stock Trainer."""

import shlex
from typing import Annotated

import typer

from ..messages import did_you_mean
from ._common import plain_errors


def pretrain(
    context: typer.Context,
    objective: Annotated[str, typer.Argument(help="The objective to train on.", show_default=False)] = "",
) -> None:
    """
    Train a knowledge adapter on a frozen backbone: `factual` (relations), `linguistic` (dependency trees) or `typing`.

    `multitask` trains the backbone itself instead, on several of these objectives at once, as a baseline.

    All flags of transformers' TrainingArguments are supported too; `kadapter pretrain factual --help` lists them.

    Example: `kadapter pretrain factual --data fewrel --backbone FacebookAI/roberta-large --output_dir factual-adapter`
    """
    if objective in ("", "-h", "--help"):  # after an objective, --help lists all of its flags
        typer.echo(context.get_help())
        raise typer.Exit(0 if objective else 2)
    if objective == "multitask":
        _train_backbone(context.args)
        return
    from ..objectives import OBJECTIVES  # imported here, as importing Trainer takes seconds
    from ..pretraining import parser, pretrain as run
    from ..runs import schedule

    if objective not in OBJECTIVES:
        suggestion = did_you_mean(objective, OBJECTIVES)
        raise typer.BadParameter(
            f"'{objective}' is not one of {', '.join(OBJECTIVES)}.{suggestion}", param_hint="OBJECTIVE"
        )
    arguments, training = parser(objective).parse(context.args)
    if training.should_save:  # of several processes, one reports
        typer.echo(f"Training on the backbone {arguments.backbone}: {schedule(training)}.")
    try:
        with plain_errors():
            metrics = run(objective, arguments, training)
    except KeyboardInterrupt as stop:
        typer.echo(str(stop) or "Stopped.", err=True)
        raise typer.Exit(130) from None
    if not training.should_save:
        return
    for key, value in metrics.items():
        typer.echo(f"{key.removeprefix('eval_')}: {value:.4f}")
    folder, name = str(training.output_dir), arguments.name or objective
    typer.echo(f"The adapter '{name}' is in {folder}. `kadapter info {shlex.quote(folder)}` shows the contents.")


def _train_backbone(flags: list[str]) -> None:
    from ..multitask import parse, train_backbone

    arguments, training = parse(flags)
    try:
        with plain_errors():
            results = train_backbone(arguments, training)
    except KeyboardInterrupt as stop:
        typer.echo(str(stop) or "Stopped.", err=True)
        raise typer.Exit(130) from None
    for objective, metrics in results.items():
        for key, value in metrics.items():
            typer.echo(f"{objective} {key.removeprefix('eval_')}: {value:.4f}")
    folder = shlex.quote(str(training.output_dir))
    typer.echo(f"The backbone is in {folder}. Fine-tune it: `kadapter finetune TASK --backbone {folder}`.")
