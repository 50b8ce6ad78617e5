"""The data type of a frozen backbone: `--backbone_dtype`."""

from typing import Any

import torch
from transformers.utils import logging

from .modeling.backbone_kadapter import is_opaque
from .modeling.modeling_kadapter import KAdapterPreTrainedModel


logger = logging.get_logger(__name__)


def fast_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The data type with the range of float32 in which a device multiplies fastest, and the reason in words."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"{torch.cuda.get_device_name(device)} multiplies it faster"
        return torch.float32, f"{torch.cuda.get_device_name(device)} does not support bfloat16"
    capabilities: dict[str, bool] = {}
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # not in torch 2.6
        capabilities = dict(torch.cpu.get_capabilities())
    for capability, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16")):
        if capabilities.get(capability):
            return torch.bfloat16, f"this processor multiplies it faster ({name})"
    return torch.float32, f"this {device.type} is not known to multiply bfloat16 faster"


def cast_backbone(model: KAdapterPreTrainedModel, dtype: str, device: torch.device) -> None:
    """
    Casts a frozen backbone for the computation, and logs the choice. A save is the same as without: the backbone counts as
    unchanged, and is loaded in its own data type.

    Args:
        dtype: `"float32"`, `"bfloat16"`, or `"auto"`, which leaves a backbone that can't be cast, or is stored in fewer bits,
            as it is.
        device: where the model will run.

    Raises:
        ValueError: `dtype` is `"bfloat16"`, and the backbone trains, is quantised, or shares its embeddings with the head.
    """
    backbone: Any = model.backbone
    reasons = {
        "trains": any(parameter.requires_grad for parameter in backbone.parameters()),
        "is quantised or offloaded": is_opaque(backbone),
        "shares its embeddings with the head, which is in float32": model.needs_lm_head,
    }
    for reason, holds in reasons.items():
        if holds and dtype in ("auto", "float32"):
            return
        if holds:
            raise ValueError(
                f"--backbone_dtype {dtype} is for a frozen backbone of plain weights, but this one {reason}"
            )
    model.origins.backbone_dtype = backbone.dtype
    if dtype != "auto":
        backbone.to(getattr(torch, dtype))
        return
    chosen, reason = fast_dtype(device)
    if chosen.itemsize < backbone.dtype.itemsize:
        backbone.to(chosen)
        logger.warning(
            f"The backbone computes in {str(chosen).removeprefix('torch.')}: {reason}. For float32: --backbone_dtype float32."
        )
