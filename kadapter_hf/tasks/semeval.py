"""SemEval-2010 Task 8, which the original's code can run; the paper has no figures for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..corpora.schema import Row
from ..corpora.semeval import records as tagged_records
from ..metrics import semeval_metrics
from .records import Records
from .relation import RelationOptions, RelationTask
from .task import register_task


TYPES = (
    "Cause-Effect Content-Container Entity-Origin Member-Collection Component-Whole Entity-Destination "
    "Instrument-Agency Message-Topic Product-Producer"
).split()


@dataclass
class SemEvalOptions(RelationOptions):
    markers: list[str] = field(
        default_factory=lambda: [" @", " ^"],
        metadata={"help": "The tokens around `<e1>` and around `<e2>`, here those of the original."},
    )


@register_task("semeval-2010-task-8")
class SemEval(RelationTask):
    """The task's own text files. `macro_f1` is the official metric, `macro_f1_original` what the original's code computes."""

    endings = (".txt",)
    options = SemEvalOptions
    # In the order of the original.
    labels = [f"{name}({direction})" for name in TYPES for direction in ("e1,e2", "e2,e1")] + ["Other"]
    metric = "macro_f1"
    paper: ClassVar[Mapping[str, Any]] = {**RelationTask.paper, "max_length": 128}

    def records(self, path: Path) -> Records:
        for name, row in tagged_records(path):
            yield name, row if isinstance(row, str) else dict(row)

    def row(self, record: dict) -> Row:
        return record

    def metrics(self, labels: Sequence[str]):
        return semeval_metrics(labels)
