"""The command `kadapter`: one file per command."""

import typer

from .combine import combine
from .convert import convert
from .info import info
from .prepare import prepare
from .pretrain import pretrain
from .pull import pull
from .push import push


app = typer.Typer(
    help="K-Adapter: knowledge adapters beside a frozen Hugging Face encoder.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)
app.add_typer(prepare, name="prepare")
# Its flags are transformers' own, and so is its --help.
flags = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command(context_settings=flags)(pretrain)
for command in (combine, convert, info, push, pull):
    app.command(no_args_is_help=True)(command)


@app.callback()
def main() -> None:
    """K-Adapter: knowledge adapters beside a frozen Hugging Face encoder."""
