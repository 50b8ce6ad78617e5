"""
The steps of the T-REx pipeline: from documents to examples, from a file to a shard, from all shards to a split data set.

What counts as usable follows the original's `scripts/clean_T_REx.py`, and what is kept and split its
`scripts/create_subdataset-relation-classification.ipynb`.
"""

import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from .schema import MALFORMED, RELATION, Report, Row, write_json


try:
    import matplotlib.figure
    import orjson
    from datatrove.data import Document
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.writers.parquet import ParquetWriter
except ImportError as error:
    raise ImportError(f'T-REx needs {error.name}: pip install "kadapter-hf[knowledge]"') from None

Split = Literal["document", "example"]

# "instance of", in the original left out by hand.
EXCLUDED = frozenset({"P31"})
TEST_SHARE = 0.1
COLUMNS = RELATION.features.arrow_schema
SHARD = pa.schema([pa.field("id", pa.string()), *COLUMNS])


def document_examples(document: dict[str, Any], report: Report) -> Iterator[tuple[int, Row]]:
    """
    The examples of one T-REx document: the triple's number and a row of the relation schema, its text the sentence.

    A triple is usable if both entities have boundaries in the text and begin and end with words of the triple's sentence.
    Words are looked up by where they start and end, so a document takes time in proportion to words plus triples.
    """
    name = document_name(document)
    try:
        text, sentences, triples = document["text"], document["sentences_boundaries"], list(document["triples"])
        text.encode()  # JSON can hold half of a surrogate pair, Parquet can't
        words = document["words_boundaries"] or ()
        starts, ends = {start for start, _ in words}, {end for _, end in words}
        if any(behind > len(text) for _, behind in sentences):
            raise ValueError("a sentence leaves the text")
    except MALFORMED:
        report.drop("the document is incomplete", name)
        return
    relations = []
    for number, triple in enumerate(triples):
        try:
            row = _row(text, sentences, starts, ends, triple)
        except MALFORMED:
            row = "the triple is incomplete"
        if isinstance(row, str):
            report.drop(row, f"{name} triple {number}")
        else:
            relations.append(row["relation"])
            yield number, row
    # All at once, which takes a fraction of the time.
    report.kept += len(relations)
    report.labels.update(relations)


def document_name(document: dict[str, Any]) -> str:
    """The last part of the document's address, its Wikidata number."""
    return str(document.get("docid", "document without docid")).split("/")[-1]


def _row(text: str, sentences: list, starts: set[int], ends: set[int], triple: dict) -> Row | str:
    subject, object_ = triple["subject"]["boundaries"], triple["object"]["boundaries"]
    if not subject or not object_:
        return "subject or object has no boundaries"
    number = triple["sentence_id"]
    if not 0 <= number < len(sentences):
        return "no such sentence"
    first, behind = sentences[number]
    # Words don't overlap, so all from the first to the last are in the sentence if these ends are. A row whose spans are
    # made of words is one of the schema: checking that again would cost as much as finding it.
    start, end = subject
    if not (start in starts and end in ends and first <= start < end <= behind):
        return "subject or object is not made of words of the sentence"
    if text[start:end].isspace():
        return "subject or object is empty"
    object_start, object_end = object_
    if not (object_start in starts and object_end in ends and first <= object_start < object_end <= behind):
        return "subject or object is not made of words of the sentence"
    if text[object_start:object_end].isspace():
        return "subject or object is empty"
    if start < object_end and object_start < end:
        return "subject and object overlap"
    relation = triple["predicate"]["uri"].rpartition("/")[2]
    if not relation:
        return "relation is not a name"
    return {
        "text": text[first:behind],
        "subject": [start - first, end - first],
        "object": [object_start - first, object_end - first],
        "relation": relation,
    }


class ReadTrex(PipelineStep):
    """Reads file number `rank`, yields its examples, and when through writes the report on them."""

    name = "T-REx"
    type = "READER"

    def __init__(self, files: list[str], reports: str, strict: bool):
        super().__init__()
        self.files, self.reports, self.strict = files, reports, strict

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        path = Path(self.files[rank])
        report = Report()
        for name, row in file_examples(path, report):
            yield Document(row["text"], name, metadata=dict(row))
        if self.strict and report.dropped:
            raise ValueError(f"{path}: {report.reasons()}")
        Path(self.reports).mkdir(parents=True, exist_ok=True)
        report.save(Path(self.reports, f"{rank:05d}.json"))


def file_examples(path: Path, report: Report) -> Iterator[tuple[str, Row]]:
    """The examples of a file, each with a name of its own."""
    with no_garbage_collection():
        for place, document in enumerate(_documents(path, report)):
            if not isinstance(document, dict):
                report.drop("the document is incomplete", f"{path.name} document {place}")
                continue
            name = document_name(document)
            for number, row in document_examples(document, report):
                yield f"{name}#{number}", row


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A file is so many objects that looking through them for cycles, which JSON can't have, would take most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _documents(path: Path, report: Report) -> list[Any]:
    try:
        content = _parsed(path.read_bytes())
        reason = None if isinstance(content, list) else "the file is no list of documents"
    except UnicodeDecodeError:
        reason = "the file is not UTF-8"
    except ValueError:
        reason = "the file is not JSON"
    except OSError:
        reason = "the file can't be read"
    if reason is None:
        return content
    report.drop(reason, path.name)
    return []


