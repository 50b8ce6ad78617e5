"""K-Adapter: a frozen backbone, knowledge adapters beside it, and their fusion."""

import copy
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedModel, initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, can_return_tuple, logging

from .adapters_kadapter import KnowledgeAdapter, KnowledgeAdapterLayer, KnowledgeFusion
from .backbone_kadapter import drop_pooler, new_backbone
from .configuration_kadapter import KAdapterConfig, KAdapterConfigError, KnowledgeAdapterConfig, check_adapter_name
from .hub_kadapter import push_folder, push_kwargs
from .peft_kadapter import check_says_of_peft, load_peft_adapter, peft_parameters, plain_state_dict
from .repository_kadapter import RepositoryModel
from .sources_kadapter import adapter_file
from .storage_kadapter import (
    BackboneMismatchError,
    check_tensors,
    fingerprint,
    part_of,
    read_adapter,
    write_adapter,
)


logger = logging.get_logger(__name__)


@dataclass
class KAdapterModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): the fused states.
        backbone_last_hidden_state (`torch.FloatTensor` of that shape): the backbone's last.
        knowledge_states (`dict[str, torch.FloatTensor]`): each active adapter's output, of that shape.
        hidden_states, attentions (`tuple`, *optional*): the backbone's, as its own forward returns them.
    """

    last_hidden_state: torch.FloatTensor | None = None
    backbone_last_hidden_state: torch.FloatTensor | None = None
    knowledge_states: dict[str, torch.FloatTensor] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class KAdapterPreTrainedModel(RepositoryModel):
    """
    What every K-Adapter class shares: construction, knowledge adapters by name, freezing, saving and loading.

    `backbone`, `adapters` and `fusion` have the same names in every class, so that a repository saved from one loads
    into any other.
    """

    config_class = KAdapterConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["KnowledgeAdapterLayer"]

    def __init__(self, config: KAdapterConfig, backbone: PreTrainedModel | None = None):
        """
        Args:
            config: what to build.
            backbone: a loaded backbone to build on; without one, it is built from `config` with random weights, as
                every transformers class does. Use `from_backbone` or `from_pretrained` for trained ones.
        """
        super().__init__(config)
        # Where each part's weights came from, for `knowledge_summary`; "new" if it isn't here.
        self._sources: dict[str, str] = {} if backbone is None else {"backbone": "a loaded model"}
        if backbone is None:
            backbone = new_backbone(config.backbone_config)
        self._noted: dict[str, str] = {}
        # Whether the backbone was set to train, and whether the last save or load had it in the repository itself.
        self._backbone_trained = self._backbone_stored = False
        self._set_backbone(backbone)
        width = config.backbone_config.hidden_size
        self.adapters = nn.ModuleDict(
            {
                name: KnowledgeAdapter(adapter, width, config._attn_implementation)
                for name, adapter in config.knowledge_adapters.items()
            }
        )
        self.fusion = KnowledgeFusion(config.fusion, list(config.knowledge_adapters), width)

    def _set_backbone(self, backbone: PreTrainedModel) -> None:
        drop_pooler(backbone)
        for module in backbone.modules():  # or post_init would initialise it again
            module._is_hf_initialized = True
        self.backbone = backbone.base_model
        self.config.backbone_config = self.backbone.config

    def post_init(self) -> None:
        super().post_init()
        self._update_trainable()
        # FSDP makes a unit of each of these. The input embeddings can't be inside one: accelerate makes one of them
        # alone, and a language-model head needs those that it is tied to.
        embeddings = self.get_input_embeddings()
        path = next((name for name, module in self.backbone.named_modules() if module is embeddings), "").split(".")
        around = {type(self.backbone.get_submodule(".".join(path[:end]))).__name__ for end in range(len(path))}
        self._no_split_modules = set(self._no_split_modules or ()) - around

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """Trainer compares them with what a checkpoint lacks, and warns if it is something else."""
        tied = set(getattr(self, "all_tied_weights_keys", ()))
        if self._backbone_stored or any(parameter.requires_grad for parameter in self.backbone.parameters()):
            return tied
        return tied | {f"backbone.{name}" for name in self.backbone.state_dict()}

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, keys: set[str]) -> None:
        """Ignored: transformers sets what it has gathered."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KnowledgeAdapterLayer):
            for projection in (module.down_project, module.up_project):
                init.normal_(projection.weight, mean=0.0, std=module.initializer_range)
                init.zeros_(projection.bias)
        elif isinstance(module, KnowledgeFusion) and module.kind == "concat":
            init.zeros_(module.bias)
            for name in module.states:
                self._init_fusion_block(module, name)

    def _init_fusion_block(self, fusion: KnowledgeFusion, name: str) -> None:
        """A new block passes the backbone's state through, so that a new K-Adapter starts near its backbone."""
        state, mix = fusion.states[name], fusion.mix[name]
        identity = torch.eye(fusion.width, device=state.weight.device, dtype=state.weight.dtype)
        weight = torch.cat([identity, torch.zeros_like(identity)], dim=1)
        init.copy_(state.weight, weight + torch.randn_like(weight) * 2e-4)
        init.zeros_(state.bias)
        init.copy_(mix.weight, identity / 2)

    # ---- Embeddings and attention -----------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def set_attn_implementation(self, *args, **kwargs) -> None:
        super().set_attn_implementation(*args, **kwargs)
        for module in self.adapters.modules():
            if isinstance(module, KnowledgeAdapterLayer):
                module.encoder.config._attn_implementation = self.config._attn_implementation

    # ---- Knowledge adapters by name ---------------------------------------------------------------------------------

    @property
    def active_knowledge_adapters(self) -> list[str]:
        """The names of the adapters that take part in the forward pass, in the order of their fusion."""
        return list(self.config.active_knowledge_adapters)

    def set_active_knowledge_adapters(self, names: str | Iterable[str] | None) -> None:
        """Activates these adapters and no others; None or an empty list leaves the backbone alone."""
        names = [names] if isinstance(names, str) else list(names or [])
        for name in names:
            self._check_known(name)
        self.config.active_knowledge_adapters = list(dict.fromkeys(names))
        self._update_trainable()

    def add_knowledge_adapter(self, name: str, config: KnowledgeAdapterConfig | None = None) -> None:
        """
        Adds a new, untrained knowledge adapter and activates it.

        Raises:
            KAdapterConfigError: the name is taken or can't be one, or the configuration does not fit the backbone.
        """
        config = (config or KnowledgeAdapterConfig()).for_backbone(self.backbone.config, check_adapter_name(name))
        config.backbone_name_or_path = self.config.backbone_name_or_path
        config.backbone_fingerprint = self.backbone_fingerprint()
        self._insert_adapter(name, config)
        self.adapters[name].apply(self._init_weights)
        self._note_weights(f"adapters.{name}")

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
            source: a K-Adapter repository or folder, or one adapter's `.safetensors` file.
            name: which one, where the source has several; where it has one, what to call it here (by default as it
                was saved).
            trainable: whether it trains; by default it is frozen, as its knowledge is there already.
            ignore_backbone_mismatch: load it although it was trained on another backbone of the same width.
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
        self._check_trained_on_this(saved.config, path, ignore_backbone_mismatch)
        config = saved.config.for_backbone(self.backbone.config, check_adapter_name(name))
        with torch.device("meta"):
            adapter = KnowledgeAdapter(config, self.backbone.config.hidden_size, self.config._attn_implementation)
        tensors = {key.removeprefix(f"adapters.{saved.name}."): value for key, value in saved.tensors.items()}
        check_tensors({key: value.shape for key, value in adapter.state_dict().items()}, tensors, path)
        adapter.load_state_dict(tensors, assign=True)
        self._insert_adapter(name, config, adapter.to(self._own_device()))
        self._sources[f"adapters.{name}"] = os.fspath(source)
        self._note_weights(f"adapters.{name}")
        self.config.frozen_knowledge_adapters += [] if trainable else [name]
        self._update_trainable()
        return name

    def save_knowledge_adapter(self, path: str | os.PathLike, name: str) -> Path:
        """
        Saves one adapter: to `path` if it ends in `.safetensors`, else to `adapters/<name>.safetensors` in that folder.

        Its bytes are the same from whichever class it is saved.

        Returns:
            The file.
        """
        self._check_known(name)
        path = Path(path)
        if path.suffix != ".safetensors":
            path = path / "adapters" / f"{name}.safetensors"
        state = plain_state_dict(self)
        self._update_fingerprints(state)
        write_adapter(path, name, self.config.knowledge_adapters[name], part_of(state, f"adapters.{name}"))
        return path

    def push_knowledge_adapter_to_hub(self, name: str, repo_id: str, **kwargs) -> CommitInfo:
        """
        Uploads one adapter and no other weights, as a repository of its own: `load_knowledge_adapter(repo_id)` reads it,
        and `AutoModel.from_pretrained(repo_id)` gives it beside the backbone that it was trained on.

        Args:
            repo_id: the repository; made if needed. One that holds another model is left as it is.
            kwargs: as in `push_to_hub`.

        Raises:
            KAdapterLoadError: the repository holds more than an adapter of this name.
            BackboneMismatchError: the adapter was trained on a backbone that exists in this model alone; push the whole
                model with `push_to_hub`, which takes the backbone along.
            HfHubHTTPError: the Hub refused.
        """
        self._check_known(name)
        state = plain_state_dict(self)
        self._update_fingerprints(state)
        trained_on = self.config.knowledge_adapters[name].backbone_fingerprint
        if trained_on == self.backbone_fingerprint(state):
            if self._backbone_trained or self._fingerprint_if_as_named(part_of(state, "backbone")) is None:
                raise BackboneMismatchError(
                    f"the knowledge adapter '{name}' was trained on a backbone that differs from "
                    f"'{self.config.backbone_name_or_path}' and would be of no use without it: push both with push_to_hub."
                )
        with tempfile.TemporaryDirectory() as folder:
            write_adapter_repository(Path(folder), name, self.config, part_of(state, f"adapters.{name}"))
            return push_folder(Path(folder), repo_id, adapter=name, **push_kwargs(kwargs))

    def delete_knowledge_adapter(self, name: str) -> None:
        """Removes an adapter and its part of the fusion; the others' weights stay as they are."""
        self._check_known(name)
        del self.adapters[name], self.config.knowledge_adapters[name]
        self.fusion.remove(name)
        for names in (self.config.active_knowledge_adapters, self.config.frozen_knowledge_adapters):
            if name in names:
                names.remove(name)
        self._sources.pop(f"adapters.{name}", None)
        self._update_trainable()

    def knowledge_summary(self) -> str:
        """
        A table for people: the parameters of each part, how many of them train, their dtype and device, and where they
        came from (a repository, a folder, a file, or `new`).
        """
        parts: dict[str, tuple[str, Iterable[nn.Module]]] = {"backbone": ("backbone", [self.backbone])}
        for name, adapter in self.adapters.items():
            state = "" if name in self.config.active_knowledge_adapters else " (inactive)"
            parts[f"adapters.{name}"] = (f"adapter {name}{state}", [adapter])
        parts["fusion"] = (f"fusion ({self.config.fusion})", [self.fusion])
        parts["head"] = ("head", self._head_parts())
        rows = [("part", "parameters", "trainable", "dtype", "device", "source")]
        seen: set[nn.Parameter] = set()  # tied weights count once, as the backbone's
        total = trainable = 0
        for part, (label, modules) in parts.items():
            own = {parameter for module in modules for parameter in module.parameters()} - seen
            if not own:
                continue
            seen |= own
            count = sum(parameter.numel() for parameter in own)
            training = sum(parameter.numel() for parameter in own if parameter.requires_grad)
            dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in own})
            devices = sorted({str(parameter.device) for parameter in own})
            source = self._sources.get(part, "new")
            rows.append((label, f"{count:,}", f"{training:,}", ", ".join(dtypes), ", ".join(devices), source))
            total, trainable = total + count, trainable + training
        rows.append(("total", f"{total:,}", f"{trainable:,}", "", "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = []
        for row in rows:
            cells = [
                cell.rjust(width) if column in (1, 2) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(lines)

    def _insert_adapter(
        self, name: str, config: KnowledgeAdapterConfig, adapter: KnowledgeAdapter | None = None
    ) -> None:
        taken = [known for known in self.adapters if known.casefold() == name.casefold()]
        if taken:
            raise KAdapterConfigError(
                f"there is a knowledge adapter '{taken[0]}' already; delete it first, or choose another name than '{name}'."
            )
        if adapter is None:
            adapter = KnowledgeAdapter(config, self.backbone.config.hidden_size, self.config._attn_implementation)
            adapter.to(self._own_device(), self._own_dtype())
        self.adapters[name] = adapter.train(self.training)
        dtype = self._own_dtype()
        self.fusion.add(name)
        self.fusion.to(self._own_device(), dtype)
        if self.config.fusion == "concat":
            self._init_fusion_block(self.fusion, name)
        self.config.knowledge_adapters[name] = config
        self.config.active_knowledge_adapters.append(name)
        self._update_trainable()

    def _check_known(self, name: str) -> None:
        if name not in self.adapters:
            raise KAdapterConfigError(f"there is no knowledge adapter '{name}'; there are {list(self.adapters)}.")

    def _check_trained_on_this(self, config: KnowledgeAdapterConfig, path: Path, ignore: bool) -> None:
        wanted, here = config.backbone_fingerprint, self.backbone_fingerprint()
        if wanted is None:
            logger.warning(
                f"the knowledge adapter in '{path}' does not say which weights its backbone had: that it was trained on "
                f"'{self.config.backbone_name_or_path}' could not be verified."
            )
        if wanted in (None, here):
            return
        message = (
            f"the knowledge adapter in '{path}' was trained on the backbone '{config.backbone_name_or_path}' with "
            f"fingerprint {wanted[:12]}…, and this model's backbone '{self.config.backbone_name_or_path}' has "
            f"{here[:12]}…"
        )
        if not ignore:
            raise BackboneMismatchError(f"{message}; to load it nevertheless, pass ignore_backbone_mismatch=True.")
        logger.warning(f"{message}; it is loaded nevertheless.")

    # ---- Fingerprints -----------------------------------------------------------------------------------------------

    def _note_weights(self, *parts: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Remembers what a part's weights are now (`"backbone"` or `"adapters.<name>"`), to see later if they changed."""
        state = plain_state_dict(self) if state_dict is None else state_dict
        for part in parts:
            tensors = part_of(state, part).values()
            if not any(tensor.is_meta for tensor in tensors):
                self._noted[part] = fingerprint(tensors)

    def backbone_fingerprint(self, state_dict: dict[str, torch.Tensor] | None = None) -> str:
        """What identifies the backbone's weights, as they are stored: see `fingerprint` in `storage_kadapter.py`."""
        tensors = part_of(plain_state_dict(self, state_dict), "backbone").values()
        now = None if any(tensor.is_meta for tensor in tensors) else fingerprint(tensors)
        if self.config.backbone_fingerprint is None or now not in (None, self._noted.get("backbone")):
            return now or ""
        return self.config.backbone_fingerprint

    def _update_fingerprints(self, state_dict: dict[str, torch.Tensor]) -> None:
        """An adapter whose weights have changed was trained on the backbone as it is now."""
        for name, adapter in self.config.knowledge_adapters.items():
            part = f"adapters.{name}"
            changed = fingerprint(part_of(state_dict, part).values()) != self._noted.get(part)
            # One that was loaded without a fingerprint keeps none: nobody knows which backbone it was trained on.
            if changed or (adapter.backbone_fingerprint is None and part not in self._sources):
                adapter.backbone_fingerprint = self.backbone_fingerprint(state_dict)
                adapter.backbone_name_or_path = self.config.backbone_name_or_path

    def load_adapter(self, peft_model_id: Any = None, adapter_name: str | None = None, **kwargs) -> Any:
        """Loads a PEFT adapter, as `PreTrainedModel.load_adapter`; for a knowledge adapter, see `load_knowledge_adapter`."""
        return load_peft_adapter(self, super().load_adapter, peft_model_id, adapter_name, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args, **kwargs) -> Any:
        """As `nn.Module.load_state_dict`; also refuses a checkpoint that can't restore this model's PEFT adapter."""
        check_says_of_peft(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    # ---- Freezing ---------------------------------------------------------------------------------------------------

    def freeze_backbone(self) -> None:
        """The backbone does not train: no gradients, no dropout."""
        self.config.freeze_backbone = True
        self._update_trainable()

    def unfreeze_backbone(self) -> None:
        """The backbone trains. Saving then stores it, as it is no longer the one that it was loaded from."""
        self.config.freeze_backbone = False
        self._update_trainable()

    def freeze_knowledge_adapters(self, names: str | Iterable[str] | None = None) -> None:
        """These adapters (by default all) don't train."""
        self._set_frozen(names, True)

    def unfreeze_knowledge_adapters(self, names: str | Iterable[str] | None = None) -> None:
        """These adapters (by default all) train, as far as they are active."""
        self._set_frozen(names, False)

    def _set_frozen(self, names: str | Iterable[str] | None, frozen: bool) -> None:
        names = [names] if isinstance(names, str) else list(self.adapters if names is None else names)
        for name in names:
            self._check_known(name)
        kept = [name for name in self.config.frozen_knowledge_adapters if name not in names]
        self.config.frozen_knowledge_adapters = kept + (names if frozen else [])
        self._update_trainable()

    def freeze_head(self) -> None:
        """The fusion and the task head don't train."""
        self.config.freeze_head = True
        self._update_trainable()

    def unfreeze_head(self) -> None:
        """The fusion and the task head train."""
        self.config.freeze_head = False
        self._update_trainable()

    def train_knowledge_adapter(self, name: str, train_head: bool = False) -> None:
        """
        This adapter trains and everything else is frozen.

        Args:
            train_head: also train the fusion and the task head. Pre-training an adapter needs that where they are new;
                they are thrown away afterwards (paper, section 3.3).
        """
        self._check_known(name)
        if name not in self.config.active_knowledge_adapters:
            self.config.active_knowledge_adapters.append(name)
        self.config.freeze_backbone = True
        self.config.freeze_head = not train_head
        self.config.frozen_knowledge_adapters = [other for other in self.adapters if other != name]
        self._update_trainable()

    def _update_trainable(self) -> None:
        """Sets `requires_grad` from the configuration; what a forward pass doesn't use doesn't train (DDP insists)."""
        config, active = self.config, self.config.active_knowledge_adapters
        peft = peft_parameters(self)  # PEFT decides about its own

        def set_trainable(module: nn.Module, trainable: bool) -> None:
            for parameter in module.parameters():
                if parameter.is_floating_point() and parameter not in peft:
                    parameter.requires_grad_(trainable)

        head = not config.freeze_head
        for part in self._head_parts():
            set_trainable(part, head)
        # After the head: a language-model head shares its output weights with the backbone's embeddings.
        set_trainable(self.backbone, not config.freeze_backbone)
        for name, adapter in self.adapters.items():
            set_trainable(adapter, name in active and name not in config.frozen_knowledge_adapters)
        if config.fusion == "concat":
            for name in self.adapters:
                set_trainable(self.fusion.states[name], head and name in active)
                set_trainable(self.fusion.mix[name], head and name in active and len(active) > 1)
            self.fusion.bias.requires_grad_(head and len(active) > 1)
        self._settle_modes()

    def _head_parts(self) -> Iterator[nn.Module]:
        return (child for name, child in self.named_children() if name not in ("backbone", "adapters", "fusion"))

    def train(self, mode: bool = True) -> "KAdapterPreTrainedModel":
        """As `nn.Module.train`, but what is frozen stays in evaluation mode: no dropout in it."""
        super().train(mode)
        self._settle_modes()
        if self.backbone.training and not self._backbone_trained:
            own = set(self.backbone.parameters()) - peft_parameters(self)
            self._backbone_trained = any(parameter.requires_grad for parameter in own)
        return self

    def _settle_modes(self) -> None:
        groups: list[list[nn.Module]] = [[self.backbone], *([adapter] for adapter in self.adapters.values())]
        for parts in (*groups, list(self._head_parts())):
            mode = self.training and any(p.requires_grad for part in parts for p in part.parameters())
            for part in parts:
                if part.training != mode:
                    part.train(mode)

    # ---- Forward ----------------------------------------------------------------------------------------------------

    def _encode(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
        """The backbone's last state, the active adapters' outputs by name, and the backbone's own output."""
        read = self.backbone_states_read()
        given = kwargs.pop("backbone_states", None)
        if given is not None:
            states, output = self._given_states(given, read)
        else:
            states, output = self._run_backbone(
                read, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
            )
        knowledge = {
            name: self.adapters[name](states, attention_mask) for name in self.config.active_knowledge_adapters
        }
        return output["last_hidden_state"], knowledge, output

    def backbone_states_read(self) -> list[int]:
        """The indices of the backbone's hidden states that the active adapters read, in ascending order."""
        active = [self.adapters[name] for name in self.config.active_knowledge_adapters]
        return sorted({layer for adapter in active for layer in adapter.config.backbone_layers})

    def _given_states(self, given: torch.Tensor, read: list[int]) -> tuple[dict[int, torch.Tensor], ModelOutput]:
        """`backbone_states`, as a caller computed them before: the states that are read, then the backbone's last."""
        if given.dim() != 4 or given.shape[1] != len(read) + 1:
            raise ValueError(
                f"backbone_states must be of shape (batch, {len(read) + 1}, length, width), the states {read} and the "
                f"backbone's last; not {tuple(given.shape)}."
            )
        given = given.to(self._own_dtype())
        output = BaseModelOutput(last_hidden_state=given[:, -1])
        return {layer: given[:, place] for place, layer in enumerate(read)}, output

    def _run_backbone(
        self,
        read: list[int],
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        **kwargs,
    ) -> tuple[Any, Any]:
        active = [self.adapters[name] for name in self.config.active_knowledge_adapters]
        if position_ids is None and any(adapter.config.attend_to_padding for adapter in active):
            position_ids = self._running_position_ids(input_ids if input_ids is not None else inputs_embeds)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        inputs |= {"token_type_ids": token_type_ids, "position_ids": position_ids}
        inputs = {key: value for key, value in inputs.items() if value is not None}
        kwargs.pop("num_items_in_batch", None)
        wants_all = kwargs.pop("output_hidden_states", None)
        wants_all = self.config.output_hidden_states if wants_all is None else wants_all
        # Gradient checkpointing makes the embeddings' output require gradients, and so all that follows from it.
        trains = any(parameter.requires_grad for parameter in self.backbone.parameters())
        trains = trains or not self.training or (inputs_embeds is not None and inputs_embeds.requires_grad)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            # Newer versions of transformers keep only the states whose indices they are given, older ones keep all.
            output = self.backbone(
                **inputs, **kwargs, output_hidden_states=True if wants_all else read, return_dict=True
            )
        states = output.get("hidden_states")
        if read and (states is None or len(states) <= read[-1]):
            raise KAdapterConfigError(
                f"the backbone ({self.backbone.config.model_type}) returned {len(states or ())} hidden states, and its "
                f"adapters read number {read[-1]}; it can't be a backbone."
            )
        if not wants_all:
            output["hidden_states"] = None
        return states, output

    def _running_position_ids(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """Position ids that run on over the padding, for backbones that number positions from their pad id on."""
        embeddings = getattr(self.backbone, "embeddings", None)
        if not hasattr(embeddings, "create_position_ids_from_input_ids"):
            return None
        start = embeddings.padding_idx + 1
        return torch.arange(start, start + inputs.shape[1], device=inputs.device).expand(inputs.shape[:2])


class KAdapterModel(KAdapterPreTrainedModel):
    """The fused states of the backbone and its active knowledge adapters, without a task head."""

    def __init__(self, config: KAdapterConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs,
    ) -> KAdapterModelOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids, position_ids: `(batch, length)`, as the backbone takes them.
            inputs_embeds: `(batch, length, hidden_size)`, instead of `input_ids`.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`; and `backbone_states`, `(batch, states,
                length, hidden_size)`: the `backbone_states_read` and the backbone's last, computed before. The backbone
                does not run then.
        """
        state, knowledge, output = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )
        return KAdapterModelOutput(
            last_hidden_state=self.fusion(state, knowledge),
            backbone_last_hidden_state=state,
            knowledge_states=knowledge or None,
            hidden_states=output.hidden_states,
            attentions=output.get("attentions"),
        )


def write_adapter_repository(
    folder: Path, name: str, config: KAdapterConfig, tensors: Mapping[str, torch.Tensor]
) -> None:
    """
    Writes a repository with one adapter and no other weights, without the backbone's.

    Args:
        config: of a K-Adapter with this adapter in it.
        tensors: the adapter's, with names that begin with `adapters.<name>.`.
    """
    adapter = config.knowledge_adapters[name]
    backbone = adapter.backbone_name_or_path or config.backbone_name_or_path
    alone = KAdapterConfig(
        backbone_name_or_path=backbone,
        backbone_revision=config.backbone_revision if backbone == config.backbone_name_or_path else None,
        backbone_fingerprint=adapter.backbone_fingerprint,
        backbone_config=copy.deepcopy(config.backbone_config),
        knowledge_adapters={name: adapter},
        frozen_knowledge_adapters=[name],
        fusion="add",  # which has no weights: what is loaded is all trained
        architectures=[KAdapterModel.__name__],
        dtype=str(next(iter(tensors.values())).dtype).removeprefix("torch."),
    )
    with torch.device("meta"), init.no_init_weights():
        model = KAdapterModel(alone)
    dtype = config.backbone_config.dtype
    if dtype is not None:
        model.backbone.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    model._write_repository(folder, dict(tensors))
