"""`kadapter reproduce`: the paper's comparison of a backbone with and without adapters."""

import typer

from ._output import conclude, running, say


def reproduce(context: typer.Context) -> None:
    """
    Compare a backbone alone, with untrained and with trained adapters, on the paper's tasks and over several seeds.

    `kadapter reproduce --help` lists the flags; those of `kadapter finetune` hold for every run.

    Example: `kadapter reproduce --data open-entity=OpenEntity tacred=TACRED --adapters factual-adapter linguistic-adapter
    --seeds 1 2 3 --output_dir comparison`
    """
    from kadapter_hf.reproduction import parse, reproduce as run

    with running():
        try:
            arguments, flags = parse(context.args)
            path = run(arguments, flags)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Stopped. Give the same command again to continue.") from None
        say(path.read_text(encoding="utf-8").rstrip())
        conclude(f"The table is in {path}; results.csv and results.png are beside it.")
