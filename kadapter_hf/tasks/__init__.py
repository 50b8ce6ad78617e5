"""
Downstream tasks: how their files are read, their features, head and metrics, and the settings of the paper. One file per task.

`TASKS` has them by name. To add one, subclass `Task` and decorate the class with `register_task`.
"""

from . import classification, cosmos_qa, figer, ner, open_qa, semeval, tacred  # noqa: F401
from .extractive_qa import extractive_qa_features
from .task import TASKS, Options, Task, register_task


__all__ = ["TASKS", "Options", "Task", "extractive_qa_features", "register_task"]
