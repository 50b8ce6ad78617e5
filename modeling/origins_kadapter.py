"""The source of each part of a K-Adapter, and whether its weights have changed since."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .backbone_kadapter import is_opaque, load_quietly
from .configuration_kadapter import KAdapterConfig
from .format_kadapter import checksum, equal_bits, fingerprint, part_of
from .sources_kadapter import snapshot_of


class Origins:
    """
    The origins of a model's parts: `"backbone"`, `"adapters.<name>"`, `"fusion"` and `"head"`. The state dicts that its
    methods take are those of `plain_state_dict`.

    Attributes:
        sources: the repository, folder or file that each part came from, unless it is new.
        fingerprints: the fingerprint of each part when it was loaded or last saved.
        backbone_trained: whether the backbone was ever set to train. A save then stores it.
        backbone_stored: whether the repository of the last save or load stores the backbone.
        backbone_kwargs: arguments of `from_pretrained` to load the named backbone again.
        backbone_dtype: the dtype to save for a backbone that was cast for this machine only.
    """

    def __init__(self):
        self.sources: dict[str, Any] = {}
        self.fingerprints: dict[str, str] = {}
        # The last comparison with the named backbone: what was compared, and the fingerprint if both were the same.
        self._as_named: tuple[Any, str | None] | None = None
        self.backbone_trained = False
        self.backbone_stored = False
        self.backbone_kwargs: dict[str, Any] = {}
        self.backbone_dtype: torch.dtype | None = None

    def note_weights(self, state_dict: Mapping[str, torch.Tensor], *parts: str) -> None:
        """Remembers the weights that these parts have now."""
        for part in parts:
            now = _fingerprint(state_dict, part)
            if now is not None:
                self.fingerprints[part] = now

    def is_changed(self, state_dict: Mapping[str, torch.Tensor], part: str) -> bool:
        """Whether the weights of a part differ from those noted. Weights that can't be read count as unchanged."""
        now = _fingerprint(state_dict, part)
        return now is not None and now != self.fingerprints.get(part)

    def backbone_fingerprint(self, model: Any, state_dict: Mapping[str, torch.Tensor]) -> str:
        """The fingerprint of the named backbone, if the present one is the same or was only cast; else of the present."""
        if model.config.backbone_fingerprint is not None and not self.is_changed(state_dict, "backbone"):
            return model.config.backbone_fingerprint
        named = None
        if not self.backbone_trained:
            named = self.fingerprint_if_as_named(model.backbone, state_dict, model.config)
        return named or _fingerprint(state_dict, "backbone") or ""

    def update_adapters(self, model: Any, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Records that the adapters that have changed were trained on the present backbone."""
        config = model.config
        for name, adapter in config.knowledge_adapters.items():
            part = f"adapters.{name}"
            # For an adapter that was loaded without a fingerprint, the backbone stays unknown.
            never_set = adapter.backbone_fingerprint is None and part not in self.sources
            if never_set or self.is_changed(state_dict, part):
                adapter.backbone_fingerprint = self.backbone_fingerprint(model, state_dict)
                adapter.backbone_name_or_path = config.backbone_name_or_path

    def fingerprint_if_as_named(
        self, backbone: PreTrainedModel, state_dict: Mapping[str, torch.Tensor], config: KAdapterConfig
    ) -> str | None:
        """
        The fingerprint of the backbone that `config` names, if the present one is the same, bit for bit, after a cast; None
        if they differ, or if the named one is not on this machine. Only the first comparison reads the named one.
        Quantised and offloaded weights can't be compared, nor trained: they count as unchanged.
        """
        tensors = part_of(state_dict, "backbone")
        opaque = is_opaque(backbone)
        proof = None if opaque else (checksum(tensors), _files_of_backbone(config, self.backbone_kwargs))
        if self._as_named is not None and self._as_named[0] == proof:
            return self._as_named[1]
        try:
            reference = load_quietly(config, **self.backbone_kwargs).state_dict()
        except Exception:  # for whatever reason: the present weights must not be lost
            return config.backbone_fingerprint if opaque else None
        same = opaque or equal_bits(tensors, {f"backbone.{name}": tensor for name, tensor in reference.items()})
        named = fingerprint(reference.values()) if same else None
        if proof is not None:
            self._as_named = proof, named
        return named


def _fingerprint(state_dict: Mapping[str, torch.Tensor], part: str) -> str | None:
    tensors = part_of(state_dict, part).values()
    try:
        return None if any(tensor.is_meta for tensor in tensors) else fingerprint(tensors)
    except NotImplementedError:  # the values of torchao's tensors can't be read
        return None


def _files_of_backbone(config: KAdapterConfig, backbone_kwargs: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of the named backbone, which tell whether it was replaced."""
    name = config.backbone_name_or_path
    if name is None:
        return []
    folder = name if os.path.isdir(name) else snapshot_of(name, revision=config.backbone_revision, **backbone_kwargs)
    files = [(path.name, path.stat()) for path in Path(folder).iterdir() if path.is_file()] if folder else []
    return sorted((name, found.st_size, found.st_mtime_ns) for name, found in files)
