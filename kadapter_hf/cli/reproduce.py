"""`kadapter reproduce`: the paper's comparison of a backbone with and without adapters."""

import typer

from ._common import plain_errors


def reproduce(context: typer.Context) -> None:
    """
    Compare a backbone alone, with untrained and with trained adapters, on the paper's tasks and over several seeds.

    `kadapter reproduce --help` lists the flags; those of `kadapter finetune` hold for every run.

    Example: `kadapter reproduce --data open-entity=OpenEntity tacred=TACRED --adapters factual-adapter linguistic-adapter
    --seeds 1 2 3 --output_dir comparison`
    """
    from ..reproduction import parse, reproduce as run

    try:
        with plain_errors():
            arguments, flags = parse(context.args)
            path = run(arguments, flags, report=lambda line: typer.echo(line, err=True))
    except KeyboardInterrupt:
        typer.echo("Stopped. Give the same command again to continue.", err=True)
        raise typer.Exit(130) from None
    typer.echo(path.read_text(encoding="utf-8"))
    typer.echo(f"The table is in {path}; results.csv and results.png are beside it.")
