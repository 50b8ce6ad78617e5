"""Types of marked entities, as in open entity typing (paper, section 4.1)."""

from transformers import DataCollatorWithPadding

from ..corpora import TYPING as SCHEMA
from ..features import typing_features
from ..metrics import typing_metrics
from ..modeling.heads_kadapter import KAdapterForEntityTyping
from .objective import LARGE_DEFAULTS, Objective


TYPING = Objective(
    schema=SCHEMA,
    features=typing_features,
    model_class=KAdapterForEntityTyping,
    collator=DataCollatorWithPadding,
    metrics=lambda labels: typing_metrics,
    large_defaults=LARGE_DEFAULTS,
)
