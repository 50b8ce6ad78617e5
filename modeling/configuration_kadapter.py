"""Configuration of K-Adapter models: the backbone, each knowledge adapter, the fusion and what is frozen."""

import copy
import functools
import json
import re
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, RobertaConfig
from transformers.activations import ACT2FN
from transformers.utils import logging


logger = logging.get_logger(__name__)

DEFAULT_BACKBONE = "FacebookAI/roberta-large"
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# More than any model has; and a configuration makes lists of these lengths.
_MOST = {"num_labels": 10**7, "num_hidden_layers": 10**4}
# One path-safe segment: it names a file in the repository and is one part of a tensor's dotted name.
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class KAdapterConfigError(ValueError):
    """A configuration that is of the wrong type or impossible; the message names the field."""


def _refuse_clearly(cls):
    """Makes every failure of a configuration's construction a `KAdapterConfigError` that names the class."""
    original_init = cls.__init__

    @functools.wraps(original_init)
    def __init__(self, /, *args, **kwargs):
        try:
            _check_common(kwargs)
            original_init(self, *args, **kwargs)
        except KAdapterConfigError:
            raise
        except Exception as error:
            cause = error.__cause__ or error  # huggingface_hub's validation errors wrap the reason
            if isinstance(cause, KAdapterConfigError):
                raise cause from None
            raise KAdapterConfigError(f"{cls.__name__}: {error}") from error

    cls.__init__ = __init__
    return cls


def _check_common(fields: dict[str, Any]) -> None:
    """Refuses what transformers' own configuration class takes on trust, to fail with it later or never to finish."""
    for field in ("dtype", "torch_dtype"):
        dtype = fields.get(field)
        named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not isinstance(named, torch.dtype):
            raise KAdapterConfigError(f"{field} {dtype!r} is not one of torch's.")
    for field, most in _MOST.items():
        value = fields.get(field)
        if isinstance(value, int) and not 1 <= value <= most:
            raise KAdapterConfigError(f"{field} must be between 1 and {most:,}, not {value}.")
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, (list, tuple)) or not all(isinstance(name, str) for name in architectures):
        raise KAdapterConfigError(f"architectures must be a list of class names, not {architectures!r}.")
    quantization = fields.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict) and not hasattr(quantization, "to_dict"):
        raise KAdapterConfigError(f"quantization_config must be a dict or a configuration, not {quantization!r}.")


def check_adapter_name(name: Any) -> str:
    """Returns `name` if it can name a knowledge adapter, else raises `KAdapterConfigError`."""
    if not isinstance(name, str) or not _ADAPTER_NAME.fullmatch(name):
        raise KAdapterConfigError(
            f"{str(name)[:80]!r} can't name a knowledge adapter: a name is 1 to 64 letters, digits, '_' or '-', "
            "and begins with a letter or digit."
        )
    if hasattr(torch.nn.ModuleDict, name) or name == "training":
        raise KAdapterConfigError(
            f"{name!r} can't name a knowledge adapter: torch.nn.Module has an attribute of that name. "
            f"Choose another, such as '{name}_knowledge'."
        )
    return name


def _drop_colliding(cls: type, kwargs: dict[str, Any]) -> None:
    """Drops, with a warning, unknown fields that would overwrite a method or read-only property of `cls`."""
    kwargs.pop("model_type", None)  # of the class; older versions of transformers pass it along
    for key in list(kwargs):
        attribute = getattr(cls, key, None) if hasattr(cls, key) else None
        settable = attribute is None or (isinstance(attribute, property) and attribute.fset is not None)
        if not settable:
            logger.warning(f"{cls.__name__}: the unknown field '{key}' is dropped.")
            del kwargs[key]


def _dtypes_to_str(self: PreTrainedConfig, fields: dict[str, Any]) -> None:
    """As transformers' own, which takes whatever is called dtype for one, also deep in what it does not know."""
    if isinstance(fields.get("dtype"), torch.dtype):
        fields["dtype"] = str(fields["dtype"]).removeprefix("torch.")
    for value in fields.values():
        if isinstance(value, dict):
            _dtypes_to_str(self, value)


