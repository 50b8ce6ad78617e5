"""
Objectives define how a knowledge adapter is trained: the schema of the rows, their features, a head and a metric.

To add one, register it in `OBJECTIVES`; `kadapter_hf.pretraining.main` can then run it:

    OBJECTIVES["domain"] = Objective(features=…, model_class=KAdapterForMaskedLM, …)
    main(["domain", "--data", "articles.jsonl", "--output_dir", "domain-adapter"])
"""

from .factual import FACTUAL
from .linguistic import LINGUISTIC
from .objective import DEFAULTS, Objective
from .typing import TYPING


OBJECTIVES: dict[str, Objective] = {"factual": FACTUAL, "linguistic": LINGUISTIC, "typing": TYPING}

__all__ = ["DEFAULTS", "OBJECTIVES", "Objective"]
