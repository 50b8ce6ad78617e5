"""
A custom objective for another kind of knowledge: masked-language modelling on texts of a domain.

Rows have one column, `text`. The backbone's language-model head predicts the masked words from the fused states, so the
adapter learns what the backbone does not know about the domain. The metric is the held-out loss.

    python examples/pretrain_domain_adapter.py --data articles.jsonl --output_dir domain-adapter

`--help` lists the flags: those of `kadapter pretrain` and all of transformers' TrainingArguments.
"""

import sys

from transformers import DataCollatorForLanguageModeling

from kadapter_hf import KAdapterForMaskedLM
from kadapter_hf.objectives import OBJECTIVES, Objective
from kadapter_hf.pretraining import main


def text_features(batch, tokenizer, *, max_length=None):
    """Token ids, truncated to `max_length`; the collator masks some of them, which become the labels."""
    encoded = tokenizer(batch["text"], truncation=True, max_length=max_length)
    return dict(encoded) | {"row": range(len(batch["text"]))}


OBJECTIVES["domain"] = Objective(
    features=text_features, model_class=KAdapterForMaskedLM, collator=DataCollatorForLanguageModeling
)

if __name__ == "__main__":
    main(["domain", *sys.argv[1:]])
