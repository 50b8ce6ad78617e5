"""
The command `kadapter`: one file per command.

It is a package of its own, outside of `kadapter_hf`, as importing that takes seconds: so that help, completion and complaints
about arguments are immediate, the commands import it, and other large packages, when they run.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import _output
from ._arguments import FlagCommand
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


class Commands(TyperGroup):
    """Lists `prepare` first, though it is a group, which typer lists after the commands."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return sorted(super().list_commands(ctx), key=lambda name: name != "prepare")


app = typer.Typer(
    cls=Commands,
    help="K-Adapter: knowledge adapters for a frozen Hugging Face encoder.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)
# In the order of the work. The flags of these and their --help come from transformers.
of_flags: dict[str, Any] = {
    "cls": FlagCommand,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
}
app.add_typer(prepare, name="prepare")
app.command(**of_flags)(pretrain)
app.command(**of_flags)(finetune)
app.command(no_args_is_help=True)(evaluate)
app.command(no_args_is_help=True)(predict)
app.command(**of_flags)(probe)
app.command(**of_flags)(reproduce)
for command in (combine, convert, info, push, pull, export):
    app.command(no_args_is_help=True)(command)
app.command(name="app", no_args_is_help=True)(try_in_browser)
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
    if log_file is not None and not log_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder '{log_file.parent}'", param_hint="--log_file")
    _output.settings = _output.Settings(quiet, verbose, log_file)
