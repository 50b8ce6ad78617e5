"""Adding, loading, averaging, saving and deleting the knowledge adapters of a model, by name."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters_kadapter import KnowledgeAdapter
from .averaging_kadapter import averaged
from .backbone_kadapter import check_trained_on
from .configuration_kadapter import KAdapterConfig, KnowledgeAdapterConfig
from .format_kadapter import KAdapterConfigError, adapter_metadata, adapter_path, check_adapter_name, part_of
from .loading_kadapter import fill_adapter
from .origins_kadapter import Origins
from .peft_kadapter import plain_state_dict, warn_of_peft_in
from .reading_kadapter import read_adapter
from .replacing_kadapter import write_tensors
from .sources_kadapter import adapter_file


class ManagingMixin(nn.Module):
    """The methods of `KAdapterPreTrainedModel` that add, load, average, save and delete knowledge adapters."""

    config: KAdapterConfig
    adapters: nn.ModuleDict
    origins: Origins

    def add_knowledge_adapter(self, name: str, config: KnowledgeAdapterConfig | dict[str, Any] | None = None) -> None:
        """
        Adds a new, untrained knowledge adapter and activates it; `config` may be a dict of fields.

        Raises:
            KAdapterConfigError: the name is taken or impossible, or the configuration does not fit the backbone.
        """
        if isinstance(config, dict):
            config = KnowledgeAdapterConfig(**config)
        config = self.config.adapter_config(name, config)
        config.backbone_name_or_path = self.config.backbone_name_or_path
        config.backbone_fingerprint = self.backbone_fingerprint()
        adapter = self._new_adapter(config).to(self.own_device(), self.own_dtype())
        self._insert_adapter(name, config, adapter)
        adapter.apply(self._init_weights)
        self.origins.note_weights(plain_state_dict(self), f"adapters.{name}")

    def load_knowledge_adapter(
        self,
        source: str | os.PathLike,
        name: str | None = None,
        *,
        trainable: bool = False,
        ignore_backbone_mismatch: bool = False,
        **hub_kwargs,
    ) -> str:
        """
        Loads a trained knowledge adapter and activates it.

        Args:
            source: a K-Adapter repository or folder, or the `.safetensors` file of an adapter.
            name: one of several adapters in the source; or, if it has a single one, its name in this model (by default the
                name that it was saved with).
            trainable: whether it trains; by default it is frozen.
            ignore_backbone_mismatch: load it even if it was trained on another backbone of the same width.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `subfolder`.

        Returns:
            The name.

        Raises:
            KAdapterLoadError: the source is missing, damaged, or not a knowledge adapter.
            BackboneMismatchError: the adapter was trained on another backbone.
            KAdapterConfigError: the name is taken.
        """
        path = adapter_file(source, name, **hub_kwargs)
        saved = read_adapter(path)
        name = saved.name if name is None else name
        trained_on = (saved.config.backbone_name_or_path, saved.config.backbone_fingerprint)
        here = (self.config.backbone_name_or_path, self.backbone_fingerprint())
        check_trained_on(f"the knowledge adapter in '{path}'", trained_on, here, ignore_backbone_mismatch)
        config = saved.config.for_backbone(self.backbone.config, check_adapter_name(name))
        with torch.device("meta"):
            adapter = self._new_adapter(config)
        fill_adapter(adapter, saved, path)
        self._insert_adapter(name, config, adapter.to(self.own_device()))
        self.origins.sources[f"adapters.{name}"] = os.fspath(source)
        self.origins.note_weights(plain_state_dict(self), f"adapters.{name}")
        self.config.frozen_knowledge_adapters += [] if trainable else [name]
        self._update_trainable()
        return name

    def average_knowledge_adapters(self, weights: Mapping[str, float], into: str) -> None:
        """
        Adds the weighted mean of trained adapters as a frozen adapter `into`, and activates it. Its provenance records the
        adapters and their weights.

        The adapters must have the same shape, and must have been trained on the same backbone. They should also have been
        trained from the same initial weights, as in model soups (Wortsman et al., ICML 2022).

        Args:
            weights: the weight of each adapter by name; the sum must be 1.

        Raises:
            KAdapterConfigError: the weights or the name are impossible, there is no such adapter, or the adapters are of
                different shapes, backbones or seeds.
        """
        config, tensors = averaged(self, weights)
        backbone = config.backbone_name_or_path, config.backbone_fingerprint
        self.add_knowledge_adapter(into, config)
        self.adapters[into].load_state_dict(tensors)
        config = self.config.knowledge_adapters[into]
        config.backbone_name_or_path, config.backbone_fingerprint = backbone
        self.origins.note_weights(plain_state_dict(self), f"adapters.{into}")
        self.freeze_knowledge_adapters(into)

    def save_knowledge_adapter(self, path: str | os.PathLike, name: str) -> Path:
        """
        Saves one adapter to `path`, or to `adapters/<name>.safetensors` in it if it does not end in `.safetensors`. Returns
        the file, whose bytes don't depend on the model class.

        Raises:
            OSError: the file can't be written.
            KAdapterConfigError: there is no adapter of this name.
        """
        self._checked_names(name)
        path = Path(path) if Path(path).suffix == ".safetensors" else Path(path, adapter_path(name))
        warn_of_peft_in(self, f"adapters.{name}")
        state = plain_state_dict(self)
        self.origins.update_adapters(self, state)
        tensors = part_of(state, f"adapters.{name}")
        write_tensors(path, tensors, adapter_metadata(name, self.config.knowledge_adapters[name].to_dict(), tensors))
        return path

    def delete_knowledge_adapter(self, name: str) -> None:
        """
        Removes an adapter and its part of the fusion. The weights of the others don't change.

        Raises:
            KAdapterConfigError: there is no adapter of this name.
        """
        self._checked_names(name)
        del self.adapters[name], self.config.knowledge_adapters[name]
        self.fusion.remove(name)
        for names in (self.config.active_knowledge_adapters, self.config.frozen_knowledge_adapters):
            if name in names:
                names.remove(name)
        for known in (self.origins.sources, self.origins.fingerprints):
            known.pop(f"adapters.{name}", None)
        self._update_trainable(thaw=False)

    def _insert_adapter(self, name: str, config: KnowledgeAdapterConfig, adapter: KnowledgeAdapter) -> None:
        taken = [known for known in self.adapters if known.casefold() == name.casefold()]
        if taken:
            raise KAdapterConfigError(
                f"there is a knowledge adapter '{taken[0]}' already; delete it first, or choose another name than '{name}'."
            )
        self.adapters[name] = adapter.train(self.training)
        dtype = self.own_dtype()
        self.fusion.add(name)
        self.fusion.to(self.own_device(), dtype)
        self.fusion.init_adapter(name)
        self.config.knowledge_adapters[name] = config
        self.config.active_knowledge_adapters.append(name)
        self._update_trainable()
