"""Relations between marked entities (paper, section 3.3, "Factual Adapter")."""

from collections.abc import Callable

from transformers import DataCollatorWithPadding

from ..corpora import RELATION
from ..features import relation_features
from ..metrics import relation_metrics, require_scikit_learn
from ..modeling.heads_kadapter import KAdapterForRelationClassification
from .objective import LARGE_DEFAULTS, Objective


def metrics(labels: list[str]) -> Callable:
    """Checks for scikit-learn before the training, as `relation_metrics` needs it afterwards."""
    require_scikit_learn()
    return relation_metrics


FACTUAL = Objective(
    schema=RELATION,
    features=relation_features,
    model_class=KAdapterForRelationClassification,
    collator=DataCollatorWithPadding,
    metrics=metrics,
    large_defaults=LARGE_DEFAULTS,
)
