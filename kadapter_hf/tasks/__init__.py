"""
Downstream tasks: how their files are read, their features, head and metrics, and the settings of the paper. One file per task.

`TASKS` has them by name. To add one, subclass `Task` and decorate the class with `register_task`.
"""

from . import cosmos_qa, figer, open_qa, semeval, tacred  # noqa: F401
from .classification import ClassificationTask, classification_features
from .extractive_qa import ExtractiveQATask, extractive_qa_features
from .multiple_choice import MultipleChoiceTask
from .ner import NERTask, tagging_features
from .records import RowProblem
from .relation import RelationTask
from .task import TASKS, Options, Task, register_task
from .typing import TypingTask


__all__ = [
    "TASKS",
    "ClassificationTask",
    "ExtractiveQATask",
    "MultipleChoiceTask",
    "NERTask",
    "Options",
    "RelationTask",
    "RowProblem",
    "Task",
    "TypingTask",
    "classification_features",
    "extractive_qa_features",
    "register_task",
    "tagging_features",
]
