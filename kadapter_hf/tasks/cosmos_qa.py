"""CosmosQA (paper, section 4.2; `examples/run_finetune_cosmosqa_adapter.py` in the original)."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from .multiple_choice import MultipleChoiceTask
from .task import register_task


@register_task("cosmos-qa")
class CosmosQA(MultipleChoiceTask):
    """The CSV or JSON Lines files of wilburOne/cosmosqa: `context`, `question`, `answer0` to `answer3`, `label`."""

    endings = (".jsonl", ".csv", ".json", ".parquet")
    published = {"": 80.59, "multitask": 81.19, "F": 80.93, "L": 80.76, "F+L": 81.83}

    def submission(self, rows: Dataset, found: Mapping[int, dict[str, Any]]) -> tuple[str, str]:
        """The leaderboard's file: the number of the chosen answer, a line a question; 0 for one that is too long."""
        answers = [str(found.get(number, {}).get("prediction", 0)) for number in range(len(rows))]
        return "predictions.lst", "\n".join(answers) + "\n"
