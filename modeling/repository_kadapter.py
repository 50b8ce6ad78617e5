"""Saving and loading whole K-Adapters: `from_backbone`, `from_pretrained`, `save_pretrained`."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization as init
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    is_peft_available,
    logging,
)

from .adapters_kadapter import KnowledgeFusion
from .backbone_kadapter import (
    check_is_encoder,
    check_same_kind,
    commit_of,
    drop_pooler,
    fingerprint_if_as_named,
    is_opaque,
    load_backbone,
    masked_lm_class,
    stored_backbone,
)
from .card_kadapter import CARD_FILE, card_text
from .configuration_kadapter import KAdapterConfig, KAdapterConfigError
from .hub_kadapter import push_folder, push_kwargs
from .peft_kadapter import peft_hub_kwargs, plain_state_dict
from .sources_kadapter import HUB_ARGUMENTS, repository_folder
from .storage_kadapter import (
    ADAPTER_FOLDER,
    BACKBONE_FILE,
    HEAD_FILE,
    PEFT_CONFIG,
    BackboneMismatchError,
    KAdapterLoadError,
    SavedAdapter,
    adapter_metadata,
    check_names,
    check_peft_settled,
    check_tensors,
    code_files,
    file_of,
    fingerprint,
    locate,
    part_of,
    portable,
    read_adapter,
    read_config_dict,
    read_file,
    read_index,
    read_json,
    replace_files,
    write_json,
    write_tensors,
)


logger = logging.get_logger(__name__)

# The classes that a repository can be loaded as, and the Auto class of each that has one to itself.
AUTO_CLASSES = {
    "AutoConfig": "KAdapterConfig",
    "AutoModel": "KAdapterModel",
    "AutoModelForMaskedLM": "KAdapterForMaskedLM",
    "AutoModelForSequenceClassification": "KAdapterForSequenceClassification",
    "AutoModelForTokenClassification": "KAdapterForTokenClassification",
    "AutoModelForQuestionAnswering": "KAdapterForQuestionAnswering",
    "AutoModelForMultipleChoice": "KAdapterForMultipleChoice",
}
# These classify too: AutoModelForSequenceClassification gives the one that was saved.
CLASSIFIERS = ("KAdapterForSequenceClassification", "KAdapterForEntityTyping", "KAdapterForRelationClassification")
# transformers has no Auto class for these: `auto_map` has them under their own names only.
OWN_NAMES_ONLY = ("KAdapterForDependencyParsing",)
# The module that imports all the others, so that they travel together.
ENTRY_MODULE = "heads_kadapter"


class RepositoryModel(PreTrainedModel):
    """The part of `KAdapterPreTrainedModel` that has to do with files; what it needs of the rest is declared here."""

    config: KAdapterConfig
    config_class: type[KAdapterConfig]
    backbone: PreTrainedModel
    adapters: nn.ModuleDict
    fusion: KnowledgeFusion
    all_tied_weights_keys: dict[str, str]
    _sources: dict[str, str]
    _noted: dict[str, str]
    _backbone_trained: bool
    _head_parts: Callable[[], Iterable[nn.Module]]
    _note_weights: Callable[..., None]
    _update_fingerprints: Callable[[dict[str, torch.Tensor]], None]
    add_knowledge_adapter: Callable[..., None]
    load_knowledge_adapter: Callable[..., str]

    _needs_lm_head = False

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike | PreTrainedModel,
        adapters: str | os.PathLike | list | dict[str, Any] | None = None,
        fusion: str = "concat",
        **kwargs,
    ):
        """
        Builds a K-Adapter on a trained backbone.

        Args:
            backbone: a repository id, a folder, or a loaded model (which becomes part of the K-Adapter, but for its
                pooler: nothing reads that).
            adapters: trained ones to load (a repository, folder or file, or a list of them), or a dict from names to
                such sources or to `KnowledgeAdapterConfig`s of new ones. Loaded adapters are frozen, new ones train.
            fusion: `"concat"` or `"add"`.
            kwargs: fields of `KAdapterConfig` (and `num_labels`), the rest to the backbone's own `from_pretrained`
                (`dtype`, `device_map`, `quantization_config`, `revision`, `token`, `attn_implementation`, …).

        Raises:
            KAdapterLoadError: the backbone or an adapter can't be found or loaded.
            KAdapterConfigError: the backbone can't be one, or a field is impossible.
            BackboneMismatchError: an adapter was trained on another backbone.
        """
        fields = {*KAdapterConfig.__dataclass_fields__, "num_labels"} - {"dtype"}
        config_kwargs = {key: kwargs.pop(key) for key in list(kwargs) if key in fields}
        hub_kwargs = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        if isinstance(backbone, PreTrainedModel):
            if kwargs:
                raise KAdapterConfigError(f"{sorted(kwargs)} can't be used with a backbone that is already loaded.")
            check_is_encoder(backbone.config, type(backbone.base_model))
            drop_pooler(backbone)
            name, revision, as_stored = backbone.config.name_or_path or None, None, False
            loaded = cls._with_lm_head(backbone, name) if cls._needs_lm_head else backbone
        else:
            name = os.path.abspath(backbone) if os.path.isdir(backbone) else os.fspath(backbone)
            loaded = load_backbone(name, with_lm_head=cls._needs_lm_head, **kwargs)
            revision = commit_of(name, **hub_kwargs)
            as_stored = kwargs.get("dtype") in (None, "auto") and not kwargs.keys() & {
                "quantization_config",
                "device_map",
            }
        config = cls.config_class(
            backbone_name_or_path=name,
            backbone_revision=revision,
            backbone_config=copy.deepcopy(loaded.base_model.config),  # its attention would be reset with ours
            fusion=fusion,
            attn_implementation=kwargs.get("attn_implementation"),
            **config_kwargs,
        )
        model = cls(config, loaded)
        model._sources["backbone"] = name or "a loaded model"
        if cls._needs_lm_head:
            model._sources["head"] = model._sources["backbone"]
        model._finish(hub_kwargs, kwargs.get("dtype"))
        model._note_weights("backbone")
        state = part_of(plain_state_dict(model), "backbone")
        named = None if as_stored else model._fingerprint_if_as_named(state)
        model.config.backbone_fingerprint = named or fingerprint(state.values())
        hub_kwargs.pop("revision", None)
        for adapter_name, source in _named_sources(adapters):
            if source is None or type(source).__name__ == "KnowledgeAdapterConfig":
                model.add_knowledge_adapter(adapter_name, source)
            else:
                model.load_knowledge_adapter(source, adapter_name, **hub_kwargs)
        model._cast_own_parts(kwargs.get("dtype"))
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        backbone: str | os.PathLike | PreTrainedModel | None = None,
        ignore_backbone_mismatch: bool = False,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """
        Loads a K-Adapter: its adapters, fusion and head from its repository or folder, its backbone from where
        config.json says, unless the repository holds one of its own.

        A head that the repository lacks, or holds for another class, is new and announced. Anything else that does not
        come from a file is an error.

        Args:
            backbone: where the backbone is, if not where config.json says, or a loaded one.
            ignore_backbone_mismatch: go on although the backbone's weights are not those that config.json names.
            ignore_mismatched_sizes: make those parts of the head new whose shapes differ (another number of labels).
            kwargs: as in `PreTrainedModel.from_pretrained`: where to find the repository (`revision`, `token`, …),
                fields of the configuration (`num_labels`, `freeze_backbone`, …), and what goes on to the backbone
                (`dtype`, `device_map`, `quantization_config`, …).

        Raises:
            KAdapterLoadError: something is missing or damaged; the message names it.
            BackboneMismatchError: the backbone is not the one that this K-Adapter was trained on.
            KAdapterConfigError: config.json is impossible.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(
                None, *model_args, config=config, output_loading_info=output_loading_info, **kwargs
            )
        hub_kwargs = {key: kwargs.pop(key) for key in (*HUB_ARGUMENTS, "subfolder") if key in kwargs}
        source, folder, peft_source = _find(pretrained_model_name_or_path, kwargs, hub_kwargs)
        for unused in (
            "_from_auto",
            "_from_pipeline",
            "_commit_hash",
            "adapter_name",
            "code_revision",
            "use_safetensors",
        ):
            kwargs.pop(unused, None)
        dtype = kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs["dtype"]
        kwargs.pop("dtype", None)
        check_peft_settled(folder)
        config, saved_class, kwargs = cls._read_config(folder, config, kwargs)
        in_config = kwargs.pop("dtype", None)
        dtype = in_config if dtype is None else dtype
        config.name_or_path = os.fspath(source)
        files, fingerprints = read_index(folder)
        adapters = cls._read_own_adapters(folder, config, files, fingerprints)
        has_lm_head = saved_class == cls.__name__ and any(n.startswith("lm_head.") for n in files.get(HEAD_FILE, ()))
        hub_kwargs = {key: value for key, value in hub_kwargs.items() if key not in ("revision", "subfolder")}
        stored = None
        if BACKBONE_FILE in files:
            stored = read_file(folder, BACKBONE_FILE, files[BACKBONE_FILE], fingerprints.get(BACKBONE_FILE))
        loaded, live_fingerprint = cls._load_its_backbone(
            config,
            backbone,
            stored,
            with_lm_head=cls._needs_lm_head and not has_lm_head,
            ignore_backbone_mismatch=ignore_backbone_mismatch,
            dtype=dtype,
            hub_kwargs=hub_kwargs,
            **kwargs,
        )
        with init.no_init_weights():  # memory that is allocated but not touched, until the files take its place
            model = cls(config, loaded, *model_args)
        if live_fingerprint is not None:
            model._noted["backbone"] = live_fingerprint
        lm_head_is_there = cls._needs_lm_head and not has_lm_head
        info = model._load_own_parts(
            folder, files, fingerprints, adapters, saved_class, lm_head_is_there, ignore_mismatched_sizes
        )
        model._backbone_stored = stored is not None
        in_repository = backbone is None and stored is not None
        model._sources["backbone"] = (
            os.fspath(source) if in_repository else config.backbone_name_or_path or "a loaded model"
        )
        model._sources |= {f"adapters.{name}": os.fspath(source) for name in model.adapters}
        model._sources["fusion"] = model._sources["head"] = os.fspath(source)
        if cls._needs_lm_head and not has_lm_head:
            model._sources["head"] = model._sources["backbone"]
        elif info["missing_keys"]:
            model._sources["head"] = "new"
        model._finish(hub_kwargs, dtype)
        model.eval()
        if peft_source is not None:
            model.load_adapter(peft_source, use_safetensors=True, **peft_hub_kwargs(hub_kwargs))
        return (model, info) if output_loading_info else model

    @classmethod
    def _read_config(
        cls, folder: Path, config: Any, kwargs: dict[str, Any]
    ) -> tuple[KAdapterConfig, str | None, dict[str, Any]]:
        """The configuration, the class that was saved, and the arguments that are not the configuration's."""
        saved = read_config_dict(folder)
        model_type = saved.get("model_type")
        if model_type != cls.config_class.model_type:
            raise KAdapterLoadError(
                f"'{folder}' holds a {model_type!r} model, not a K-Adapter. To put knowledge adapters on it, use "
                f"{cls.__name__}.from_backbone."
            )
        architectures = saved.get("architectures")
        saved_class = architectures[0] if isinstance(architectures, list) and architectures else None
        if isinstance(config, cls.config_class):
            config = copy.deepcopy(config)
        elif isinstance(config, PreTrainedConfig):  # the same class, from code that travelled with a repository
            attn_implementation = config._attn_implementation
            config = cls.config_class.from_dict(config.to_dict())
            config._attn_implementation = attn_implementation
        elif config is not None:
            config = cls.config_class.from_pretrained(config)
        else:
            try:
                config, kwargs = cls.config_class.from_dict(saved, return_unused_kwargs=True, **kwargs)
            except KAdapterConfigError as error:
                raise KAdapterConfigError(
                    f"'{locate(folder, CONFIG_NAME)}': {error} Download or save the model again, or correct the field."
                ) from error
        if config.dtype is not None and str(config.dtype).removeprefix("torch.") != saved.get("dtype"):
            # Asked for in the configuration: the Auto classes of older versions put it there.
            kwargs = {"dtype": config.dtype} | kwargs
        return config, saved_class, kwargs

    @classmethod
    def _load_its_backbone(
        cls,
        config: KAdapterConfig,
        given: Any,
        stored: dict[str, torch.Tensor] | None,
        *,
        with_lm_head: bool,
        ignore_backbone_mismatch: bool,
        dtype: Any,
        hub_kwargs: dict[str, Any],
        **kwargs,
    ) -> tuple[PreTrainedModel, str | None]:
        """The backbone of a repository, after checking that it is the right one, and its fingerprint as loaded."""
        attn_implementation = kwargs.pop("attn_implementation", None) or config._attn_implementation
        if attn_implementation is not None:
            kwargs["attn_implementation"] = attn_implementation
        kwargs["dtype"] = dtype if dtype not in (None, "auto") else config.backbone_config.dtype or "auto"
        name, expected = config.backbone_name_or_path, config.backbone_fingerprint
        if isinstance(given, PreTrainedModel):
            check_same_kind(given.config, config.backbone_config, given.config.name_or_path)
            drop_pooler(given)
            loaded: Any = given if with_lm_head else given.base_model
        elif given is None and stored is not None:
            kwargs.pop("trust_remote_code", None)
            loaded = stored_backbone(
                config.backbone_config, stored, f"{config.name_or_path}/{BACKBONE_FILE}", **kwargs
            )
        elif given is None and name is None:
            raise KAdapterLoadError(
                f"'{config.name_or_path}' names no backbone and holds none. Give it with backbone=<folder or model>."
            )
        else:
            if given is not None:
                name = os.path.abspath(given) if os.path.isdir(given) else os.fspath(given)
                config.backbone_name_or_path, config.backbone_revision = name, None
            loaded = load_backbone(
                name,
                expected=config.backbone_config,
                with_lm_head=with_lm_head,
                revision=config.backbone_revision,
                **hub_kwargs,
                **kwargs,
            )
        live = None if is_opaque(loaded.base_model) else fingerprint(loaded.base_model.state_dict().values())
        found = live if given is not None or stored is None else fingerprint(stored.values())
        if expected is None:
            logger.warning(
                f"'{config.name_or_path}' does not say which weights its backbone had: that '{name}' is the one it was trained "
                "on could not be verified."
            )
        if expected is not None and found != expected:
            state = {f"backbone.{key}": tensor for key, tensor in loaded.base_model.state_dict().items()}
            found = fingerprint_if_as_named(loaded.base_model, state, config, **hub_kwargs) or found
        if expected is not None and found != expected:
            message = (
                f"'{config.name_or_path}' was trained on the backbone '{name}' with fingerprint {expected[:12]}…; the "
                f"one found has {(found or 'none')[:12]}…: the same kind of model, but other weights"
            )
            if not ignore_backbone_mismatch:
                raise BackboneMismatchError(
                    f"{message}. Give the right one with backbone=<folder or model>, or go on nevertheless with "
                    "ignore_backbone_mismatch=True."
                )
            logger.warning(f"{message}; it is used nevertheless.")
        config.backbone_fingerprint = found
        if with_lm_head:
            loaded = cls._with_lm_head(loaded, name, revision=config.backbone_revision, **hub_kwargs)
        return loaded, live

    @staticmethod
    def _with_lm_head(backbone: PreTrainedModel, name: str | None, **hub_kwargs) -> PreTrainedModel:
        """The backbone inside its masked-language-model class, whose head comes from the named repository."""
        if isinstance(backbone, masked_lm_class(backbone.config)):
            if hasattr(backbone, "_hf_hook"):  # accelerate has bound its forward to this very object
                return backbone
            with_head = copy.copy(backbone)  # the K-Adapter takes the encoder out of it
            with_head._modules = dict(backbone._modules)
            return with_head
        backbone = backbone.base_model
        if name is None:
            raise KAdapterLoadError(
                "the backbone is not from a repository that its language-model head could come from."
            )
        with_head = load_backbone(name, with_lm_head=True, dtype=backbone.dtype, **hub_kwargs)
        setattr(with_head, with_head.base_model_prefix, backbone)
        return with_head

    def _load_own_parts(
        self,
        folder: Path,
        files: dict[str, list[str]],
        fingerprints: dict[str, str],
        adapters: dict[str, SavedAdapter],
        saved_class: str | None,
        lm_head_is_there: bool,
        ignore_mismatched_sizes: bool,
    ) -> dict[str, Any]:
        """Fills all but the backbone (and the head that came with it) from a repository's files."""
        for file, saved in adapters.items():
            _fill(self.adapters[saved.name], f"adapters.{saved.name}.", saved.tensors, locate(folder, file))
            self._noted[f"adapters.{saved.name}"] = saved.fingerprint
        path = locate(folder, HEAD_FILE)
        found = (
            read_file(folder, HEAD_FILE, files[HEAD_FILE], fingerprints.get(HEAD_FILE)) if HEAD_FILE in files else {}
        )
        _fill(self.fusion, "fusion.", part_of(found, "fusion"), path)
        wanted = {
            name: tensor.shape
            for part_name, part in self.named_children()
            if part_name not in ("backbone", "adapters", "fusion")
            and not (part_name == "lm_head" and lm_head_is_there)
            for name, tensor in part.state_dict(prefix=f"{part_name}.").items()
            if name not in self.all_tied_weights_keys
        }
        head = {name: tensor for name, tensor in found.items() if not name.startswith("fusion.")}
        # A class of a user's own keeps the head of the class that it derives from.
        dropped = {} if saved_class in {kind.__name__ for kind in type(self).__mro__} else head
        if dropped:
            head = {}
        if ignore_mismatched_sizes:
            head = {name: tensor for name, tensor in head.items() if wanted.get(name, tensor.shape) == tensor.shape}
        # All of it comes from the file, or none, but for what was left out just now.
        expected = {
            name: shape for name, shape in wanted.items() if name in head or (head and not ignore_mismatched_sizes)
        }
        check_tensors(expected, head, path)
        if head:
            self.load_state_dict(head, strict=False, assign=True)
        self.tie_weights()
        new = sorted(wanted.keys() - head.keys())
        for part in {name.partition(".")[0] for name in new}:
            self.get_submodule(part).to(self._own_dtype()).apply(self._init_weights)
        if new:
            logger.warning(
                f"{type(self).__name__}: '{folder}' has no weights for {new}: they are new and untrained. Train them "
                "on a downstream task before you predict with them."
            )
        return {"missing_keys": set(new), "unexpected_keys": set(dropped), "mismatched_keys": set(), "error_msgs": []}

    @staticmethod
    def _read_own_adapters(
        folder: Path, config: KAdapterConfig, files: dict[str, list[str]], fingerprints: dict[str, str]
    ) -> dict[str, SavedAdapter]:
        """
        A repository's adapters by file, after checking that files, index and config.json agree.

        Before anything is built: what config.json says decides how much memory that takes.
        """
        adapters = {}
        for file in {f"{ADAPTER_FOLDER}/{name}.safetensors": None for name in config.knowledge_adapters} | files:
            if file in (HEAD_FILE, BACKBONE_FILE):
                continue
            path = locate(folder, file)
            saved = read_adapter(path)
            check_names(path, saved.tensors, files.get(file, []))
            here = config.knowledge_adapters.get(saved.name)
            same = here is not None and portable(here) == portable(saved.config)
            if saved.name != path.stem or not same or fingerprints.get(file) not in (None, saved.fingerprint):
                raise KAdapterLoadError(
                    f"'{path}' and config.json don't agree about the adapter '{path.stem}': they are not of one save. "
                    "Load the file with load_knowledge_adapter, or download or save the model again."
                )
            adapters[file] = saved
        return adapters

    def _finish(self, hub_kwargs: dict[str, Any], dtype: Any) -> None:
        """What remains to do once all weights are there: devices, dtype, and notes for saving."""
        # Where the named backbone is found again, to see at each save whether it was changed.
        self._backbone_kwargs = {key: hub_kwargs[key] for key in ("cache_dir", "token") if key in hub_kwargs}
        device = self._own_device()
        for part in (self.adapters, self.fusion, *self._head_parts()):
            if any(parameter.device != device for parameter in part.parameters()):
                part.to(device)
        self._cast_own_parts(dtype)
        places = getattr(self.backbone, "hf_device_map", {})
        if len(set(places.values())) > 1:  # tells Trainer that the model is spread over devices
            self.hf_device_map = {f"backbone.{name}".rstrip("."): place for name, place in places.items()}

    def _cast_own_parts(self, dtype: Any) -> None:
        """Casts all but the backbone to the dtype that `from_pretrained` or `from_backbone` was asked for, if any."""
        if dtype in (None, "auto"):
            return
        for part in (self.adapters, self.fusion, *self._head_parts()):
            part.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        self._note_weights(*(f"adapters.{name}" for name in self.adapters))

    def _own_dtype(self) -> torch.dtype:
        """What new parts beside the backbone are made in: the dtype of those that are there."""
        for part in (self.fusion, self.adapters, *self._head_parts()):
            for parameter in part.parameters():
                if parameter.is_floating_point():
                    return parameter.dtype
        return torch.get_default_dtype()

    def _own_device(self) -> torch.device:
        """Where the adapters, the fusion and the head are: beside the backbone's last weights."""
        devices = [parameter.device for parameter in self.backbone.parameters() if not parameter.is_meta]
        return devices[-1] if devices else torch.device("cpu")

    # ---- Saving -----------------------------------------------------------------------------------------------------

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
        one that the configuration names.

        A save that is killed or finds the disk full leaves what was in the folder loadable; see `replace_files` in
        `storage_kadapter.py`.

        Args:
            save_directory: a folder; made if needed. What an earlier save left in it is replaced.
            is_main_process: others than the main process do nothing.
            state_dict: what to save instead of the model's own, as sharded training gathers it.
            push_to_hub: also upload the folder, to `repo_id` (by default the folder's name); `commit_message`,
                `private`, `token`, `revision`, `create_pr` and `tags` as in `push_to_hub`.
            kwargs: those of the Hub; `max_shard_size`, `variant` and the like don't apply.

        Raises:
            OSError: the folder can't be written.
        """
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise KAdapterLoadError(f"'{folder}' is a file; save_pretrained needs a folder.")
        backbone_name = self.config.backbone_name_or_path
        if backbone_name and os.path.isdir(backbone_name) and folder.exists() and folder.samefile(backbone_name):
            raise KAdapterLoadError(
                f"'{folder}' holds the backbone: saved there, the K-Adapter would take the place of its config.json. "
                "Choose another folder."
            )
        state = plain_state_dict(self, state_dict)
        tied = set(self.all_tied_weights_keys)
        backbone = part_of(state, "backbone")
        # A checkpoint holds a backbone that trains even if no step has changed it yet, as with a learning rate that
        # begins at 0: Trainer loads it into a model whose backbone has changed since.
        named = None if self._backbone_trained else self._fingerprint_if_as_named(backbone)
        own = {name: tensor for name, tensor in state.items() if name not in backbone and name not in tied}
        saved = own if named is not None else own | {name: backbone[name] for name in backbone if name not in tied}
        self._update_fingerprints(state)
        self.config.backbone_fingerprint = (
            named if named is not None else fingerprint(tensor for name, tensor in saved.items() if name in backbone)
        )
        self.config.architectures = [type(self).__name__.removeprefix("FSDP")]
        self.config.dtype = next((str(tensor.dtype) for tensor in own.values()), str(self.dtype)).removeprefix(
            "torch."
        )
        self._write_repository(folder, saved, state_dict)
        self._backbone_stored = named is None
        self._note_weights("backbone", *(f"adapters.{name}" for name in self.adapters), state_dict=state)
        if push_to_hub:
            push_folder(folder, kwargs.get("repo_id") or folder.name, **push_kwargs(kwargs))

    def push_to_hub(self, repo_id: str, **kwargs) -> CommitInfo:
        """
        Uploads the K-Adapter as one commit: its adapters, fusion, head, configuration, code and model card, and its backbone
        only if that is not the one that the configuration names. Files that the Hub has already are not sent again, and
        what a user has changed in the model card there stays.

        Args:
            repo_id: the repository; made if needed.
            kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision` (a branch, made if needed),
                `create_pr` and `tags`, as in `PreTrainedModel.push_to_hub`.

        Raises:
            KAdapterLoadError: the repository is the backbone's own, or others kept pushing at the same time.
            HfHubHTTPError: the Hub refused.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(Path(folder), repo_id, **push_kwargs(kwargs))

    def _write_repository(
        self, folder: Path, state: dict[str, torch.Tensor], peft_state: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Puts the files of a repository with these tensors into a folder, in place of those that are there."""
        if folder.name.startswith("checkpoint-"):
            # To push a checkpoint, Trainer copies its weights into the folder above, where it expects their folders to be.
            (folder.parent / ADAPTER_FOLDER).mkdir(parents=True, exist_ok=True)
        with replace_files(folder) as staging:
            self._write_files(staging, state)
            card = card_text(
                self.config,
                None,
                backbone_stored=any(file_of(name) == BACKBONE_FILE for name in state),
                earlier=[folder / CARD_FILE],
            )
            if card is not None:
                (staging / CARD_FILE).write_text(card, encoding="utf-8")
            if getattr(self, "_hf_peft_config_loaded", False):
                super().save_pretrained(staging, state_dict=peft_state)

    def _write_files(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        files: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            files.setdefault(file_of(name), {})[name] = tensor
        for file, tensors in files.items():
            name = Path(file).stem
            if file in (HEAD_FILE, BACKBONE_FILE):
                metadata = {"format": "pt"}
            else:
                metadata = adapter_metadata(name, self.config.knowledge_adapters[name], tensors)
            write_tensors(folder / file, tensors, metadata)
        for path in code_files():
            shutil.copyfile(path, folder / path.name)
        index = {
            "metadata": {
                "total_parameters": sum(tensor.numel() for tensor in state.values()),
                "total_size": sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
                "fingerprints": {file: fingerprint(tensors.values()) for file, tensors in files.items()},
            },
            "weight_map": {name: file for file, tensors in files.items() for name in tensors},
        }
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
        config = copy.deepcopy(self.config)
        config.auto_map = self._auto_map()
        config.backbone_config.dtype = self.backbone.dtype if self.backbone.dtype.is_floating_point else None
        config.backbone_config.__dict__.pop("quantization_config", None)
        write_json(folder / CONFIG_NAME, json.loads(config.to_json_string()))

    def _auto_map(self) -> dict[str, str]:
        saved = type(self).__name__
        classes = dict(AUTO_CLASSES)
        if saved in CLASSIFIERS:
            classes["AutoModelForSequenceClassification"] = saved
        classes |= {name: name for name in CLASSIFIERS + OWN_NAMES_ONLY}
        return {auto: f"{ENTRY_MODULE}.{name}" for auto, name in classes.items()}

    def _fingerprint_if_as_named(self, state: dict[str, torch.Tensor]) -> str | None:
        kwargs = getattr(self, "_backbone_kwargs", {})
        return fingerprint_if_as_named(self.backbone, state, self.config, local_files_only=True, **kwargs)


def _fill(module: nn.Module, prefix: str, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Makes `tensors`, which have just the names and shapes of the module's, the module's own."""
    check_tensors({name: own.shape for name, own in module.state_dict(prefix=prefix).items()}, tensors, path)
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, assign=True)


def _find(
    source: str | os.PathLike, kwargs: dict[str, Any], hub_kwargs: dict[str, Any]
) -> tuple[str | os.PathLike, Path, str | os.PathLike | None]:
    """The K-Adapter to load, its folder and, if `source` holds a PEFT adapter for it, where that is."""
    peft_source = (kwargs.pop("adapter_kwargs", None) or {}).get("_adapter_model_path")  # AutoModel may have looked
    folder = repository_folder(source, **hub_kwargs)
    if peft_source is not None or not is_peft_available() or not (folder / PEFT_CONFIG).is_file():
        return source, folder, peft_source
    if not (folder / CONFIG_NAME).exists():
        content = read_json(folder / PEFT_CONFIG)
        base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        if base:
            hub_kwargs = {key: value for key, value in hub_kwargs.items() if key not in ("revision", "subfolder")}
            return base, repository_folder(base, **hub_kwargs), source
    return source, folder, source


def _named_sources(adapters: Any) -> list[tuple[str | None, Any]]:
    if adapters is None:
        return []
    if isinstance(adapters, dict):
        return list(adapters.items())
    if isinstance(adapters, (str, os.PathLike)):
        return [(None, adapters)]
    return [(None, source) for source in adapters]
