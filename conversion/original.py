"""
The tensors of the original's checkpoints and their counterparts in a K-Adapter.

Sources: `fac-adapter.py` and `lin-adapter.py` (one adapter with its pre-training head),
`examples/run_finetune_*_adapter.py` (adapters, fusion and task head in one file, the backbone in another), and
`RobertaModelwithAdapter` in `pytorch_transformers/my_modeling_roberta.py` (everything except a head in one file).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..modeling.adapters_kadapter import KnowledgeAdapter
from ..modeling.configuration_kadapter import KnowledgeAdapterConfig
from ..modeling.format_kadapter import KAdapterConfigError, KAdapterLoadError
from ..modeling.heads_kadapter import (
    KAdapterForEntityTyping,
    KAdapterForMultipleChoice,
    KAdapterForRelationClassification,
    KAdapterModel,
)


# The original's names of the adapters in a K-Adapter, and ours.
ADAPTERS = {"fac_adapter": "factual", "lin_adapter": "linguistic", "et_adapter": "typing", "task_adapter": "task"}
# The original's concat fusion reads these two, in this order.
FUSED = {"fac": "factual", "lin": "linguistic"}
NOT_FUSED = "the original runs this adapter, but its concat fusion does not read it"
NO_PARSER = "the head of the linguistic pre-training, which has no counterpart here"
NOT_KEPT = "the head of the factual pre-training; --with-head keeps it"
ONE_ADAPTER = "the original does not use it with a single adapter"
NO_POOLER = "the pooler is not used"
NO_POSITIONS = "a list of positions, not weights"


class Source:
    """
    The tensors of one file, each of which is either taken or left out for a stated reason.

    Raises:
        KAdapterLoadError: in `take`, if a tensor is missing, has an impossible shape or does not hold numbers; in
            `check_all_known`, if a tensor was neither taken nor left out.
    """

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]):
        self.path = path
        self.tensors = tensors
        self.sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        self.targets: dict[str, list[str]] = {}
        self.left_out: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def indices(self, pattern: str) -> set[int]:
        """The numbers matched by the group of the pattern in the names of tensors."""
        return {int(found.group(1)) for name in self.tensors if (found := re.match(pattern, name))}

    def shape(self, name: str, dimensions: int = 2) -> torch.Size:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise KAdapterLoadError(f"'{self.path}': tensor '{name}' is missing.")
        if tensor.dim() != dimensions or not tensor.numel():
            raise KAdapterLoadError(f"'{self.path}': tensor '{name}' has the impossible shape {tuple(tensor.shape)}.")
        return tensor.shape

    def take(self, name: str, shape: Iterable[int], targets: Iterable[str]) -> torch.Tensor:
        """Returns the tensor after checking its shape, and records the names that it gets in the K-Adapter."""
        shape = tuple(shape)
        if self.shape(name, len(shape)) != shape:
            found = tuple(self.tensors[name].shape)
            raise KAdapterLoadError(
                f"'{self.path}': tensor '{name}' has shape {found}, but {shape} is needed to fit the other tensors."
            )
        tensor = self.tensors[name]
        # A layout that repeats elements could expand a few bytes on disk to any size in memory.
        if tensor.layout is not torch.strided or not tensor.is_floating_point() or not tensor.is_contiguous():
            raise KAdapterLoadError(f"'{self.path}': tensor '{name}' does not hold plain floating-point numbers.")
        self.targets[name] = list(targets)
        return tensor

    def leave(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            self.targets.pop(name, None)
            self.left_out[name] = reason

    def check_all_known(self) -> None:
        unknown = sorted(self.tensors.keys() - self.targets.keys() - self.left_out.keys())
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise KAdapterLoadError(
                f"'{self.path}': tensor '{unknown[0]}'{more} is not one that the original's code writes to such a file."
            )


@dataclass
class Parts:
    """The parts of a K-Adapter, with the names used here."""

    model_class: type = KAdapterModel
    width: int = 0
    fusion: Literal["concat", "add"] = "concat"
    num_labels: int | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    configs: dict[str, KnowledgeAdapterConfig] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def linear(self, source: Source, name: str, rows: int, columns: int, target: str | None) -> None:
        """Takes the weight and bias of a linear layer; without a target, they are only checked."""
        for kind, shape in (("weight", (rows, columns)), ("bias", (rows,))):
            targets = [] if target is None else [f"{target}.{kind}"]
            tensor = source.take(f"{name}.{kind}", shape, targets)
            self.state |= dict.fromkeys(targets, tensor)


def is_kadapter(source: Source) -> bool:
    """
    Whether the file holds a complete K-Adapter, as opposed to one adapter with its pre-training head.

    Raises:
        KAdapterLoadError: it holds neither of them.
    """
    if any(name.startswith("adapter.") for name in source.tensors):
        return False
    if any(name.startswith(tuple(f"{prefix}." for prefix in ADAPTERS)) for name in source.tensors):
        return True
    raise KAdapterLoadError(
        f"'{source.path}' is a checkpoint of something else: it holds none of the original's adapters, but "
        f"'{min(source.tensors)}' and {len(source.tensors) - 1} more tensors."
    )


def read_adapter(source: Source, prefix: str, name: str, layers: list[int], heads: int, parts: Parts) -> None:
    """Reads one adapter, with sizes from its tensors; `prefix` is the original's prefix of `adapter.N`."""
    start = re.escape(prefix)
    count = _count(source, f"{prefix}adapter.", source.indices(rf"{start}adapter\.(\d{{1,4}})\."))
    inside = source.indices(rf"{start}adapter\.\d+\.encoder\.layer\.(\d{{1,4}})\.")
    first = f"{prefix}adapter.0."
    hidden, width = source.shape(f"{first}down_project.weight")
    inner = f"{first}encoder.layer."
    depth = _count(source, inner, inside)
    if count * depth > len(source.tensors):
        raise KAdapterLoadError(f"'{source.path}' has too few tensors for {count} adapter layers of {depth} layers.")
    if count != len(layers):
        raise KAdapterConfigError(
            f"'{source.path}': '{name}' has {count} adapter layers, but --layers names {len(layers)}: {layers}."
        )
    config = KnowledgeAdapterConfig(
        backbone_layers=layers,
        num_hidden_layers=depth,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=source.shape(f"{inner}0.intermediate.dense.weight")[0],
        attend_to_padding=True,
    )
    with torch.device("meta"):
        expected = KnowledgeAdapter(config, width).state_dict()
    for target, tensor in expected.items():
        original = prefix + target.replace("layers.", "adapter.", 1)
        full = f"adapters.{name}.{target}"
        parts.state[full] = source.take(original, tensor.shape, [full])
    parts.configs[name] = config
    parts.width = width


