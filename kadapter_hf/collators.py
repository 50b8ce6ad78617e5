"""Collators for features that those of transformers don't pad. They pad to the longest row of the batch."""

from typing import Any

import torch
from transformers import DataCollatorForMultipleChoice, DataCollatorWithPadding, PreTrainedTokenizerBase


class DataCollatorForDependencyParsing:
    """Pads token ids to the most tokens of a row, `word_starts` (with -1) and the labels (with -100) to the most words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        padding = {"word_starts": -1, "head_labels": -100, "relation_labels": -100}
        names = [name for name in features[0] if name not in padding]
        batch = dict(self.pad([{name: feature[name] for name in names} for feature in features]))
        words = max(len(feature["word_starts"]) for feature in features)
        for name in features[0].keys() & padding.keys():
            rows = [[*feature[name], *[padding[name]] * (words - len(feature[name]))] for feature in features]
            batch[name] = torch.tensor(rows)
        return batch


class DataCollatorForChoices:
    """As `DataCollatorForMultipleChoice` of transformers, but rows may lack labels, as for predictions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.pad = DataCollatorForMultipleChoice(tokenizer)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.pad([{"labels": 0} | feature for feature in features])
        if "labels" not in features[0]:
            del batch["labels"]
        return batch
