"""
Conversion of corpora to data sets of three schemas, defined in `schema.py`: relation, typing and dependency.

Each reader returns a `datasets.Dataset` and a report on dropped records. T-REx is too large to be read at once and has a
separate pipeline: `kadapter_hf.corpora.trex`.
"""

from .conllu import parse_text, read_conllu
from .docred import read_docred
from .fewrel import read_fewrel
from .schema import (
    DEPENDENCY,
    RELATION,
    TYPING,
    Corpus,
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


# The commands of `kadapter prepare`, except for those with options of their own (trex, conllu).
CORPORA: dict[str, Corpus] = {
    "fewrel": Corpus(
        read_fewrel,
        "FewRel: Wikidata relations in Wikipedia sentences.",
        "train_wiki.json --names pid2name.json --output data/fewrel",
    ),
    "docred": Corpus(
        read_docred,
        "DocRED and Re-DocRED: pairs of entities in the same sentence.",
        "train_revised.json --names rel_info.json --output data/re-docred",
    ),
    "tacred": Corpus(read_tacred, "TACRED, TACREV and Re-TACRED, in JSON format.", "train.json --output data/tacred"),
    "semeval": Corpus(
        read_semeval,
        "SemEval-2010 Task 8: directed relations between nominals.",
        "TRAIN_FILE.TXT --output data/semeval",
    ),
}

__all__ = [
    "CORPORA",
    "DEPENDENCY",
    "RELATION",
    "TYPING",
    "Corpus",
    "Report",
    "Schema",
    "build",
    "check_columns",
    "dependency_problem",
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