def read_pretrained(source: Source, name: str | None, with_head: bool, layers: list[int], heads: int) -> Parts:
    """
    Reads one adapter and its pre-training head.

    The head is `AdapterModel` in `fac-adapter.py`, where `com_dense` is the fusion and `dense` reads two entities, or in
    `lin-adapter.py`, with a self-attention between the two.
    """
    kind = "linguistic" if any(tensor.startswith("self_attention.") for tensor in source.tensors) else "factual"
    name = kind if name is None else name
    parts = Parts(kinds={name: kind})
    read_adapter(source, "", name, layers, heads, parts)
    width = parts.width
    kept = with_head and kind == "factual"
    parts.linear(source, "com_dense", width, 2 * width, f"fusion.states.{name}" if kept else None)
    labels = source.shape("out_proj.weight")[0]
    if kind == "linguistic":
        for layer in ("self.query", "self.key", "self.value", "output.dense"):
            parts.linear(source, f"self_attention.{layer}", width, width, None)
        for tensor in ("weight", "bias"):
            source.take(f"self_attention.output.LayerNorm.{tensor}", [width], [])
    parts.linear(source, "dense", width, width if kind == "linguistic" else 2 * width, "dense" if kept else None)
    parts.linear(source, "out_proj", labels, width, "out_proj" if kept else None)
    if kept:
        parts.model_class, parts.num_labels = KAdapterForRelationClassification, labels
    head = [tensor for tensor in source.targets if not tensor.startswith("adapter.")]
    source.leave([] if kept else head, NO_PARSER if kind == "linguistic" else NOT_KEPT)
    return parts


