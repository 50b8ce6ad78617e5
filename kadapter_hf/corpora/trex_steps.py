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
    import msgspec
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


class Entity(msgspec.Struct, gc=False):
    boundaries: tuple[int, int] | None


class Predicate(msgspec.Struct, gc=False):
    uri: str


class Triple(msgspec.Struct, gc=False):
    sentence_id: int
    predicate: Predicate
    subject: Entity
    object: Entity


class TrexDocument(msgspec.Struct, gc=False):
    """What is used of a document; boundaries are `[start, end)` in characters of the text. A broken triple is None."""

    docid: str
    text: str
    sentences_boundaries: list[tuple[int, int]]
    words_boundaries: list[tuple[int, int]] | None
    triples: list[Triple | None]

    @property
    def name(self) -> str:
        """The last part of the document's address, its Wikidata number."""
        return self.docid.rpartition("/")[2]


DECODER = msgspec.json.Decoder(list[TrexDocument])
NO_WORDS = "subject or object is not made of words of the sentence"
INCOMPLETE = "the document is incomplete"


def document_examples(document: TrexDocument, report: Report) -> list[tuple[int, Row]]:
    """
    The examples of one T-REx document: the triple's number and a row of the relation schema, its text the sentence.

    A triple is usable if both entities have boundaries in the text and begin and end with words of the triple's sentence.
    Words are looked up by where they start and end, so a document takes time in proportion to words plus triples.
    """
    if any(behind > len(document.text) for _, behind in document.sentences_boundaries):
        report.drop(INCOMPLETE, document.name)
        return []
    words = document.words_boundaries or ()
    starts, ends = {start for start, _ in words}, {end for _, end in words}
    found = []
    for number, triple in enumerate(document.triples):
        row = _row(document, starts, ends, triple)
        if isinstance(row, str):
            report.drop(row, f"{document.name} triple {number}")
        else:
            found.append((number, row))
    # All at once, which takes a fraction of the time.
    report.kept += len(found)
    report.labels.update([row["relation"] for _, row in found])
    return found


def _row(document: TrexDocument, starts: set[int], ends: set[int], triple: Triple | None) -> Row | str:
    if triple is None:
        return "the triple is incomplete"
    subject, object_, number = triple.subject.boundaries, triple.object.boundaries, triple.sentence_id
    if subject is None or object_ is None:
        return "subject or object has no boundaries"
    if not 0 <= number < len(document.sentences_boundaries):
        return "no such sentence"
    first, behind = document.sentences_boundaries[number]
    # Words don't overlap, so all from the first to the last are in the sentence if these ends are. A row whose spans are
    # made of words is one of the schema: checking that again would cost as much as finding it.
    start, end = subject
    object_start, object_end = object_
    if not (start in starts and end in ends and first <= start < end <= behind):
        return NO_WORDS
    if not (object_start in starts and object_end in ends and first <= object_start < object_end <= behind):
        return NO_WORDS
    if start < object_end and object_start < end:
        return "subject and object overlap"
    text = document.text
    if text[start:end].isspace() or text[object_start:object_end].isspace():
        return "subject or object is empty"
    relation = triple.predicate.uri.rpartition("/")[2]
    if not relation:
        return "relation is not a name"
    return {
        "text": text[first:behind],
        "subject": (start - first, end - first),
        "object": (object_start - first, object_end - first),
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
        for document in _documents(path, report):
            name = document.name
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


def _documents(path: Path, report: Report) -> list[TrexDocument]:
    try:
        content = path.read_bytes()
    except OSError:
        report.drop("the file can't be read", path.name)
        return []
    try:
        return DECODER.decode(content)
    except msgspec.MsgspecError:  # something in it is broken: what is not, is found more slowly
        pass
    try:
        documents = json.loads(content)  # which also takes more than JSON, such as NaN
    except UnicodeDecodeError:
        reason = "the file is not UTF-8"
    except ValueError:
        reason = "the file is not JSON"
    else:
        if isinstance(documents, list):
            read = (read_document(one, f"{path.name} document {place}", report) for place, one in enumerate(documents))
            return [document for document in read if document is not None]
        reason = "the file is no list of documents"
    report.drop(reason, path.name)
    return []


def read_document(content: Any, name: str, report: Report) -> TrexDocument | None:
    """
    A document of which parts may be broken; None if it is of no use.

    Args:
        name: what the report calls a document that does not say its own.
    """
    try:
        name = str(content.get("docid", name)).rpartition("/")[2]
        triples = list(content["triples"])
        document = msgspec.convert(content | {"docid": name, "triples": []}, TrexDocument)
        document.text.encode()  # JSON can hold half of a surrogate pair, Parquet can't
    except MALFORMED:
        report.drop(INCOMPLETE, name)
        return None
    document.triples = [_read_triple(triple) for triple in triples]
    return document


def _read_triple(content: Any) -> Triple | None:
    try:
        return msgspec.convert(content, Triple)
    except msgspec.ValidationError:
        return None


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