def _parsed(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except ValueError:  # json takes more, such as half of a surrogate pair, and tells what is wrong
        return json.loads(content)


def shard_writer(folder: str) -> ParquetWriter:
    """Writes what `ReadTrex` yields, a Parquet file for each task."""
    return ParquetWriter(folder, "${rank}.parquet", adapter=_shard_row, schema=SHARD, max_file_size=-1)


def _shard_row(writer: ParquetWriter, document: Document) -> dict[str, Any]:
    return {"id": document.id, **document.metadata}


class SplitTrex(PipelineStep):
    """Writes train.parquet, test.parquet, relations.json, relations.png and report.json from the extracted shards."""

    name = "T-REx split"
    type = "SPLIT"

    def __init__(
        self, shards: str, reports: str, output: str, min_examples: int, split: Split, seed: int, strict: bool
    ):
        super().__init__()
        self.shards, self.reports, self.output = shards, reports, output
        self.min_examples, self.split, self.seed, self.strict = min_examples, split, seed, strict

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        report = Report()
        for path in sorted(Path(self.reports).glob("*.json")):
            report.add(Report.load(path))
        if self.strict and report.dropped:
            raise ValueError(f"unusable files or triples: {report.reasons()}")
        self._drop_relations(report)
        output = Path(self.output)
        drafts = {name: output / f".{name}.draft" for name in ("train", "test")}
        sizes = self._write(drafts, set(report.labels))
        draw(report, output / "relations.png")
        write_json(output / "relations.json", sorted(report.labels))
        for name, draft in drafts.items():
            draft.replace(output / f"{name}.parquet")
            if not sizes[name]:  # datasets takes a file without rows for an error
                (output / f"{name}.parquet").unlink()
        report.save(output / "report.json", sizes=sizes, split=self.split, seed=self.seed)

    def _drop_relations(self, report: Report) -> None:
        if not report.labels:
            raise ValueError(f"no usable triple. {report.reasons() or 'The files have none at all'}")
        most, count = report.labels.most_common(1)[0]
        for relation, examples in report.labels.most_common():
            if relation in EXCLUDED:
                report.drop("relation left out", relation, examples)
            elif examples < self.min_examples:
                report.drop(f"relation with fewer than {self.min_examples} examples", relation, examples)
            else:
                continue
            report.kept -= examples
            del report.labels[relation]
        if not report.labels:
            raise ValueError(
                f"no relation is left: the most frequent, {most}, has {count} examples, {self.min_examples} are asked for "
                f"and {', '.join(EXCLUDED)} doesn't count"
            )

    def _write(self, drafts: dict[str, Path], relations: set[str]) -> dict[str, int]:
        sizes = dict.fromkeys(drafts, 0)
        with pq.ParquetWriter(drafts["train"], COLUMNS) as train, pq.ParquetWriter(drafts["test"], COLUMNS) as test:
            writers = {"train": train, "test": test}
            for shard in sorted(Path(self.shards).glob("*.parquet")):
                for batch in pq.ParquetFile(shard).iter_batches(batch_size=100_000):
                    places: dict[str, list[int]] = {"train": [], "test": []}
                    pairs = zip(batch["id"].to_pylist(), batch["relation"].to_pylist(), strict=True)
                    for place, (name, relation) in enumerate(pairs):
                        if relation in relations:
                            key = name if self.split == "example" else name.rpartition("#")[0]
                            places["test" if in_test(key, self.seed) else "train"].append(place)
                    for part, chosen in places.items():
                        if not chosen:  # datasets can't read a row group of none
                            continue
                        rows = batch.take(pa.array(chosen, pa.int64())).select(COLUMNS.names)
                        writers[part].write_batch(rows.cast(COLUMNS))
                        sizes[part] += len(chosen)
        return sizes


def in_test(key: str, seed: int) -> bool:
    """Whether a document or an example belongs to the test set; the same on every machine and in every order."""
    digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < TEST_SHARE * 2**64


def draw(report: Report, path: Path) -> None:
    """A bar for each of the 200 most frequent relations, as the original draws them."""
    counts = report.labels.most_common(200)[::-1]
    figure = matplotlib.figure.Figure(figsize=(8, 1 + 0.2 * len(counts)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([relation for relation, _ in counts], [count for _, count in counts])
    axes.bar_label(bars, padding=2)
    axes.set_xlabel("examples")
    axes.set_title(f"{report.kept:,} examples of {len(report.labels)} relations")
    figure.savefig(path)
