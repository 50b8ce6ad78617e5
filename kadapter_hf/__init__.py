"""K-Adapter for the Hugging Face ecosystem: knowledge adapters beside a frozen encoder, by name."""

from importlib.metadata import PackageNotFoundError, version

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .modeling.configuration_kadapter import KAdapterConfig, KAdapterConfigError, KnowledgeAdapterConfig
from .modeling.heads_kadapter import (
    DependencyParserOutput,
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
)
from .modeling.storage_kadapter import BackboneMismatchError, KAdapterLoadError


try:
    __version__ = version("kadapter-hf")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

AutoConfig.register("kadapter", KAdapterConfig, exist_ok=True)
AutoModel.register(KAdapterConfig, KAdapterModel, exist_ok=True)
AutoModelForMaskedLM.register(KAdapterConfig, KAdapterForMaskedLM, exist_ok=True)
AutoModelForTokenClassification.register(KAdapterConfig, KAdapterForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(KAdapterConfig, KAdapterForQuestionAnswering, exist_ok=True)
AutoModelForMultipleChoice.register(KAdapterConfig, KAdapterForMultipleChoice, exist_ok=True)


class _SeveralClasses(tuple):
    """Of several classes an Auto class takes the one that config.json's `architectures` names."""

    __name__ = KAdapterForSequenceClassification.__name__  # pipelines of older transformers ask each entry for it


AutoModelForSequenceClassification.register(
    KAdapterConfig,
    _SeveralClasses((KAdapterForSequenceClassification, KAdapterForEntityTyping, KAdapterForRelationClassification)),
    exist_ok=True,
)

__all__ = [
    "BackboneMismatchError",
    "DependencyParserOutput",
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
]
