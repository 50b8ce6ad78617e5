"""`kadapter app`: a web page for trying models."""

from pathlib import Path
from typing import Annotated

import typer

from ._arguments import check_new
from ._output import conclude, running


def app(
    models: Annotated[
        list[str],
        typer.Argument(show_default=False, help="Fine-tuned K-Adapters: folders or repositories on the Hub."),
    ],
    port: Annotated[
        int | None,
        typer.Option(show_default=False, min=1, max=65535, help="The port. Default: the first free from 7860."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines connect.")
    ] = "127.0.0.1",
    space: Annotated[
        Path | None,
        typer.Option(
            show_default=False, help="Instead of serving, write the files of a Space on the Hub into this folder."
        ),
    ] = None,
) -> None:
    """
    Try models in the browser: type a sentence, mark entities, and switch knowledge adapters on and off.

    Each prediction stands beside the backbone's alone, with what each adapter contributes. Several models have a tab each.

    Example: `kadapter app open-entity-model tacred-model`

    Example: `kadapter app user/open-entity-model --space space`
    """
    if space is not None:
        check_new(space)
    with running():
        from kadapter_hf.app import build, write_space

        if space is not None:
            write_space(models, space)
            conclude(f"The Space is in '{space}'. Upload it: hf upload --repo-type space USER/NAME {space}")
            return
        page = build(models)
        page.launch(server_name=host, server_port=port, show_error=True)
