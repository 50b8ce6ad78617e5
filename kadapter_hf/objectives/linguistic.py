"""Dependency trees (paper, section 3.3, "Linguistic Adapter")."""

from ..collators import DataCollatorForDependencyParsing
from ..corpora import DEPENDENCY
from ..features import dependency_features
from ..metrics import decode_for_metrics, dependency_metrics
from ..modeling.heads_kadapter import KAdapterForDependencyParsing
from .objective import DEFAULTS, LARGE_DEFAULTS, Objective


LINGUISTIC = Objective(
    schema=DEPENDENCY,
    features=dependency_features,
    model_class=KAdapterForDependencyParsing,
    collator=DataCollatorForDependencyParsing,
    metrics=dependency_metrics,
    preprocess_logits=decode_for_metrics,
    defaults=DEFAULTS | {"learning_rate": 1e-3},
    large_defaults=LARGE_DEFAULTS
    | {"learning_rate": 1e-5, "per_device_train_batch_size": 256, "num_train_epochs": 10},
)