def read_kadapter(source: Source, layers: list[int], heads: int) -> Parts:
    """
    Reads adapters, fusion and task head of `TACREDModel`, `ETModel`, `FIGERModel`, `COSMOSQAModel` or
    `RobertaModelwithAdapter`.

    The class follows from the tensors of the head; the two for entity typing are equivalent.
    """
    scaled = next((name for name in source.tensors if re.fullmatch(r"\w+_adapter\.task_dense\.\w+", name)), None)
    if scaled is not None:
        raise KAdapterLoadError(
            f"'{source.path}': tensor '{scaled}' is a fusion inside an adapter. Its factors (a_rate and b_rate of the "
            "CosmosQA script) are not stored in any file, so it can't be converted."
        )
    names = source.tensors
    present = {prefix: name for prefix, name in ADAPTERS.items() if any(n.startswith(f"{prefix}.") for n in names)}
    parts = Parts(fusion="concat" if any(name.startswith("task_dense") for name in source.tensors) else "add")
    for prefix, name in present.items():
        before, width = dict(parts.state), parts.width
        read_adapter(source, f"{prefix}.", name, layers, heads, parts)
        if width not in (0, parts.width):
            raise KAdapterLoadError(
                f"'{source.path}': its adapters are for backbones of different widths, {width} and {parts.width}."
            )
        if parts.fusion == "concat" and name not in FUSED.values():
            parts.state = before
            del parts.configs[name]
            source.leave([tensor for tensor in source.targets if tensor.startswith(f"{prefix}.")], NOT_FUSED)
    parts.kinds = {name: name for name in parts.configs}
    if parts.fusion == "concat":
        _read_fusion(source, parts)
    _read_head(source, parts)
    return parts


def _read_fusion(source: Source, parts: Parts) -> None:
    width = parts.width
    for short, name in FUSED.items():
        if name in parts.configs:
            parts.linear(source, f"task_dense_{short}", width, 2 * width, f"fusion.states.{name}")
    if len(parts.configs) < 2:
        parts.linear(source, "task_dense", width, 2 * width, None)
        source.leave(["task_dense.weight", "task_dense.bias"], ONE_ADAPTER)
        return
    targets = [f"fusion.mix.{name}.weight" for name in FUSED.values()]
    both = source.take("task_dense.weight", (width, 2 * width), targets)
    parts.state |= dict(zip(targets, both.split(width, dim=1), strict=True))
    parts.state["fusion.bias"] = source.take("task_dense.bias", (width,), ["fusion.bias"])


def _read_head(source: Source, parts: Parts) -> None:
    width = parts.width
    if "classifier.weight" in source:
        parts.model_class = KAdapterForMultipleChoice
        parts.linear(source, "classifier", 1, width, "classifier")
    elif "dense.weight" in source:
        columns = source.shape("dense.weight")[1]
        pair = columns == 2 * width
        parts.model_class = KAdapterForRelationClassification if pair else KAdapterForEntityTyping
        parts.num_labels = source.shape("out_proj.weight")[0]
        parts.linear(source, "dense", width, 2 * width if pair else width, "dense")
        parts.linear(source, "out_proj", parts.num_labels, width, "out_proj")


def holds_backbone(source: Source) -> bool:
    """Whether the file of a K-Adapter includes the backbone, as written by `RobertaModelwithAdapter`."""
    return any(name.startswith("model.") for name in source.tensors)


def read_backbone(source: Source, expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Reads the backbone of the fine-tuning scripts' `PretrainedModel`; `expected` has our tensors, for their shapes."""
    if not holds_backbone(source):
        raise KAdapterLoadError(
            f"'{source.path}' does not hold a backbone of the original: no tensor's name starts with 'model.'."
        )
    taken = {}
    for name, tensor in expected.items():
        taken[f"backbone.{name}"] = source.take(f"model.{name}", tensor.shape, [f"backbone.{name}"])
    source.leave([name for name in source.tensors if name.startswith("model.pooler.")], NO_POOLER)
    source.leave({"model.embeddings.position_ids"} & source.tensors.keys(), NO_POSITIONS)
    return taken


def _count(source: Source, prefix: str, indices: set[int]) -> int:
    """The number of indices, which must be consecutive and start at 0."""
    gap = next((index for index in range(len(indices) + 1) if index not in indices), 0)
    if not indices or gap < len(indices):
        raise KAdapterLoadError(f"'{source.path}': tensors '{prefix}{gap}.…' are missing.")
    return len(indices)
