"""The parts of a K-Adapter as a table."""

from torch import nn

from .modeling.modeling_kadapter import KAdapterPreTrainedModel


def knowledge_summary(self: KAdapterPreTrainedModel) -> str:
    """
    A table of the model's parts: their parameters, how many of them train, dtype, device, and source (a repository, a
    folder, a file, or `new`).
    """
    active = self.active_knowledge_adapters
    parts = {"backbone": ("backbone", self.backbone.parameters())}
    for name, adapter in self.adapters.items():
        state = "" if name in active else " (inactive)"
        parts[f"adapters.{name}"] = (f"adapter {name}{state}", adapter.parameters())
    parts["fusion"] = (f"fusion ({self.config.fusion})", self.fusion.parameters())
    parts["head"] = ("head", self.head_parameters())
    rows = [("part", "parameters", "trainable", "dtype", "device", "source")]
    seen: set[nn.Parameter] = set()  # tied weights count once, as the backbone's
    total = trainable = 0
    for part, (label, parameters) in parts.items():
        own = set(parameters) - seen
        if not own:
            continue
        seen |= own
        count = sum(parameter.numel() for parameter in own)
        training = sum(parameter.numel() for parameter in own if parameter.requires_grad)
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in own})
        devices = sorted({str(parameter.device) for parameter in own})
        source = str(self.origins.sources.get(part, "new"))
        rows.append((label, f"{count:,}", f"{training:,}", ", ".join(dtypes), ", ".join(devices), source))
        total, trainable = total + count, trainable + training
    rows.append(("total", f"{total:,}", f"{trainable:,}", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = "  ".join(f"{{:{'>' if column in (1, 2) else '<'}{width}}}" for column, width in enumerate(widths))
    title, *lines = [line.format(*row).rstrip() for row in rows]
    return "\n".join([title, "  ".join("-" * width for width in widths), *lines])
