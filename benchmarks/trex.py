"""
How long it takes to find the examples in T-REx documents: by looking words up, as the package does, and by going through
all words of the document for every triple, as the original does.

    python benchmarks/trex.py [FOLDER of T-REx's JSON files, or such a file]

Without a folder it makes up documents of the size of T-REx's long ones. Both ways must find the same examples.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from _common import print_table

from kadapter_hf.corpora.schema import Report
from kadapter_hf.corpora.trex import corpus_files
from kadapter_hf.corpora.trex_steps import document_examples


DOCUMENTS = 200  # that are timed; a corpus of fewer is repeated
ROUNDS = 5


def by_lookup(document: dict) -> list:
    return [row for _, row in document_examples(document, Report())]


def by_scanning(document: dict) -> list[dict]:
    """For every triple, as in the original: all words for those of the sentence, and these for the entities."""
    rows, text = [], document["text"]
    for triple in document["triples"]:
        subject, object_ = triple["subject"]["boundaries"], triple["object"]["boundaries"]
        if not subject or not object_:
            continue
        first, behind = document["sentences_boundaries"][triple["sentence_id"]]
        words, bounds = [], []
        for start, end in document["words_boundaries"]:
            if start >= first and end <= behind:
                words.append(text[start:end])
                bounds.append((start, end))
        found = 0
        for start, end in bounds:
            found += start == subject[0]
            found += end == subject[1]
            found += start == object_[0]
            found += end == object_[1]
        if found == 4:
            rows.append(
                {
                    "text": text[first:behind],
                    "subject": [place - first for place in subject],
                    "object": [place - first for place in object_],
                    "relation": triple["predicate"]["uri"].split("/")[-1],
                }
            )
    return rows


def made_up(documents: int = 50, sentences: int = 20, words: int = 25, triples: int = 100) -> list[dict]:
    """Documents in T-REx's format, of made-up words."""
    generator = random.Random(0)
    return [_made_up_document(f"Q{number}", generator, sentences, words, triples) for number in range(documents)]


def _made_up_document(name: str, generator: random.Random, sentences: int, words: int, triples: int) -> dict:
    text, word_bounds, sentence_bounds = "", [], []
    for _ in range(sentences):
        first = len(text)
        for _ in range(words):
            word = "abcdefghijk"[: generator.randint(2, 11)]
            word_bounds.append([len(text), len(text) + len(word)])
            text += word + " "
        sentence_bounds.append([first, len(text) - 1])
    made = []
    for _ in range(triples):
        sentence = generator.randrange(sentences)
        subject, object_ = (word_bounds[sentence * words + place] for place in generator.sample(range(words), 2))
        made.append(
            {
                "sentence_id": sentence,
                "predicate": {"uri": f"http://www.wikidata.org/prop/direct/P{generator.randint(1, 600)}"},
                "subject": {"boundaries": subject},
                "object": {"boundaries": object_},
            }
        )
    return {
        "docid": name,
        "text": text,
        "words_boundaries": word_bounds,
        "sentences_boundaries": sentence_bounds,
        "triples": made,
    }


def seconds(work: Callable[[], object]) -> float:
    """The processor time of the fastest of some rounds, which what else the machine does disturbs least."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    if len(sys.argv) > 1:
        corpus = [document for file in corpus_files(sys.argv[1:]) for document in json.loads(Path(file).read_bytes())]
    else:
        corpus = made_up()
    for document in corpus:
        assert by_lookup(document) == by_scanning(document), document["docid"]
    documents = (corpus * -(-DOCUMENTS // len(corpus)))[:DOCUMENTS]
    ours = seconds(lambda: [by_lookup(document) for document in documents])
    scanning = seconds(lambda: [by_scanning(document) for document in documents])
    content = json.dumps(documents)
    parsing = seconds(lambda: json.loads(content))
    triples = sum(len(document["triples"]) for document in documents)
    print_table(
        [f"T-REx, {len(documents)} documents, {triples:,} triples", "lookup", "scanning", "ratio"],
        [
            ["finding the examples, ms", f"{ours * 1e3:.0f}", f"{scanning * 1e3:.0f}", f"{scanning / ours:.1f}"],
            [
                "the same with parsing the JSON, ms",
                f"{(ours + parsing) * 1e3:.0f}",
                f"{(scanning + parsing) * 1e3:.0f}",
                f"{(scanning + parsing) / (ours + parsing):.1f}",
            ],
        ],
    )


if __name__ == "__main__":
    main()
