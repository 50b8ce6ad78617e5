"""`kadapter pretrain`: trains a knowledge adapter on rows of a schema, with the stock Trainer."""

import shlex
from typing import Annotated

import typer

from ._arguments import check_name, starting
from ._flags import check_flags
from ._names import OBJECTIVES
from ._output import conclude, running, say


KINDS = (*OBJECTIVES, "multitask")


def pretrain(
    context: typer.Context,
    objective: Annotated[
        str, typer.Argument(help="The objective to train on.", show_default=False, autocompletion=starting(KINDS))
    ] = "",
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
    check_name(objective, KINDS, "OBJECTIVE")
    check_flags("pretrain", objective, context.args)
    if objective == "multitask":
        _train_backbone(context.args)
        return
    from kadapter_hf.pretraining import parser, pretrain as run
    from kadapter_hf.runs import schedule

    arguments, training = parser(objective).parse(context.args)
    with running():
        if training.should_save:  # of several processes, one reports
            say(f"Training on the backbone {arguments.backbone}: {schedule(training)}.")
        metrics = run(objective, arguments, training)
        if training.should_save:
            for key, value in metrics.items():
                say(f"{key.removeprefix('eval_')}: {value:.4f}")
            folder, name = shlex.quote(str(training.output_dir)), arguments.name or objective
            conclude(
                f"The adapter '{name}' is in {folder}. Fine-tune with it: `kadapter finetune TASK --data DATA --adapters "
                f"{folder} --output_dir MODEL`."
            )


def _train_backbone(flags: list[str]) -> None:
    from kadapter_hf.multitask import parser, train_backbone

    arguments, training = parser().parse(flags)
    with running():
        results = train_backbone(arguments, training)
        for objective, metrics in results.items():
            for key, value in metrics.items():
                say(f"{objective} {key.removeprefix('eval_')}: {value:.4f}")
        folder = shlex.quote(str(training.output_dir))
        conclude(f"The backbone is in {folder}. Fine-tune it: `kadapter finetune TASK --backbone {folder}`.")
