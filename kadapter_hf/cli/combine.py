"""`kadapter combine`: combines separately trained adapters in one K-Adapter."""

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig

from ..features import load_tokenizer
from ..modeling.backbone_kadapter import load_backbone, new_backbone
from ..modeling.compat_kadapter import quiet
from ..modeling.configuration_kadapter import KAdapterConfig
from ..modeling.format_kadapter import KAdapterConfigError, KAdapterLoadError
from ..modeling.heads_kadapter import KAdapterModel
from ..modeling.sources_kadapter import commit_of
from ..named_adapters import fusion_config as parse_fusion_config, named_adapters
from ..summary import knowledge_summary
from ._common import AsJson, check_new, plain_errors, print_json


def combine(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Adapter repositories, folders or .safetensors files. NAME=SOURCE renames the adapter, or chooses one of "
            "several."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="The output folder for the K-Adapter and the tokenizer, which must be new or empty.")
    ],
    backbone: Annotated[
        str | None,
        typer.Option(help="The backbone: a repository or folder. Default: as recorded in the first adapter."),
    ] = None,
    fusion: Annotated[
        str,
        typer.Option(
            help="How the outputs are fused: add, which has no weights; or concat, gate or attention, which are trained in "
            "fine-tuning.",
        ),
    ] = "concat",
    fusion_config: Annotated[
        str | None,
        typer.Option(
            "--fusion_config",
            "--fusion-config",
            show_default=False,
            help="""The configuration of the fusion as JSON, e.g. '{"top_k": 2}' for gate.""",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Combine separately trained knowledge adapters in one K-Adapter, ready for fine-tuning.

    Example: `kadapter combine factual-adapter linguistic-adapter --output both`

    Example: `kadapter combine wiki=wiki/factual-adapter news=news/factual-adapter --output both`
    """
    try:
        values = parse_fusion_config(fusion, fusion_config)
    except KAdapterConfigError as error:
        raise typer.BadParameter(str(error)) from None
    with plain_errors():
        check_new(output)
        adapters = named_adapters(sources)
        configs = [config for _, config in adapters.values()]
        fingerprint = next((config.backbone_fingerprint for config in configs if config.backbone_fingerprint), None)
        backbone = backbone or next((name for config in configs if (name := config.backbone_name_or_path)), None)
        if backbone is None:
            raise KAdapterLoadError(f"'{sources[0]}' does not name its backbone: specify it with --backbone.")
        model = on_backbone(backbone, fingerprint, fusion=fusion, fusion_config=values)
        for name, (source, _) in adapters.items():
            model.load_knowledge_adapter(source, name)
        model.save_pretrained(output)
        has_tokenizer = save_tokenizer(backbone, output)
    if as_json:
        names = model.active_knowledge_adapters
        print_json({"output": str(output), "backbone": model.config.backbone_name_or_path, "adapters": names})
        return
    typer.echo(knowledge_summary(model))
    if next(model.backbone.parameters()).is_meta:
        typer.echo(
            "Here, the weights of the backbone are not available. When the K-Adapter is loaded, they are compared with the "
            "fingerprint that its adapters record."
        )
    if any(parameter.requires_grad for parameter in model.fusion.parameters()):
        typer.echo(
            "Until it is fine-tuned, its output is close to the backbone's, as a new fusion gives the adapters little weight."
        )
    if not has_tokenizer:
        typer.echo(f"The backbone '{backbone}' has no tokenizer that could be saved with it.")


def on_backbone(backbone: str, fingerprint: str | None, **fields: Any) -> KAdapterModel:
    """
    A K-Adapter without adapters; `fields` are those of its configuration.

    If the backbone's fingerprint is known and its weights are not available locally, they are not downloaded: for saving, the
    configuration is sufficient.
    """
    if fingerprint is None:
        return KAdapterModel.from_backbone(backbone, **fields)
    try:
        with quiet():
            load_backbone(backbone, local_files_only=True)
    except KAdapterLoadError:
        pass
    else:
        return KAdapterModel.from_backbone(backbone, **fields)
    try:
        backbone_config = AutoConfig.from_pretrained(backbone)
    except Exception as error:  # a foreign configuration class may raise anything
        raise KAdapterLoadError(f"the configuration of the backbone '{backbone}' can't be read: {error}") from error
    with torch.device("meta"):
        encoder = new_backbone(backbone_config)
    config = KAdapterConfig(
        backbone_name_or_path=os.path.abspath(backbone) if os.path.isdir(backbone) else backbone,
        backbone_revision=commit_of(backbone),
        backbone_fingerprint=fingerprint,
        backbone_config=backbone_config,
        **fields,
    )
    model = KAdapterModel(config, encoder)
    model.origins.sources["backbone"] = config.backbone_name_or_path
    return model.eval()


def save_tokenizer(backbone: str, output: Path) -> bool:
    """Saves the backbone's tokenizer too, so that `AutoTokenizer` finds it; returns whether there is one."""
    try:
        load_tokenizer(backbone).save_pretrained(output)
    except (OSError, ValueError, ImportError):
        return False
    return True
