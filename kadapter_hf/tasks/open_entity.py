"""OpenEntity with 9 types (paper, section 4.1; `examples/run_finetune_openentity_adapter.py` in the original)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..corpora.files import read_json
from ..corpora.schema import Row
from .records import Records, needed
from .task import register_task
from .typing import TypingTask


@register_task("open-entity")
class OpenEntity(TypingTask):
    """JSON files with a list of `{"sent", "start", "end", "labels"}`; `end` is exclusive."""

    endings: ClassVar[tuple[str, ...]] = (".json",)
    labels: ClassVar[Sequence[str] | None] = [
        "entity",
        "location",
        "time",
        "organization",
        "object",
        "event",
        "place",
        "person",
        "group",
    ]
    # The learning rate is the paper's and the README's; the original's script has 1e-4, with which others got 68.7. The
    # number of epochs is that of the script's 12,000 steps.
    paper: ClassVar[Mapping[str, Any]] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-6,
        "warmup_steps": {"F": 500, "L": 1000, "F+L": 1000},
        "num_train_epochs": 24,
        "max_length": 256,
    }
    published: ClassVar[Mapping[str, float]] = {
        "": 76.23,
        "multitask": 76.97,
        "untrained": 76.17,
        "F": 77.53,
        "L": 76.89,
        "F+L": 77.61,
    }
    reproduced: ClassVar[Mapping[str, str]] = {
        "": "76.5",
        "F": "76.0 to 76.4",
        "L": "76.1 to 76.3",
        "F+L": "76.0 to 76.2",
    }

    def records(self, path: Path) -> Records:
        for number, record in enumerate(read_json(path, list)):
            yield f"record {number}", record if isinstance(record, dict) else "not a JSON object"

    def row(self, record: dict[str, Any]) -> Row:
        return {
            "text": needed(record, ("sent",)),
            "entity": [needed(record, ("start",)), needed(record, ("end",))],
            "types": record.get("labels"),
        }
