"""K-Adapter for the Hugging Face ecosystem: named knowledge adapters for a frozen encoder."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version as _version
from typing import Any

from transformers import (
    AutoConfig as _AutoConfig,
    AutoModel as _AutoModel,
    AutoModelForSequenceClassification as _AutoModelForSequenceClassification,
)
from transformers.pipelines import PIPELINE_REGISTRY as _PIPELINE_REGISTRY

from .cards import write_model_card
from .hub import push_knowledge_adapter_to_hub, push_saved, push_to_hub
from .modeling.configuration_kadapter import KAdapterConfig, KnowledgeAdapterConfig
from .modeling.format_kadapter import BackboneMismatchError, KAdapterConfigError, KAdapterLoadError
from .modeling.fusion_kadapter import KnowledgeFusion, register_fusion
from .modeling.head_base_kadapter import HeadModel, cross_entropy
from .modeling.heads_kadapter import (
    DependencyParserOutput,
    Encoded,
    KAdapterForDependencyParsing,
    KAdapterForEntityTyping,
    KAdapterForMaskedLM,
    KAdapterForMultipleChoice,
    KAdapterForQuestionAnswering,
    KAdapterForRelationClassification,
    KAdapterForSequenceClassification,
    KAdapterForTokenClassification,
    KAdapterModel,
    KAdapterModelOutput,
    encodes_inputs,
)
from .modeling.modeling_kadapter import KAdapterPreTrainedModel
from .modeling.pipelines_kadapter import PIPELINES as _PIPELINES, EntityTypingPipeline, RelationClassificationPipeline
from .modeling.registry_kadapter import register_head
from .summary import knowledge_summary
from .trees import DependencyParsingPipeline, draw_tree


try:
    __version__ = _version("kadapter-hf")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_AutoConfig.register(KAdapterConfig.model_type, KAdapterConfig, exist_ok=True)
_AutoModel.register(KAdapterConfig, KAdapterModel, exist_ok=True)
_PIPELINE_REGISTRY.register_pipeline(
    "dependency-parsing", DependencyParsingPipeline, pt_model=KAdapterForDependencyParsing
)
for _task, _pipeline in _PIPELINES.values():
    _PIPELINE_REGISTRY.register_pipeline(_task, _pipeline, pt_model=_AutoModelForSequenceClassification)
# Methods that code loaded from a repository lacks: the summary, model cards, and Hub pushes with checks.
for _method in (knowledge_summary, write_model_card, push_to_hub, push_saved, push_knowledge_adapter_to_hub):
    setattr(KAdapterPreTrainedModel, _method.__name__, _method)

# Imported when they are first used, as some take seconds.
_SUBMODULES = (
    "activations",
    "collators",
    "conversion",
    "corpora",
    "export",
    "features",
    "finetuning",
    "inspect",
    "metrics",
    "objectives",
    "predicting",
    "pretraining",
    "probing",
    "tasks",
)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES, "__version__"])


__all__ = [
    "BackboneMismatchError",
    "DependencyParserOutput",
    "DependencyParsingPipeline",
    "Encoded",
    "EntityTypingPipeline",
    "HeadModel",
    "KAdapterConfig",
    "KAdapterConfigError",
    "KAdapterForDependencyParsing",
    "KAdapterForEntityTyping",
    "KAdapterForMaskedLM",
    "KAdapterForMultipleChoice",
    "KAdapterForQuestionAnswering",
    "KAdapterForRelationClassification",
    "KAdapterForSequenceClassification",
    "KAdapterForTokenClassification",
    "KAdapterLoadError",
    "KAdapterModel",
    "KAdapterModelOutput",
    "KnowledgeAdapterConfig",
    "KnowledgeFusion",
    "RelationClassificationPipeline",
    "cross_entropy",
    "draw_tree",
    "encodes_inputs",
    "register_fusion",
    "register_head",
]
