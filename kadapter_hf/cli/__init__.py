"""
The command `kadapter`: one file per command.

It is a package of its own, outside of `kadapter_hf`, as importing that takes seconds: so that help, completion and complaints
about arguments are immediate, the commands import it, and other large packages, when they run.
"""

from pathlib import Path
from typing import Annotated

import typer

from . import _output
from .app import app as try_in_browser
from .combine import combine
from .convert import convert
from .doctor import doctor
from .evaluate import evaluate, predict
from .export import export
from .finetune import finetune
from .info import info
from .prepare import prepare
from .pretrain import pretrain
from .probe import probe
from .pull import pull
from .push import push
from .reproduce import reproduce


app = typer.Typer(
    help="K-Adapter: knowledge adapters for a frozen Hugging Face encoder.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)
app.add_typer(prepare, name="prepare")
# Their flags and their --help come from transformers.
flags = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command(context_settings=flags)(pretrain)
app.command(context_settings=flags)(finetune)
app.command(context_settings=flags)(reproduce)
app.command(context_settings=flags)(probe)
app.command(name="app", no_args_is_help=True)(try_in_browser)
for command in (evaluate, predict, export, combine, convert, info, push, pull):
    app.command(no_args_is_help=True)(command)
app.command()(doctor)


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"kadapter-hf {version('kadapter-hf')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors and the last line only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print the logs of the libraries, too.")] = False,
    log_file: Annotated[
        Path | None,
        typer.Option(
            "--log_file",
            "--log-file",
            dir_okay=False,
            show_default=False,
            help="Add the output and all logs to this file, with time stamps.",
        ),
    ] = None,
) -> None:
    """K-Adapter: knowledge adapters for a frozen Hugging Face encoder."""
    if quiet and verbose:
        raise typer.BadParameter("give either --quiet or --verbose")
    _output.settings = _output.Settings(quiet, verbose, log_file)
