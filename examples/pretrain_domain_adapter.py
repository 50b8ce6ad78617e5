"""
A third kind of knowledge, as an objective of your own: masked-language modelling on the texts of a domain.

Rows have one column, `text`. The backbone's own language-model head predicts the masked words from the fused states, so
what the adapter adds is what the backbone did not know of the domain; the metric is the held-out loss.

    python examples/pretrain_domain_adapter.py --data articles.jsonl --output_dir domain-adapter

`--help` lists the flags: those of `kadapter pretrain`, and all of transformers' TrainingArguments.
"""

import sys

from transformers import DataCollatorForLanguageModeling

from kadapter_hf import KAdapterForMaskedLM
from kadapter_hf.objectives import OBJECTIVES, Objective
from kadapter_hf.pretraining import main


def text_features(batch, tokenizer, *, max_length=None):
    """Token ids, cut at `max_length`; what the collator masks are the labels."""
    encoded = tokenizer(batch["text"], truncation=True, max_length=max_length)
    return dict(encoded) | {"row": range(len(batch["text"]))}


OBJECTIVES["domain"] = Objective(
    features=text_features, model_class=KAdapterForMaskedLM, collator=DataCollatorForLanguageModeling
)

if __name__ == "__main__":
    main(["domain", *sys.argv[1:]])
