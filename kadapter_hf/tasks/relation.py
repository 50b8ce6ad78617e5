"""Relations between two marked entities, from tables of your own; TACRED and SemEval have the same features and head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..corpora.schema import RELATION, Row
from ..features import relation_features
from ..metrics import relation_metrics, require_scikit_learn
from ..modeling.heads_kadapter import KAdapterForRelationClassification
from .records import label_in, needed, span
from .task import Options, Task, register_task


TEXT = ("text", "sentence", "sent")
SUBJECT = ("subject", "subj", "head", "entity1", "e1")
OBJECT = ("object", "obj", "tail", "entity2", "e2")


@dataclass
class RelationOptions(Options):
    markers: list[str] = field(
        default_factory=lambda: ["@", "#"],
        metadata={
            "help": "The tokens around the subject and around the object, with a leading space if the tokenizer should see "
            "one."
        },
    )

    def __post_init__(self):
        if len(self.markers) != 2 or not all(marker.strip() for marker in self.markers):
            raise ValueError(f"--markers must be two tokens, for the subject and the object, not {self.markers}")


@register_task("relation")
class RelationTask(Task):
    """
    Rows with `text`, `subject`, `object` and `relation`. The entities are spans or their texts; columns may also have other
    common names (`sentence`, `head`, `tail`, `label`, …).
    """

    schema = RELATION
    features = staticmethod(relation_features)
    model_class = KAdapterForRelationClassification
    options: ClassVar[type[Options]] = RelationOptions
    metric = "micro_f1"
    # Not in the paper for data of your own: those for TACRED with one adapter.
    paper: ClassVar[Mapping[str, Any]] = {
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-5,
        "warmup_steps": 0.1,
        "num_train_epochs": 5,
        "max_length": 184,
    }

    def row(self, record: dict[str, Any]) -> Row:
        text = needed(record, TEXT)
        return {
            "text": text,
            "subject": span(record, text, SUBJECT),
            "object": span(record, text, OBJECT),
            "relation": label_in(record, ("relation", "label", "rel")),
        }

    def metrics(self, labels: Sequence[str]):
        require_scikit_learn()
        return relation_metrics
