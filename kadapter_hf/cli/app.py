"""`kadapter app`: a web page for trying models."""

import errno
import socket
from pathlib import Path
from typing import Annotated

import typer

from ._arguments import check_new, existing
from ._output import conclude, fail, running


def app(
    models: Annotated[
        list[str],
        typer.Argument(
            callback=existing, show_default=False, help="Fine-tuned K-Adapters: folders or repositories on the Hub."
        ),
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
    else:
        check_free(host, port)
    with running():
        from kadapter_hf.app import build, write_space

        if space is not None:
            write_space(models, space)
            conclude(f"The Space is in '{space}'. Upload it: hf upload --repo-type space USER/NAME {space}")
            return
        page = build(models)
        page.launch(server_name=host, server_port=port, show_error=True)


def check_free(host: str, port: int | None) -> None:
    """Exits if the address can't be listened on, before models are loaded."""
    try:
        socket.create_server((host, port or 0)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            fail(f"the port {port} is in use; choose another with --port.")
        reason, _, _ = str(error.strerror).partition(" (")  # what follows is the address again
        fail(f"can't listen on {host}{f', port {port}' if port else ''}: {reason}.")
