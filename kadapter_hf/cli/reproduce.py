"""`kadapter reproduce`: the paper's comparison of a backbone with and without adapters."""

from pathlib import Path
from typing import Annotated

import typer

from ._common import plain_errors


def reproduce(
    context: typer.Context,
    data: Annotated[
        list[str],
        typer.Option(
            help="A task and its data, as TASK=SOURCE; repeat it for several. SOURCE is what `kadapter finetune --data` takes."
        ),
    ],
    adapters: Annotated[
        list[str],
        typer.Option(
            help="A trained adapter, SOURCE or NAME=SOURCE; repeat it for several, which are also used together."
        ),
    ],
    output_dir: Annotated[Path, typer.Option(help="The folder for the runs and their results.")],
    multitask: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="A backbone trained on the adapters' tasks itself: the paper's RoBERTa + multitask.",
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            help="Compare only this model; repeat it for several: backbone, multitask, untrained, or names of adapters joined "
            "by +.",
        ),
    ] = None,
    seeds: Annotated[list[int], typer.Option(help="Repeat it for several seeds.")] = [42],  # noqa: B006
) -> None:
    """
    Compare a backbone alone, with untrained adapters, and with trained ones, on the paper's tasks, over several seeds.

    All other flags are passed on to `kadapter finetune`. Finished runs are not repeated, and a stopped one goes on, if the
    command is given again.

    Example: `kadapter reproduce --data open-entity=OpenEntity --data tacred=TACRED --adapters factual-adapter --adapters
    linguistic-adapter --output_dir runs --seeds 1 --seeds 2`
    """
    from ..reproduction import ReproductionArguments, reproduce as run

    arguments = ReproductionArguments(data, adapters, multitask, models or None, seeds)
    with plain_errors():
        path = run(arguments, output_dir, context.args, report=lambda line: typer.echo(line, err=True))
    typer.echo(path.read_text(encoding="utf-8"))
    typer.echo(f"The table is in {path}; results.csv and results.png are beside it.")
