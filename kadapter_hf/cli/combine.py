"""`kadapter combine`: adapters that were trained apart, in one K-Adapter."""

from pathlib import Path
from typing import Annotated

import typer


def combine(
    sources: Annotated[list[str], typer.Argument(help="Adapter repositories, folders or .safetensors files.")],
    output: Annotated[Path, typer.Option(help="The folder for the K-Adapter.")],
    backbone: Annotated[
        str | None, typer.Option(help="The backbone's repository or folder; by default what the first adapter names.")
    ] = None,
) -> None:
    """
    Join knowledge adapters that were trained apart into one K-Adapter, ready to be fine-tuned.

    Example: `kadapter combine factual-adapter linguistic-adapter --output both`
    """
    from ..modeling.configuration_kadapter import KAdapterConfigError
    from ..modeling.modeling_kadapter import KAdapterModel
    from ..modeling.storage_kadapter import KAdapterLoadError, adapter_file, read_adapter

    try:
        backbone = backbone or read_adapter(adapter_file(sources[0], None)).config.backbone_name_or_path
        if backbone is None:
            raise KAdapterLoadError(f"'{sources[0]}' does not name its backbone: say which with --backbone.")
        model = KAdapterModel.from_backbone(backbone, adapters=sources)
        model.save_pretrained(output)
    except (KAdapterConfigError, OSError) as error:
        typer.echo(f"kadapter combine: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(model.knowledge_summary())
