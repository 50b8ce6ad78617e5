"""Combination of separately trained adapters in one K-Adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from .features import load_tokenizer
from .modeling.backbone_kadapter import load_backbone, new_backbone
from .modeling.compat_kadapter import quiet
from .modeling.configuration_kadapter import KAdapterConfig
from .modeling.format_kadapter import KAdapterLoadError
from .modeling.fusion_kadapter import check_fusion
from .modeling.heads_kadapter import KAdapterModel
from .modeling.loading_kadapter import backbone_place
from .modeling.sources_kadapter import commit_of
from .named_adapters import named_adapters


def combine(
    sources: Sequence[str], output: Path, backbone: str | None, fusion: str, fusion_config: dict[str, Any]
) -> tuple[KAdapterModel, bool]:
    """
    Writes a K-Adapter with all of these adapters, named as on the command line, to a folder, with the backbone's tokenizer.

    Returns:
        The model, and whether the backbone has a tokenizer. If the backbone's weights were not available, they are on the meta
        device.

    Raises:
        KAdapterLoadError: an adapter or the backbone can't be loaded.
        KAdapterConfigError: two adapters have the same name, or there is no such fusion.
    """
    check_fusion(fusion, fusion_config)
    adapters = named_adapters(sources)
    configs = [config for _, config in adapters.values()]
    fingerprint = next((config.backbone_fingerprint for config in configs if config.backbone_fingerprint), None)
    backbone = backbone or next((name for config in configs if (name := config.backbone_name_or_path)), None)
    if backbone is None:
        raise KAdapterLoadError(f"'{sources[0]}' does not name its backbone: specify it with --backbone.")
    model = on_backbone(backbone, fingerprint, fusion=fusion, fusion_config=fusion_config)
    for name, (source, _) in adapters.items():
        model.load_knowledge_adapter(source, name)
    model.save_pretrained(output)
    return model, save_tokenizer(backbone, output)


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
        backbone_name_or_path=backbone_place(backbone),
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
