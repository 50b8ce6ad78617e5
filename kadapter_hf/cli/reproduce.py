"""`kadapter reproduce`: the paper's comparison of a backbone with and without adapters."""

import typer

from ._flags import check_flags
from ._output import conclude, running, say


def reproduce(context: typer.Context) -> None:
    """
    Compare a backbone alone, with untrained and with trained adapters, on the paper's tasks and over several seeds.

    `kadapter reproduce --help` lists the flags; those of `kadapter finetune` hold for every run.

    Example: `kadapter reproduce --data open-entity=OpenEntity tacred=TACRED --adapters factual-adapter linguistic-adapter
    --seeds 1 2 3 --output_dir comparison`
    """
    check_flags("reproduce", "", context.args)
    from kadapter_hf.reproduction import parser, reproduce as run

    with running():
        try:
            path = run(*parser().parse_known(context.args))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Stopped. Give the same command again to continue.") from None
        say(path.read_text(encoding="utf-8").rstrip())
        conclude(f"The table is in {path}; results.csv and results.png are beside it.")
