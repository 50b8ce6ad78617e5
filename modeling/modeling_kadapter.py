"""K-Adapter: a frozen backbone, knowledge adapters beside it, and their fusion."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .adapters_kadapter import KnowledgeAdapter, KnowledgeAdapterLayer
from .backbone_kadapter import drop_pooler, new_backbone
from .choosing_kadapter import ChoosingMixin
from .compat_kadapter import LOADING, mark_initialized, no_split_modules, parameters_of
from .configuration_kadapter import KAdapterConfig, KnowledgeAdapterConfig
from .encoding_kadapter import Encoded, EncodingMixin, encodes_inputs
from .format_kadapter import CARD_FILE, HEAD_FILE, file_of
from .freezing_kadapter import FreezingMixin
from .fusion_kadapter import FUSIONS, KnowledgeFusion
from .loading_kadapter import load_on_backbone, load_repository
from .managing_kadapter import ManagingMixin
from .origins_kadapter import Origins
from .peft_kadapter import check_restores_peft, load_peft_adapter, plain_state_dict
from .saving_kadapter import save_repository


Model = TypeVar("Model", bound="KAdapterPreTrainedModel")


@dataclass
class KAdapterModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): the fused states.
        backbone_last_hidden_state (`torch.FloatTensor` of the same shape): the backbone's last hidden state.
        knowledge_states (`ModelOutput`): the output of each active adapter by name, of the same shape.
        hidden_states, attentions (`tuple`, *optional*): the backbone's, if requested.
    """

    last_hidden_state: torch.FloatTensor | None = None
    backbone_last_hidden_state: torch.FloatTensor | None = None
    knowledge_states: ModelOutput | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class KAdapterPreTrainedModel(ManagingMixin, FreezingMixin, EncodingMixin, ChoosingMixin, PreTrainedModel):
    """
    Base class of all K-Adapter models. Each has `backbone`, `adapters` and `fusion`, so that a repository that was saved
    from one class loads into any other.
    """

    config: KAdapterConfig
    backbone: PreTrainedModel
    adapters: nn.ModuleDict
    fusion: KnowledgeFusion
    config_class = KAdapterConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["KnowledgeAdapterLayer"]
    # Whether the class uses the language-model head of the backbone.
    needs_lm_head = False

    def __init__(self, config: KAdapterConfig, backbone: PreTrainedModel | None = None):
        """
        Args:
            backbone: a loaded backbone; by default, one with random weights. Use `from_backbone` or `from_pretrained` for
                trained weights.
        """
        super().__init__(config)
        self.origins = Origins()
        if backbone is None:
            backbone = new_backbone(config.backbone_config)
        else:
            self.origins.sources["backbone"] = "a loaded model"
            mark_initialized(backbone)
        drop_pooler(backbone)
        self.backbone = backbone.base_model
        config.backbone_config = self.backbone.config
        width = self.backbone.config.hidden_size
        self.adapters = nn.ModuleDict(
            {name: self._new_adapter(adapter) for name, adapter in config.knowledge_adapters.items()}
        )
        self.fusion = FUSIONS[config.fusion](width, **(config.fusion_config or {}))
        for name in config.knowledge_adapters:
            self.fusion.add(name)

    def _new_adapter(self, config: KnowledgeAdapterConfig) -> KnowledgeAdapter:
        return KnowledgeAdapter(config, self.backbone.config.hidden_size, self.config)

    def post_init(self) -> None:
        super().post_init()
        self._update_trainable()
        self._no_split_modules = no_split_modules(self, around=self.get_input_embeddings())

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """The tensors that a checkpoint may lack; Trainer warns about others."""
        tied = set(getattr(self, "all_tied_weights_keys", ()))
        if self.origins.backbone_stored or any(parameter.requires_grad for parameter in self.backbone.parameters()):
            return tied
        return tied | {f"backbone.{name}" for name in self.backbone.state_dict()}

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, keys: set[str]) -> None:
        """Ignores the keys that transformers collects from submodules."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KnowledgeAdapterLayer):
            module.init_projections()
        elif isinstance(module, KnowledgeFusion):
            module.init_shared()
            for name in self.adapters:
                module.init_adapter(name)

    def _initialize_weights(self, module: nn.Module, *args) -> None:
        # For classes of others, transformers skips modules without parameters of their own. A fusion may have all of its
        # parameters in submodules.
        super()._initialize_weights(module, *(() if isinstance(module, KnowledgeFusion) else args))

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    # ---- Loading and saving -----------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls: type[Model],
        backbone: str | os.PathLike | PreTrainedModel,
        adapters: str | os.PathLike | list | dict[str, Any] | None = None,
        fusion: Literal["concat", "add", "gate", "attention"] | str = "concat",
        **kwargs,
    ) -> Model:
        """
        Builds a K-Adapter on a trained backbone.

        Args:
            backbone: a repository id, a folder, or a loaded model, which becomes part of the K-Adapter, without its pooler.
            adapters: trained adapters (a repository, folder or file, or a list of them), or a dict from names to such
                sources or to the `KnowledgeAdapterConfig`s of new adapters. Loaded adapters are frozen, new ones train.
            fusion: `"concat"`, `"add"`, `"gate"`, `"attention"` or one of your own; see `register_fusion`.
            kwargs: fields of `KAdapterConfig`, `num_labels`, and arguments of the backbone's own `from_pretrained`
                (`dtype`, `device_map`, `quantization_config`, `revision`, `token`, `attn_implementation`, …).

        Raises:
            KAdapterLoadError: the backbone or an adapter can't be found or loaded.
            KAdapterConfigError: the model can't be a backbone, or a field has an impossible value.
            BackboneMismatchError: an adapter was trained on another backbone.
        """
        with LOADING:
            return load_on_backbone(cls, backbone, adapters, fusion, kwargs)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        backbone: str | os.PathLike | PreTrainedModel | None = None,
        ignore_backbone_mismatch: bool = False,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ) -> Model:
        """
        Loads the adapters, fusion and head of a K-Adapter from its repository or folder, and its backbone from the place
        in config.json, unless the repository stores the backbone too.

        If the repository has no head, or that of another class, a new one is initialised, with a warning.

        Args:
            backbone: another place of the backbone, or a loaded backbone.
            ignore_backbone_mismatch: use the backbone even if its weights are not those that config.json identifies.
            ignore_mismatched_sizes: initialise the parts of the head whose shapes differ (another number of labels).
            kwargs: as in `PreTrainedModel.from_pretrained`: the place of the repository (`revision`, `token`, …), fields of
                the configuration (`num_labels`, `freeze_backbone`, …), and arguments for the backbone (`dtype`,
                `device_map`, `quantization_config`, …).

        Raises:
            KAdapterLoadError: something is missing or damaged.
            BackboneMismatchError: the backbone is not the one that this K-Adapter was trained on.
            KAdapterConfigError: a field of the configuration has an impossible value.
        """
        source = pretrained_model_name_or_path
        if source is None:
            options = {"config": config, "output_loading_info": output_loading_info}
            return super().from_pretrained(None, *model_args, **options, **kwargs)
        if torch.empty(0).device.type == "meta":
            raise RuntimeError(
                "You are using `from_pretrained` with a meta device context manager or default device, which would drop "
                "the loaded weights. To build a model without weights, use `from_config` or the class itself."
            )
        with LOADING:
            model, info = load_repository(
                cls, source, model_args, config, backbone, ignore_backbone_mismatch, ignore_mismatched_sizes, kwargs
            )
        return (model, info) if output_loading_info else model  # type: ignore[return-value]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        Saves the adapters, the fusion, the head and the configuration; the backbone only if it is not, bit for bit, the
        one that the configuration names. An interrupted save leaves the previous content of the folder loadable.

        Args:
            save_directory: a folder. Files of an earlier save are replaced.
            is_main_process: whether this is the main process; others do nothing.
            state_dict: the tensors to save instead of the model's own, as gathered by sharded training.
            push_to_hub: also upload the folder, by default to a repository with its name.
            kwargs: arguments of `push_to_hub`, and `repo_id`; `max_shard_size`, `variant` and the like don't apply.

        Raises:
            OSError: the folder can't be written.
            KAdapterConfigError: weights that PEFT has put into the model would not be saved; or the backbone has to be saved
                with it, and is quantised.
        """
        if not is_main_process:
            return
        folder = Path(save_directory)
        save_repository(self, folder, state_dict)
        if push_to_hub:
            names = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
            kwargs_of_push = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            self.push_saved(folder, kwargs.get("repo_id") or folder.name, **kwargs_of_push)

    def push_saved(self, folder: Path, repo_id: str, **kwargs) -> None:
        """Uploads a folder that `save_pretrained` has written; kadapter_hf replaces this method."""
        self.push_to_hub(repo_id, **kwargs)

    def write_model_card(self, staging: Path, folder: Path, *, backbone_stored: bool) -> None:
        """
        Writes the model card of the repository in `folder` to `staging`, where it is being saved. kadapter_hf replaces this
        method; code that was loaded from a repository keeps the card of that repository.
        """
        card = Path(self.name_or_path, CARD_FILE)
        if card.is_file() and not (folder / CARD_FILE).exists():
            shutil.copyfile(card, staging / CARD_FILE)

    def load_adapter(self, peft_model_id: Any = None, adapter_name: str | None = None, **kwargs) -> Any:
        """Loads a PEFT adapter, as `PreTrainedModel.load_adapter`; see `load_knowledge_adapter` for knowledge adapters."""
        return load_peft_adapter(self, super().load_adapter, peft_model_id, adapter_name, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args, **kwargs) -> Any:
        """As `nn.Module.load_state_dict`; also refuses a checkpoint that can't restore this model's PEFT adapter."""
        check_restores_peft(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def backbone_fingerprint(self) -> str:
        """Identifies the backbone's stored weights; see `fingerprint` in `format_kadapter.py`."""
        return self.origins.backbone_fingerprint(self, plain_state_dict(self))

    # ---- The task head and the other parts beside the backbone ------------------------------------------------------

    def head_modules(self) -> Iterator[nn.Module]:
        """The submodules that a subclass has added."""
        return (child for name, child in self.named_children() if name not in ("backbone", "adapters", "fusion"))

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that a subclass has added, in submodules or its own."""
        yield from self.parameters(recurse=False)
        for module in self.head_modules():
            yield from module.parameters()

    def head_state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors that a subclass has added, without those that are tied to the backbone's."""
        return {
            name: tensor
            for name, tensor in plain_state_dict(self).items()
            if file_of(name) == HEAD_FILE and not name.startswith("fusion.") and name not in self.all_tied_weights_keys
        }

    def own_dtype(self) -> torch.dtype:
        """The dtype of the parts beside the backbone."""
        modules = (self.fusion, self.adapters, *self.head_modules())
        dtypes = (parameter.dtype for module in modules for parameter in parameters_of(module))
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.get_default_dtype())

    def own_device(self) -> torch.device:
        """The device of the parts beside the backbone, which is that of the backbone's last weights."""
        devices = [parameter.device for parameter in self.backbone.parameters() if not parameter.is_meta]
        return devices[-1] if devices else torch.device("cpu")

    def move_own_parts(self, to: torch.device | torch.dtype) -> None:
        """Moves or casts the parts beside the backbone."""
        for module in (self.adapters, self.fusion, *self.head_modules()):
            module.to(to)
        for tensor in (*self.parameters(recurse=False), *self.buffers(recurse=False)):
            if tensor.is_floating_point() or isinstance(to, torch.device):
                tensor.data = tensor.data.to(to)


class KAdapterModel(KAdapterPreTrainedModel):
    """The fused states of the backbone and its active knowledge adapters, without a task head."""

    def __init__(self, config: KAdapterConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        self.post_init()

    @encodes_inputs
    def forward(self, encoded: Encoded) -> KAdapterModelOutput:
        """Takes the inputs of `encode`."""
        return KAdapterModelOutput(
            last_hidden_state=self.fuse(encoded),
            backbone_last_hidden_state=encoded.backbone_state,
            # Pipelines can't take a batch apart that holds a plain dict.
            knowledge_states=ModelOutput(encoded.knowledge) if encoded.knowledge else None,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
