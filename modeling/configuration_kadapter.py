"""Configuration of K-Adapter models: the backbone, each knowledge adapter, the fusion and what is frozen."""

import copy
import dataclasses
import functools
import json
import os
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from .compat_kadapter import decode_floats, drop_colliding, dtypes_to_str, encode_floats, is_remote_code
from .format_kadapter import KAdapterConfigError, check_adapter_name, nearest
from .fusion_kadapter import check_fusion


DEFAULT_BACKBONE = "FacebookAI/roberta-large"
ROBERTA_LARGE = {"model_type": "roberta", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
ROBERTA_LARGE |= {
    "intermediate_size": 4096,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
# An argument that `from_dict` adds, so that unknown fields are accepted as those of a newer version.
_FROM_FILE = "_from_file"
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# PEFT's prompt methods look these up in the dict of a model's configuration. In config.json, only backbone_config has them.
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
# Fields of the backbone's configuration that tools look for in a model's own.
_OF_THE_BACKBONE = {*_SIZES, "vocab_size", "max_position_embeddings", "tie_word_embeddings"}
# Limits that no model reaches, as configurations make lists of these lengths.
_MOST = {"num_labels": 10**7, "num_hidden_layers": 10**4}


def _refuse_clearly(cls):
    """Makes every failure to construct a configuration a `KAdapterConfigError` that names the class."""
    original_init = cls.__init__

    @functools.wraps(original_init)
    def __init__(self, /, *args, **kwargs):
        try:
            if not kwargs.pop(_FROM_FILE, False):
                _check_spelling(cls, kwargs)
            _check_common(kwargs, fewest_layers=1 if issubclass(cls, KAdapterConfig) else 0)
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


def _check_spelling(cls: Any, kwargs: dict[str, Any]) -> None:
    """
    Refuses unknown fields: those of an adapter, and those of a model that look like a misspelt field. Others may be from a
    newer version.
    """
    is_open = issubclass(cls, KAdapterConfig)
    known = cls.known_fields() if is_open else set(cls.__dataclass_fields__)
    for key in kwargs.keys() - known:
        near = nearest(key, known)
        if not is_open or (near and not key.startswith("_")):  # `to_dict` adds some with an underscore
            raise KAdapterConfigError(f"{cls.__name__} has no field '{key}'{near or f'; it has {sorted(known)}.'}")
    adapters = kwargs.get("knowledge_adapters")
    for name, adapter in adapters.items() if isinstance(adapters, dict) else ():
        if isinstance(adapter, dict):
            try:
                _check_spelling(KnowledgeAdapterConfig, adapter)
            except KAdapterConfigError as error:
                raise KAdapterConfigError(f"knowledge_adapters['{name}']: {error}") from None


def own_fields(config: PreTrainedConfig) -> set[str]:
    """The fields that are specific to a configuration's kind of model, without those about how it is loaded."""
    return config.to_dict().keys() - PreTrainedConfig().to_dict().keys() - {"quantization_config", "auto_map"}


def _check_common(fields: dict[str, Any], fewest_layers: int = 1) -> None:
    """Refuses values that transformers doesn't validate and that would fail later, or hang."""
    for field in ("dtype", "torch_dtype"):
        dtype = fields.get(field)
        named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not isinstance(named, torch.dtype):
            raise KAdapterConfigError(f"{field} {dtype!r} is not one of torch's.")
    for field, most in _MOST.items():
        value, least = fields.get(field), fewest_layers if field == "num_hidden_layers" else 1
        if isinstance(value, int) and not least <= value <= most:
            raise KAdapterConfigError(f"{field} must be between {least} and {most:,}, not {value}.")
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, (list, tuple)) or not all(isinstance(name, str) for name in architectures):
        raise KAdapterConfigError(f"architectures must be a list of class names, not {architectures!r}.")
    quantization = fields.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict) and not hasattr(quantization, "to_dict"):
        raise KAdapterConfigError(f"quantization_config must be a dict or a configuration, not {quantization!r}.")


