"""
Time to extract examples from T-REx documents, compared with the original.

The package looks words up; the original scans all words of the document for every triple. Two times are measured: finding
the examples, and converting a file of documents to a file of examples, i.e. the step that `kadapter prepare trex` runs for
each file, compared with the original's, which uses json.

    python benchmarks/trex.py [JSON files of T-REx, or folders of them]

Without arguments, documents of the size of T-REx's long ones are generated. Both must find the same examples, except for
overlapping entities, which only the original keeps.
"""

import gc
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _common import print_table

from kadapter_hf.corpora.schema import Report
from kadapter_hf.corpora.trex import corpus_files
from kadapter_hf.corpora.trex_steps import (
    DECODER,
    Example,
    ExtractTrex,
    TrexDocument,
    document_examples,
    no_garbage_collection,
)


DOCUMENTS = 200  # documents to measure; a smaller corpus is repeated
ROUNDS = 10


def read_with_json(file: Path) -> list[dict]:
    """Reads like the original."""
    with open(file, encoding="utf-8") as opened:
        return json.load(opened)


def by_lookup(documents: list[TrexDocument]) -> list:
    """Like the package, including the disabled garbage collector."""
    report = Report()
    with no_garbage_collection():
        return [document_examples(document, report) for document in documents]


def by_scanning(documents: list[dict]) -> list[dict]:
    """Like the original. It overwrites the boundaries in the documents, so they can be used only once."""
    return [example for document in documents for example in scan(document)]


def file_by_scanning(file: Path, output: Path) -> None:
    with open(output, "w", encoding="utf-8") as opened:
        json.dump(by_scanning(read_with_json(file)), opened)


def scan(document: dict) -> list[dict]:
    """For every triple, searches all words of the document for the sentence, and those of the sentence for the entities."""
    found, text = [], document["text"]
    for triple in document["triples"]:
        subject, object_ = triple["subject"]["boundaries"], triple["object"]["boundaries"]
        relation, subject_label, object_label = (
            triple[part]["uri"].split("/")[-1] for part in ("predicate", "subject", "object")
        )
        if not subject or not object_:
            continue
        sentence = document["sentences_boundaries"][triple["sentence_id"]]
        words, bounds, bounds_in_sentence = [], [], []
        for word in document["words_boundaries"]:
            if word[0] >= sentence[0] and word[1] <= sentence[1]:
                words.append(text[word[0] : word[1]])
                bounds.append(word)
                bounds_in_sentence.append(
                    [word[0] - sentence[0], word[1] - sentence[0]]
                )  # not used, as in the original
        matches = 0
        for place, word in enumerate(bounds):
            if word[0] == subject[0]:
                subject[0] = place
                matches += 1
            if word[1] == subject[1]:
                subject[1] = place
                matches += 1
            if word[0] == object_[0]:
                object_[0] = place
                matches += 1
            if word[1] == object_[1]:
                object_[1] = place
                matches += 1
        if matches == 4:
            found.append(
                {
                    "docid": document["docid"].split("/")[-1],
                    "token": words,
                    "relation": relation,
                    "subj_start": subject[0],
                    "subj_end": subject[1],
                    "obj_start": object_[0],
                    "obj_end": object_[1],
                    "subj_label": subject_label,
                    "obj_label": object_label,
                }
            )
    return found


def as_the_original(document: dict, example: Example) -> dict:
    """Converts an example of the package to the original's form, with positions in words of the sentence."""
    name, _, subject, object_, relation = example
    triple = document["triples"][int(name.rpartition("#")[2])]
    first, behind = document["sentences_boundaries"][triple["sentence_id"]]
    words = [(start, end) for start, end in document["words_boundaries"] if start >= first and end <= behind]
    starts = {start - first: place for place, (start, _) in enumerate(words)}
    ends = {end - first: place for place, (_, end) in enumerate(words)}
    return {
        "docid": document["docid"].split("/")[-1],
        "token": [document["text"][start:end] for start, end in words],
        "relation": relation,
        "subj_start": starts[subject[0]],
        "subj_end": ends[subject[1]],
        "obj_start": starts[object_[0]],
        "obj_end": ends[object_[1]],
        "subj_label": triple["subject"]["uri"].split("/")[-1],
        "obj_label": triple["object"]["uri"].split("/")[-1],
    }


def apart(example: dict) -> bool:
    return example["subj_end"] < example["obj_start"] or example["obj_end"] < example["subj_start"]


def check(file: Path) -> None:
    typed = DECODER.decode(file.read_bytes())
    for document, same in zip(read_with_json(file), typed, strict=True):
        ours = [as_the_original(document, found) for found in document_examples(same, Report())]
        assert ours == [example for example in scan(document) if apart(example)], document["docid"]


def made_up(documents: int = 50, sentences: int = 20, words: int = 25, triples: int = 100) -> list[dict]:
    """Generates documents in T-REx's format from random words."""
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
                "subject": {"boundaries": list(subject), "uri": f"http://www.wikidata.org/entity/Q{subject[0]}"},
                "object": {"boundaries": list(object_), "uri": f"http://www.wikidata.org/entity/Q{object_[0]}"},
            }
        )
    return {
        "docid": name,
        "text": text,
        "words_boundaries": word_bounds,
        "sentences_boundaries": sentence_bounds,
        "triples": made,
    }


def seconds(work: Callable[[Any], object], prepare: Callable[[], Any]) -> float:
    """The processor time of the fastest round, which is least affected by other load on the machine."""
    times = []
    for _ in range(ROUNDS):
        prepared = prepare()
        # Excludes existing objects from garbage collection, as in a process that does nothing else.
        gc.collect()
        gc.freeze()
        start = time.process_time()
        made = work(prepared)
        times.append(time.process_time() - start)
        gc.unfreeze()
        del prepared, made
    return min(times)


def main() -> None:
    if len(sys.argv) > 1:
        corpus = [document for file in corpus_files(sys.argv[1:]) for document in read_with_json(Path(file))]
    else:
        corpus = made_up()
    documents = (corpus * -(-DOCUMENTS // len(corpus)))[:DOCUMENTS]
    triples = sum(len(document["triples"]) for document in documents)
    with TemporaryDirectory() as folder:
        file = Path(folder, "documents.json")
        file.write_text(json.dumps(documents), encoding="utf-8")
        check(file)
        rows = [
            (
                "finding the examples, ms",
                seconds(by_lookup, lambda: DECODER.decode(file.read_bytes())),
                seconds(by_scanning, lambda: read_with_json(file)),
            ),
            (
                "from file to file, ms",
                seconds(lambda step: step.run(rank=0), lambda: ExtractTrex([str(file)], folder, folder, strict=False)),
                seconds(lambda output: file_by_scanning(file, output), lambda: Path(folder, "examples.json")),
            ),
        ]
    print_table(
        [f"T-REx, {len(documents)} documents, {triples:,} triples", "the package", "the original", "ratio"],
        [[name, f"{ours * 1e3:.0f}", f"{theirs * 1e3:.0f}", f"{theirs / ours:.1f}"] for name, ours, theirs in rows],
    )


if __name__ == "__main__":
    main()
