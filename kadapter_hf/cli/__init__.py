"""The command `kadapter`: one file per command."""

from typing import Annotated

import typer

from .. import __version__
from .app import app as try_in_browser
from .combine import combine
from .convert import convert
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


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kadapter-hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """K-Adapter: knowledge adapters for a frozen Hugging Face encoder."""