@_refuse_clearly
@strict
@dataclasses.dataclass
class KnowledgeAdapterConfig:
    r"""
    Configuration of a knowledge adapter. The defaults are those of the paper for roberta-large (section 3.1;
    `AdapterConfig` in the original's `pytorch_transformers/my_modeling_roberta.py`).

    Args:
        backbone_layers (`list[int]`, *optional*):
            The backbone's hidden states that the adapter reads, one per adapter layer (the original's `adapter_list`).
            0 is the output of the embeddings. By default the first, the middle and the last but one: `[0, 11, 22]` for
            24 layers.
        num_hidden_layers (`int`, defaults to 2):
            Transformer layers inside each adapter layer. With 0, an adapter layer is a bottleneck, which has `hidden_act`
            alone between its projections.
        hidden_size (`int`, defaults to 768): their width, or that of the bottleneck; it may differ from the backbone's.
        num_attention_heads (`int`, defaults to 12): must divide `hidden_size`.
        intermediate_size (`int`, defaults to 3072): width of their feed-forward part.
        hidden_act (`str`, defaults to `"gelu"`): the activation.
        hidden_dropout_prob, attention_probs_dropout_prob (`float`, default to 0.1): dropout, as in BERT.
        layer_norm_eps (`float`, defaults to 1e-5): added to the variance in layer normalisation.
        initializer_range (`float`, defaults to 2e-4):
            Standard deviation of a new adapter's projections, so small that it starts almost as the identity.
        attend_to_padding (`bool`, defaults to `False`):
            Attend to padding, and give padded positions running position ids, as the original does; converted
            checkpoints need it.
        backbone_name_or_path, backbone_fingerprint (`str`, *optional*):
            The backbone that the adapter was trained on; set by the model.
        provenance (`dict`, *optional*):
            Where the knowledge comes from (corpus, size, seed, metric, …), as JSON values.

    Raises:
        KAdapterConfigError: a field is unknown, of the wrong type, or has an impossible value.
    """

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
    # Fields of a newer version, kept so that saving does not lose them.
    newer_fields: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def validate_sizes(self):
        """Called by `@strict` after construction."""
        for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"):
            least = 0 if field == "num_hidden_layers" else 1
            if isinstance(getattr(self, field), bool) or getattr(self, field) < least:
                raise KAdapterConfigError(f"{field} must be an int of at least {least}, not {getattr(self, field)}.")
        if self.num_hidden_layers and self.hidden_size % self.num_attention_heads:
            raise KAdapterConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must divide hidden_size ({self.hidden_size})."
            )
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, field) < 1:
                raise KAdapterConfigError(f"{field} must be in [0, 1), not {getattr(self, field)}.")
        for field in ("layer_norm_eps", "initializer_range"):
            if not 0 < getattr(self, field) < float("inf"):
                raise KAdapterConfigError(f"{field} must be a positive number, not {getattr(self, field)}.")
        self.to_dict()
        if self.hidden_act not in ACT2FN:
            raise KAdapterConfigError(f"hidden_act {self.hidden_act!r} is not one of transformers' activations.")
        if self.backbone_layers is not None:
            if not self.backbone_layers:
                raise KAdapterConfigError("backbone_layers is empty: an adapter reads at least one hidden state.")
            if any(isinstance(layer, bool) or layer < 0 for layer in self.backbone_layers):
                raise KAdapterConfigError(f"backbone_layers must be numbers from 0, not {self.backbone_layers}.")

    def for_backbone(self, backbone_config: PreTrainedConfig, name: str) -> "KnowledgeAdapterConfig":
        """A copy with `backbone_layers` filled in, if missing, and checked against the depth of the backbone."""
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

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "KnowledgeAdapterConfig":
        """The inverse of `to_dict`. Unlike the constructor, it keeps unknown fields, as they may be from a newer version."""
        known = {field.name for field in dataclasses.fields(cls) if field.init}
        config = cls(**{key: value for key, value in content.items() if key in known})
        config.newer_fields = {key: copy.deepcopy(value) for key, value in content.items() if key not in known}
        return config

    def to_dict(self) -> dict[str, Any]:
        """All fields, sorted, as they come back from JSON: the keys of `provenance` are strings."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        try:
            content = json.loads(json.dumps(encode_floats(content | self.newer_fields)))
        except (TypeError, ValueError, RecursionError) as error:
            raise KAdapterConfigError(f"provenance must consist of JSON values: {error}.") from error
        return decode_floats(dict(sorted(content.items())))

    def to_json(self) -> str:
        """All fields as JSON, for comparison: NaN, which differs from itself, is a string there."""
        return json.dumps(encode_floats(self.to_dict()))


@_refuse_clearly
@strict
class KAdapterConfig(PreTrainedConfig):
    r"""
    Configuration of a K-Adapter. `KAdapterConfig()` is roberta-large without adapters; to build a model on another
    backbone, use `KAdapterModel.from_backbone`.

    Args:
        backbone_name_or_path (`str`, *optional*, defaults to `"FacebookAI/roberta-large"`):
            Repository or folder of the backbone.
        backbone_revision, backbone_fingerprint (`str`, *optional*):
            The commit of that repository and the fingerprint of its weights; set when the backbone is loaded.
        backbone_config (`dict` or `PreTrainedConfig`, *optional*): the backbone's own configuration.
        knowledge_adapters (`dict[str, KnowledgeAdapterConfig]`, *optional*): the adapters by name.
        active_knowledge_adapters (`list[str]`, *optional*): the adapters in use, in this order; by default all.
        fusion (`str`, defaults to `"concat"`): `"concat"` (paper, section 3.2), `"add"`, `"gate"`, `"attention"`, or one of
            your own (see `register_fusion`).
        fusion_config (`dict`, *optional*): the arguments of the fusion, such as `{"top_k": 2}` of `"gate"`.
        classifier_dropout (`float`, defaults to 0.1): dropout in the task heads.
        task (`dict`, *optional*): how the head's input is made from text: the task's name, its markers, the maximum length.
            Set by fine-tuning, read by pipelines and predictions.
        freeze_backbone (`bool`, defaults to `True`), frozen_knowledge_adapters (`list[str]`), freeze_head (`bool`):
            What does not train; `freeze_head` applies to the fusion and the task head.

    Raises:
        KAdapterConfigError: a field is of the wrong type or has an impossible value.
    """

    model_type = "kadapter"
    dict_dtype_to_str = dtypes_to_str
    sub_configs = {"backbone_config": AutoConfig}

    backbone_name_or_path: str | None = DEFAULT_BACKBONE
    backbone_revision: str | None = None
    backbone_fingerprint: str | None = None
    backbone_config: Any = None
    knowledge_adapters: dict | None = None
    active_knowledge_adapters: list[str] | None = None
    fusion: str = "concat"
    fusion_config: dict | None = None
    classifier_dropout: float | int = 0.1
    task: dict | None = None
    freeze_backbone: bool = True
    frozen_knowledge_adapters: list[str] | None = None
    freeze_head: bool = False

    def __post_init__(self, **kwargs):
        self.backbone_config = self._build_backbone_config(self.backbone_config)
        self.knowledge_adapters = {
            name: self.adapter_config(name, adapter) for name, adapter in (self.knowledge_adapters or {}).items()
        }
        if self.active_knowledge_adapters is None:
            self.active_knowledge_adapters = list(self.knowledge_adapters)
        if self.frozen_knowledge_adapters is None:
            self.frozen_knowledge_adapters = []
        self.architectures = self.architectures or []  # the Auto classes iterate over it
        for name in _OF_THE_BACKBONE & kwargs.keys():
            setattr(self.backbone_config, name, kwargs.pop(name))
        if not is_remote_code(__name__):
            # The package has registered its pipelines. With this entry, transformers would take those of the repository, and
            # demand trust_remote_code.
            kwargs.pop("custom_pipelines", None)
        drop_colliding(type(self), kwargs)
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
            config = ROBERTA_LARGE
        if not isinstance(config, dict):
            raise KAdapterConfigError(f"backbone_config must be a dict or configuration, not {type(config).__name__}.")
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
            built.to_json_string()  # fails here rather than when saving
            return built
        except Exception as error:  # a foreign configuration class may raise anything
            raise KAdapterConfigError(f"backbone_config ({model_type}): {error}") from error

    def adapter_config(self, name: Any, config: Any) -> KnowledgeAdapterConfig:
        """The configuration of an adapter of this model, from a configuration, a dict or None."""
        check_adapter_name(name)
        if type(config).__name__ == "KnowledgeAdapterConfig" and not isinstance(config, KnowledgeAdapterConfig):
            config = config.to_dict()  # the same class, from the code of a repository
        if isinstance(config, dict):
            try:
                config = KnowledgeAdapterConfig.from_dict(config)
            except KAdapterConfigError as error:
                raise KAdapterConfigError(f"knowledge_adapters['{name}']: {error}") from error
        if config is None:
            config = KnowledgeAdapterConfig()
        if not isinstance(config, KnowledgeAdapterConfig):
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
        check_fusion(self.fusion, self.fusion_config or {})
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise KAdapterConfigError(f"problem_type must be one of {PROBLEM_TYPES}, not {self.problem_type!r}.")
        if not 0 <= self.classifier_dropout < 1:
            raise KAdapterConfigError(f"classifier_dropout must be in [0, 1), not {self.classifier_dropout}.")

    def __getattr__(self, name: str) -> Any:
        if name in _OF_THE_BACKBONE:
            return getattr(self.backbone_config, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The configuration that holds the vocabulary: the backbone's."""
        backbone_config = self.__dict__.get("backbone_config")
        return self if backbone_config is None else backbone_config

    @classmethod
    def known_fields(cls) -> set[str]:
        """All arguments of the constructor; transformers doesn't declare some of them as fields."""
        return {*cls.__dataclass_fields__, "num_labels", "output_attentions", "attn_implementation"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As `PreTrainedConfig.from_dict`, which keeps unknown fields."""
        _check_common(config_dict)
        content = {key: value for key, value in config_dict.items() if key not in _SIZES}  # backbone_config has them
        return super().from_dict(content | {_FROM_FILE: True}, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As `PreTrainedConfig.save_pretrained`, but without `auto_map`, as no code is saved with it."""
        config = copy.deepcopy(self)
        config.__dict__.pop("auto_map", None)
        super(KAdapterConfig, config).save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for name in ("fusion_config", "task"):
            if output.get(name) is None:
                output.pop(name, None)
        output["knowledge_adapters"] = {
            name: adapter if isinstance(adapter, dict) else adapter.to_dict()
            for name, adapter in output["knowledge_adapters"].items()
        }
        return output | {name: getattr(self, name) for name in _SIZES if hasattr(self.backbone_config, name)}

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json: as `PreTrainedConfig.to_diff_dict`, but without the backbone's sizes."""
        return {name: value for name, value in super().to_diff_dict().items() if name not in _SIZES}
