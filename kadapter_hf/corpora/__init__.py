"""
Conversion of corpora to data sets of three schemas, defined in `schema.py`: relation, typing and dependency.

Each reader returns a `datasets.Dataset` and a report on dropped records. T-REx is too large to be read at once and has a
separate pipeline: `kadapter_hf.corpora.trex`.
"""

from .conllu import parse_text, read_conllu
from .docred import read_docred
from .fewrel import names_beside, read_fewrel
from .schema import (
    DEPENDENCY,
    RELATION,
    TYPING,
    Report,
    Schema,
    build,
    check_columns,
    dependency_problem,
    read_csv,
    read_jsonl,
    relation_problem,
    typing_problem,
)
from .semeval import read_semeval
from .tacred import read_tacred


__all__ = [
    "DEPENDENCY",
    "RELATION",
    "TYPING",
    "Report",
    "Schema",
    "build",
    "check_columns",
    "dependency_problem",
    "names_beside",
    "parse_text",
    "read_conllu",
    "read_csv",
    "read_docred",
    "read_fewrel",
    "read_jsonl",
    "read_semeval",
    "read_tacred",
    "relation_problem",
    "typing_problem",
]
