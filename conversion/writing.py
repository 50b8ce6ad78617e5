"""Conversion of the original's checkpoints to a K-Adapter repository; the backbone's weights are optional."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.sha import sha_fileobj
from transformers import AutoConfig, PreTrainedConfig

from kadapter_cli._names import output_problem

from ..modeling.backbone_kadapter import load_quietly
from ..modeling.compat_kadapter import without_initialization
from ..modeling.configuration_kadapter import DEFAULT_BACKBONE, KAdapterConfig
from ..modeling.format_kadapter import (
    BACKBONE_FILE,
    BackboneMismatchError,
    KAdapterConfigError,
    KAdapterLoadError,
    equal_bits,
    file_of,
    fingerprint,
    part_of,
)
from ..modeling.fusion_kadapter import ConcatFusion
from ..modeling.loading_kadapter import backbone_place
from ..modeling.reading_kadapter import check_tensors, read_tensors
from ..modeling.saving_kadapter import write_repository
from ..modeling.sources_kadapter import commit_of
from .original import (
    Parts,
    Source,
    holds_backbone,
    is_kadapter,
    read_backbone,
    read_kadapter,
    read_pretrained,
)
from .reading import read_checkpoint


ORIGIN = "microsoft/K-Adapter"
LAYERS = (0, 11, 22)
HEADS = 12


@dataclass
class Conversion:
    """
    The result of `convert`.

    Args:
        output: the output folder.
        model_class: the model class of the repository.
        sources: the files that were read; `targets` maps each tensor to its new names, and `left_out` to the reason for
            dropping it.
        backbone_known: whether the output has the backbone's fingerprint, because its weights were available.
    """

    output: Path
    model_class: str
    sources: list[Source]
    backbone_known: bool

    @property
    def files(self) -> dict[str, int]:
        """The weight files written, with their sizes in bytes."""
        paths = sorted(self.output.rglob("*.safetensors"))
        return {path.relative_to(self.output).as_posix(): path.stat().st_size for path in paths}


def check_new(output: Path) -> None:
    """Raises `KAdapterLoadError` unless `output` is an empty folder, or can be created."""
    problem = output_problem(output)
    if problem is not None:
        raise KAdapterLoadError(problem)


def convert(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    name: str | None = None,
    layers: Sequence[int] = LAYERS,
    heads: int = HEADS,
    backbone: str | os.PathLike = DEFAULT_BACKBONE,
    with_head: bool = False,
    backbone_weights: str | os.PathLike | None = None,
    task: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
) -> Conversion:
    """
    Converts a checkpoint of microsoft/K-Adapter to a K-Adapter repository.

    The kind of checkpoint and the sizes are read from the tensors; the rest is given by the arguments. The same input always
    produces the same bytes.

    Args:
        checkpoint: the `pytorch_model.bin` of a pre-trained adapter or of a fine-tuned model (`pytorch_task_model.bin` for
            FIGER), which includes adapters, fusion and task head.
        output: the output folder, which must be new or empty.
        name: name of a pre-trained adapter; by default `factual` or `linguistic`, depending on its head.
        layers: the backbone states that the adapters read (`adapter_list` in the original).
        heads: attention heads in the adapters' transformer layers.
        backbone: repository or folder of the backbone that the adapters were trained on. Its configuration is sufficient
            (roberta-large's is built in); if the weights are available locally, their fingerprint is recorded too.
        with_head: keep the relation head of a pre-trained factual adapter.
        backbone_weights: the changed backbone that was saved with a fine-tuned model.
        task: `KAdapterConfig.task` of a fine-tuned model: the name of its task, the markers and maximum length of its input.
        labels: the labels of a fine-tuned model, in the order of its outputs.

    Raises:
        KAdapterLoadError: a file is missing, damaged, unsafe or of the wrong kind; a tensor is missing, unknown or has an
            impossible shape; or `output` is not empty.
        KAdapterConfigError: an argument does not fit the tensors or the backbone.
    """
    output = Path(output)
    check_new(output)
    layers = list(layers)
    source = _read(checkpoint)
    if is_kadapter(source):
        if name is not None:
            raise KAdapterConfigError(f"'{source.path}' has several adapters, whose names are fixed: omit the name.")
        parts = read_kadapter(source, layers, heads)
        weights = _backbone_source(source, backbone_weights)
    else:
        if backbone_weights is not None:
            raise KAdapterConfigError(f"'{source.path}' is a single adapter, which has no backbone weights.")
        parts = read_pretrained(source, name, with_head, layers, heads)
        weights = None
    model = _empty_model(parts, backbone, task, labels)
    sources = [source] if weights is None or weights is source else [source, weights]
    if weights is not None:
        parts.state |= read_backbone(weights, model.backbone.state_dict())
    for read in sources:
        read.check_all_known()
        read.tensors.clear()  # frees the tensors that were left out
    _add_new_fusion(parts)
    _describe(model.config, parts, source, weights)
    _write(model, parts.state, source.path, output)
    return Conversion(output, type(model).__name__, sources, model.config.backbone_fingerprint is not None)


def verify(conversion: Conversion) -> int:
    """
    Reads the input and output files again and compares all converted tensors, bit for bit.

    Returns:
        The number of tensors compared.

    Raises:
        KAdapterLoadError: a file can't be read, or a tensor differs.
    """
    written: dict[str, torch.Tensor] = {}
    for file in conversion.files:
        written |= read_tensors(conversion.output / file)[0]
    count = 0
    for source in conversion.sources:
        tensors = read_checkpoint(source.path)
        for name, targets in source.targets.items():
            found = [written[target] for target in targets if target in written]
            # The only tensor that is split is a matrix, by columns.
            same = len(found) == len(targets) and found[0].dtype == tensors[name].dtype
            if not same or not equal_bits({name: torch.cat(found, dim=-1)}, {name: tensors[name]}):
                raise KAdapterLoadError(
                    f"'{conversion.output}': tensor '{targets[0]}' is not equal to '{name}' of '{source.path}'."
                )
            count += 1
    return count


def _read(path: str | os.PathLike) -> Source:
    path = Path(path)
    return Source(path, read_checkpoint(path))


def _backbone_source(source: Source, backbone_weights: str | os.PathLike | None) -> Source:
    """The file with the backbone: the K-Adapter's own, or the one given."""
    inside = holds_backbone(source)
    if inside and backbone_weights is not None:
        raise KAdapterConfigError(f"'{source.path}' includes a backbone: omit '{backbone_weights}'.")
    if not inside and backbone_weights is None:
        raise KAdapterLoadError(
            f"'{source.path}' is a fine-tuned model without its backbone, which the original saved as "
            "pytorch_pretrained_model.bin in the same folder: pass that file with --backbone-weights."
        )
    return source if backbone_weights is None else _read(backbone_weights)


def _empty_model(
    parts: Parts, backbone: str | os.PathLike, task: Mapping[str, Any] | None, labels: Sequence[str] | None
) -> Any:
    """A model of the right class and configuration on the meta device."""
    fields: dict[str, Any] = {} if task is None else {"task": dict(task)}
    if parts.num_labels is not None and labels is not None:
        if len(labels) != parts.num_labels:
            raise KAdapterConfigError(f"the checkpoint has {parts.num_labels} labels, not {len(labels)}.")
        fields["id2label"] = dict(enumerate(labels))
        fields["label2id"] = {label: number for number, label in enumerate(labels)}
    elif parts.num_labels is not None:
        fields["num_labels"] = parts.num_labels
    config = KAdapterConfig(
        backbone_name_or_path=backbone_place(backbone),
        backbone_config=_backbone_config(backbone),
        knowledge_adapters=parts.configs,
        frozen_knowledge_adapters=list(parts.configs),
        fusion=parts.fusion,
        **fields,
    )
    if config.hidden_size != parts.width:
        raise KAdapterConfigError(
            f"the adapters are for a backbone of width {parts.width}, but '{backbone}' has width {config.hidden_size}."
        )
    with torch.device("meta"), without_initialization():
        return parts.model_class(config)


def _backbone_config(backbone: str | os.PathLike) -> PreTrainedConfig | None:
    if os.fspath(backbone) == DEFAULT_BACKBONE:
        return None  # built into KAdapterConfig
    try:
        return AutoConfig.from_pretrained(backbone)
    except Exception as error:  # a foreign configuration class may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise KAdapterLoadError(f"the configuration of the backbone '{backbone}' can't be read: {reason}") from error


def _describe(config: KAdapterConfig, parts: Parts, source: Source, weights: Source | None) -> None:
    """
    Records the backbone and the provenance of each adapter in the configuration.

    A backbone that is identical, bit for bit, to the named one is not stored.
    """
    name = config.backbone_name_or_path or ""
    reference = _backbone_at_hand(config)
    own = part_of(parts.state, "backbone")
    named = None if reference is None else fingerprint(reference.values())
    if weights is not None and reference is not None and equal_bits(own, reference):
        same = [tensor for tensor in weights.targets if tensor.startswith("model.")]
        weights.leave(same, f"identical to '{name}', bit for bit, and therefore not stored")
        parts.state = {tensor: value for tensor, value in parts.state.items() if tensor not in own}
        own = {}
    config.backbone_fingerprint = fingerprint(own.values()) if own else named
    config.backbone_revision = None if named is None else commit_of(name)
    with source.path.open("rb") as file:
        sha256 = sha_fileobj(file).hex()
    for adapter, adapter_config in (config.knowledge_adapters or {}).items():
        adapter_config.backbone_name_or_path = name
        # The adapters of a changed backbone may have been trained before or after the change.
        adapter_config.backbone_fingerprint = None if own else named
        adapter_config.provenance = {
            "origin": ORIGIN,
            "kind": parts.kinds[adapter],
            "file": source.path.name,
            "sha256": sha256,
        }


def _backbone_at_hand(config: KAdapterConfig) -> dict[str, torch.Tensor] | None:
    """The tensors of the named backbone, if they are available locally."""
    try:
        named = load_quietly(config)
    except BackboneMismatchError:
        raise
    except KAdapterLoadError:
        return None
    return {f"backbone.{tensor}": value for tensor, value in named.state_dict().items()}


def _add_new_fusion(parts: Parts) -> None:
    """Initialises the fusion weights that the checkpoint lacks, so that the fusion passes the backbone's state through."""
    if parts.fusion != ConcatFusion.kind:
        return
    fusion = ConcatFusion(parts.width, start=0.0).to(next(iter(parts.state.values())).dtype)
    fusion.init_shared()
    for name in parts.configs:
        fusion.add(name)
        fusion.init_adapter(name, noise=0.0)  # the same input gives the same bytes
    parts.state = fusion.state_dict(prefix="fusion.") | parts.state


def _write(model: Any, state: dict[str, torch.Tensor], path: Path, output: Path) -> None:
    """Like `save_pretrained`, but with these tensors, as the model is on the meta device."""
    stored = part_of(state, "backbone")
    expected = model.state_dict()
    check_tensors(
        {name: own for name, own in expected.items() if stored or file_of(name) != BACKBONE_FILE}, state, path
    )
    model.config.architectures = [type(model).__name__]
    own = next(tensor for name, tensor in state.items() if name not in stored)
    model.config.dtype = str(own.dtype).removeprefix("torch.")
    model.backbone.to(next(iter(stored.values()), own).dtype)
    write_repository(model, output, state)
