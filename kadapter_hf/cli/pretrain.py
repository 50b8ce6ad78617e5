"""`kadapter pretrain`: a knowledge adapter from rows of a schema, with the stock Trainer."""

import sys
from typing import Annotated

import typer


def pretrain(
    context: typer.Context,
    objective: Annotated[str, typer.Argument(help="What the adapter learns from.", show_default=False)] = "",
) -> None:
    """
    Train a knowledge adapter beside a frozen backbone: `factual` (relations), `linguistic` (dependency trees), `typing`.

    Every flag of transformers' TrainingArguments is understood too; `kadapter pretrain factual --help` lists them all.

    Example: `kadapter pretrain factual --data fewrel --backbone FacebookAI/roberta-large --output_dir factual-adapter`
    """
    if objective in ("", "-h", "--help"):  # behind an objective, --help is about all of its flags
        typer.echo(context.get_help())
        raise typer.Exit(0 if objective else 2)
    from ..pretraining import OBJECTIVES, main

    if objective not in OBJECTIVES:
        typer.echo(f"kadapter pretrain: '{objective}' is not one of the objectives {', '.join(OBJECTIVES)}.", err=True)
        raise typer.Exit(2)
    try:
        for key, value in main([objective, *context.args]).items():
            typer.echo(f"{key.removeprefix('eval_')}: {value:.4f}")
    except KeyboardInterrupt:
        typer.echo("Stopped, with a checkpoint. To go on from it, add --resume_from_checkpoint true.", err=True)
        sys.exit(130)
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"kadapter pretrain: {error}", err=True)
        raise typer.Exit(1) from error