@_refuse_clearly
@strict
class KnowledgeAdapterConfig(PreTrainedConfig):
    r"""
    One knowledge adapter: its sizes, the backbone states it reads, and where its knowledge came from.

    Its defaults are the paper's for roberta-large (section 3.1; `AdapterConfig` in the original's
    `pytorch_transformers/my_modeling_roberta.py`).

    Args:
        backbone_layers (`list[int]`, *optional*):
            Which of the backbone's hidden states the adapter layers read, one adapter layer each; 0 is the embeddings'
            output and `num_hidden_layers` of the backbone the last (the original's `adapter_list`). By default the
            first, the middle and the last but one: `[0, 11, 22]` for 24 layers.
        num_hidden_layers (`int`, defaults to 2): transformer layers inside each adapter layer.
        hidden_size (`int`, defaults to 768): their width; the projections go from and to the backbone's width.
        num_attention_heads (`int`, defaults to 12): must divide `hidden_size`.
        intermediate_size (`int`, defaults to 3072): width of their feed-forward part.
        hidden_act (`str`, defaults to `"gelu"`)
        hidden_dropout_prob, attention_probs_dropout_prob (`float`, default to 0.1)
        layer_norm_eps (`float`, defaults to 1e-5)
        initializer_range (`float`, defaults to 2e-4):
            standard deviation of a new adapter's projections, so small that the adapter starts as almost the identity.
        attend_to_padding (`bool`, defaults to `False`):
            The original's adapters attend to padding, and padded positions get running position ids. `True` does
            exactly that; converted checkpoints need it.
        backbone_name_or_path, backbone_fingerprint (`str`, *optional*):
            The backbone this adapter was trained on. Filled in by the model.
        provenance (`dict`, *optional*):
            Where the knowledge came from (corpus, size, seed, metric, …). JSON values; kept as they are.

    Raises:
        KAdapterConfigError: a field is of the wrong type or has an impossible value.
    """

    model_type = "kadapter_knowledge_adapter"
    dict_dtype_to_str = _dtypes_to_str

    backbone_layers: list[int] | None = None
    num_hidden_layers: int = 2
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 2e-4
    attend_to_padding: bool = False
    backbone_name_or_path: str | None = None
    backbone_fingerprint: str | None = None
    provenance: dict | None = None

    def __post_init__(self, **kwargs):
        _drop_colliding(type(self), kwargs)
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Called by `@strict` after construction."""
        for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"):
            if isinstance(getattr(self, field), bool) or getattr(self, field) < 1:
                raise KAdapterConfigError(f"{field} must be an int of at least 1, not {getattr(self, field)}.")
        if self.hidden_size % self.num_attention_heads:
            raise KAdapterConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must divide hidden_size ({self.hidden_size})."
            )
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, field) < 1:
                raise KAdapterConfigError(f"{field} must be in [0, 1), not {getattr(self, field)}.")
        for field in ("layer_norm_eps", "initializer_range"):
            if not 0 < getattr(self, field) < float("inf"):
                raise KAdapterConfigError(f"{field} must be a positive number, not {getattr(self, field)}.")
        try:
            json.dumps(self.provenance)
        except (TypeError, ValueError, RecursionError) as error:
            raise KAdapterConfigError(f"provenance must consist of JSON values: {error}.") from error
        if self.hidden_act not in ACT2FN:
            raise KAdapterConfigError(f"hidden_act {self.hidden_act!r} is not one of transformers' activations.")
        if self.backbone_layers is not None:
            if not self.backbone_layers:
                raise KAdapterConfigError("backbone_layers is empty: an adapter reads at least one hidden state.")
            if any(isinstance(layer, bool) or layer < 0 for layer in self.backbone_layers):
                raise KAdapterConfigError(
                    f"backbone_layers counts from 0, the embeddings' output; got {self.backbone_layers}."
                )

    def for_backbone(self, backbone_config: PreTrainedConfig, name: str) -> "KnowledgeAdapterConfig":
        """
        A copy that fits the backbone: `backbone_layers` filled in if it was left out, and within the backbone.

        Raises:
            KAdapterConfigError: a layer that the backbone does not have.
        """
        config = copy.deepcopy(self)
        depth = backbone_config.num_hidden_layers
        if config.backbone_layers is None:
            config.backbone_layers = sorted({0, max(depth // 2 - 1, 0), max(depth - 2, 0)})
        outside = [layer for layer in config.backbone_layers if layer > depth]
        if outside:
            raise KAdapterConfigError(
                f"backbone_layers of knowledge adapter '{name}' names {outside}, but the backbone "
                f"({backbone_config.model_type}) has hidden states 0 to {depth}."
            )
        return config

    def to_portable_dict(self) -> dict[str, Any]:
        """
        The fields that describe the adapter: what config.json and the adapter file's metadata hold.

        As they come back from JSON: its keys are strings, and infinities and NaN are tagged there, not numbers.

        Raises:
            KAdapterConfigError: a value that JSON has no words for.
        """
        fields = {key: value for key, value in sorted(self.to_dict().items()) if key not in _fields_of_every_config()}
        try:
            return self._decode_special_floats(json.loads(json.dumps(self._encode_special_floats(fields))))
        except (TypeError, ValueError, RecursionError) as error:
            raise KAdapterConfigError(f"a knowledge adapter's configuration holds what JSON can't: {error}") from error


@functools.cache
def _fields_of_every_config() -> frozenset[str]:
    return frozenset(PreTrainedConfig().to_dict()) | {"model_type", "transformers_version", "architectures"}


def _roberta_large() -> RobertaConfig:
    return RobertaConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )


@_refuse_clearly
@strict
class KAdapterConfig(PreTrainedConfig):
    r"""
    A K-Adapter: a backbone, knowledge adapters by name, and how they are fused.

    `KAdapterConfig()` is roberta-large without adapters. To build a model on another backbone use
    `KAdapterModel.from_backbone`, which fills all of this in.

    Args:
        backbone_name_or_path (`str`, *optional*, defaults to `"FacebookAI/roberta-large"`):
            Repository or folder that the backbone's weights come from.
        backbone_revision (`str`, *optional*): commit of that repository; filled in when the backbone is loaded.
        backbone_fingerprint (`str`, *optional*): what the backbone's weights must be; filled in likewise.
        backbone_config (`dict` or `PreTrainedConfig`, *optional*): the backbone's own configuration, of any model type
            that `AutoConfig` knows. Defaults to roberta-large's.
        knowledge_adapters (`dict[str, KnowledgeAdapterConfig]`, *optional*): the adapters by name.
        active_knowledge_adapters (`list[str]`, *optional*): those that are used, in the order given; all by default.
        fusion (`"concat"` or `"add"`): how the backbone's and the adapters' states become one (paper, section 3.2).
        classifier_dropout (`float`, defaults to 0.1): dropout in the task heads.
        freeze_backbone (`bool`, defaults to `True`), frozen_knowledge_adapters (`list[str]`), freeze_head (`bool`):
            what does not train; `freeze_head` is about the fusion and the task head.

    Raises:
        KAdapterConfigError: a field is of the wrong type or has an impossible value.
    """

    model_type = "kadapter"
    dict_dtype_to_str = _dtypes_to_str
    sub_configs = {"backbone_config": AutoConfig}

    backbone_name_or_path: str | None = DEFAULT_BACKBONE
    backbone_revision: str | None = None
    backbone_fingerprint: str | None = None
    backbone_config: Any = None
    knowledge_adapters: dict | None = None
    active_knowledge_adapters: list[str] | None = None
    fusion: Literal["concat", "add"] = "concat"
    classifier_dropout: float | int = 0.1
    freeze_backbone: bool = True
    frozen_knowledge_adapters: list[str] | None = None
    freeze_head: bool = False

    def __post_init__(self, **kwargs):
        self.backbone_config = self._build_backbone_config(self.backbone_config)
        self.knowledge_adapters = {
            name: self._build_adapter_config(name, adapter)
            for name, adapter in (self.knowledge_adapters or {}).items()
        }
        if self.active_knowledge_adapters is None:
            self.active_knowledge_adapters = list(self.knowledge_adapters)
        if self.frozen_knowledge_adapters is None:
            self.frozen_knowledge_adapters = []
        self.architectures = self.architectures or []  # the Auto classes iterate over it
        _drop_colliding(type(self), kwargs)
        super().__post_init__(**kwargs)

    def _build_backbone_config(self, config: Any) -> PreTrainedConfig:
        if isinstance(config, PreTrainedConfig):
            return config
        if config is None:
            if self.backbone_name_or_path not in (None, DEFAULT_BACKBONE):
                raise KAdapterConfigError(
                    f"backbone_config is missing for the backbone '{self.backbone_name_or_path}'. "
                    "Use KAdapterModel.from_backbone(...), which reads it, or pass backbone_config."
                )
            return _roberta_large()
        if not isinstance(config, dict):
            raise KAdapterConfigError(
                f"backbone_config must be a dict or a configuration, not {type(config).__name__}."
            )
        config = dict(config)
        model_type = config.pop("model_type", None)
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or model_type == "kadapter":
            raise KAdapterConfigError(
                f"backbone_config: model_type {model_type!r} is not one that this version of transformers can be a "
                "backbone with."
            )
        try:
            _check_common(config)
            built = CONFIG_MAPPING[model_type](**config)
            built.to_json_string()  # or saving would be where it fails
            return built
        except Exception as error:  # whatever a foreign configuration class refuses with
            raise KAdapterConfigError(f"backbone_config ({model_type}): {error}") from error

    def _build_adapter_config(self, name: Any, config: Any) -> KnowledgeAdapterConfig:
        check_adapter_name(name)
        if isinstance(config, dict):
            try:
                config = KnowledgeAdapterConfig(**config)
            except KAdapterConfigError as error:
                raise KAdapterConfigError(f"knowledge_adapters['{name}']: {error}") from error
        if config is None:
            config = KnowledgeAdapterConfig()
        # By name: code that travelled with a repository defines a class of its own.
        if type(config).__name__ != "KnowledgeAdapterConfig":
            raise KAdapterConfigError(
                f"knowledge_adapters['{name}'] must be a KnowledgeAdapterConfig or a dict, not {type(config).__name__}."
            )
        return config.for_backbone(self.backbone_config, name)

    def validate_adapters(self):
        """Called by `@strict` after construction."""
        for field in ("active_knowledge_adapters", "frozen_knowledge_adapters"):
            names = getattr(self, field)
            unknown = [name for name in names if name not in self.knowledge_adapters]
            if unknown:
                raise KAdapterConfigError(f"{field} names {unknown}, but there are {list(self.knowledge_adapters)}.")
            if len(set(names)) != len(names):
                raise KAdapterConfigError(f"{field} names an adapter twice: {names}.")
        if len({name.casefold() for name in self.knowledge_adapters}) != len(self.knowledge_adapters):
            raise KAdapterConfigError(
                f"knowledge_adapters {list(self.knowledge_adapters)}: two names differ only in case, which some file "
                "systems can't tell apart."
            )
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise KAdapterConfigError(f"problem_type must be one of {PROBLEM_TYPES}, not {self.problem_type!r}.")
        if not 0 <= self.classifier_dropout < 1:
            raise KAdapterConfigError(f"classifier_dropout must be in [0, 1), not {self.classifier_dropout}.")

    def __getattr__(self, name: str) -> Any:
        # What the backbone knows better: tools that read a model's sizes ask the outer configuration.
        if name in (
            "hidden_size",
            "vocab_size",
            "num_hidden_layers",
            "max_position_embeddings",
            "tie_word_embeddings",
        ):
            return getattr(self.backbone_config, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The configuration that holds the vocabulary: the backbone's."""
        backbone_config = self.__dict__.get("backbone_config")
        return self if backbone_config is None else backbone_config

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if isinstance(output.get("backbone_config"), PreTrainedConfig):
            output["backbone_config"] = output["backbone_config"].to_dict()
        output["knowledge_adapters"] = {
            name: adapter if isinstance(adapter, dict) else adapter.to_portable_dict()
            for name, adapter in output["knowledge_adapters"].items()
        }
        return output
