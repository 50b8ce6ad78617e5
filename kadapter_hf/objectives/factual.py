"""Relations between marked entities (paper, section 3.3, "Factual Adapter")."""

from transformers import DataCollatorWithPadding

from ..corpora import RELATION
from ..features import relation_features
from ..metrics import relation_metrics
from ..modeling.heads_kadapter import KAdapterForRelationClassification
from .objective import Objective


FACTUAL = Objective(
    schema=RELATION,
    features=relation_features,
    model_class=KAdapterForRelationClassification,
    collator=DataCollatorWithPadding,
    metrics=lambda labels: relation_metrics,
)
