"""
Objectives: what a knowledge adapter learns from. Rows of a schema, the features made of them, a head, and a metric.

To add one, put it into `OBJECTIVES` under its name; `kadapter_hf.pretraining.main` then runs it:

    OBJECTIVES["domain"] = Objective(features=…, model_class=KAdapterForMaskedLM, …)
    main(["domain", "--data", "articles.jsonl", "--output_dir", "domain-adapter"])
"""

from .factual import FACTUAL
from .linguistic import LINGUISTIC
from .objective import Objective
from .typing import TYPING


OBJECTIVES: dict[str, Objective] = {"factual": FACTUAL, "linguistic": LINGUISTIC, "typing": TYPING}

__all__ = ["OBJECTIVES", "Objective"]
