"""`kadapter combine`: combines separately trained adapters in one K-Adapter."""

from pathlib import Path
from typing import Annotated

import typer

from ..modeling.format_kadapter import KAdapterLoadError
from ..modeling.heads_kadapter import KAdapterModel
from ..modeling.reading_kadapter import read_adapter
from ..modeling.sources_kadapter import adapter_file
from ._common import AsJson, plain_errors, print_json


def combine(
    sources: Annotated[list[str], typer.Argument(help="Adapter repositories, folders or .safetensors files.")],
    output: Annotated[Path, typer.Option(help="The output folder for the K-Adapter.")],
    backbone: Annotated[
        str | None,
        typer.Option(help="The backbone: a repository or folder. Default: as recorded in the first adapter."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Combine separately trained knowledge adapters in one K-Adapter, ready for fine-tuning.

    Example: `kadapter combine factual-adapter linguistic-adapter --output both`
    """
    with plain_errors():
        backbone = backbone or read_adapter(adapter_file(sources[0], None)).config.backbone_name_or_path
        if backbone is None:
            raise KAdapterLoadError(f"'{sources[0]}' does not name its backbone: specify it with --backbone.")
        model = KAdapterModel.from_backbone(backbone, adapters=sources)
        model.save_pretrained(output)
    if as_json:
        names = model.active_knowledge_adapters
        print_json({"output": str(output), "backbone": model.config.backbone_name_or_path, "adapters": names})
    else:
        typer.echo(model.knowledge_summary())
