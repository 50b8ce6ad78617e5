"""
The steps of the T-REx pipeline: from a file of documents to a shard of examples, and from all shards to a split data set.

The criteria for usable triples follow the original's `scripts/clean_T_REx.py`; filtering and splitting follow its
`scripts/create_subdataset-relation-classification.ipynb`.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ..figures import new_figure
from ..messages import needs
from .files import write_json
from .schema import MALFORMED, RELATION, Report, no_garbage_collection


try:
    import msgspec
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise ImportError(needs("T-REx", str(error.name), "knowledge")) from None

Split = Literal["document", "example"]

# "instance of", removed by hand in the original.
EXCLUDED = frozenset({"P31"})
TEST_SHARE = 0.1
COLUMNS = RELATION.features.arrow_schema
SHARD = pa.schema([pa.field("id", pa.string()), *COLUMNS])
# The columns of a shard: document and number of the triple, text, subject, object, relation.
Example = tuple[str, str, tuple[int, int], tuple[int, int], str]


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
    """The fields of a document that are used; boundaries are `[start, end)` in characters. Broken triples are None."""

    docid: str
    text: str
    sentences_boundaries: list[tuple[int, int]]
    words_boundaries: list[tuple[int, int]] | None
    triples: list[Triple | None]

    @property
    def name(self) -> str:
        """The last part of the document's URI: its Wikidata number."""
        return self.docid.rpartition("/")[2]


DECODER = msgspec.json.Decoder(list[TrexDocument])
INCOMPLETE = "the document is incomplete"


def document_examples(document: TrexDocument, report: Report) -> list[Example]:
    """
    The examples of one T-REx document; the text of each is the triple's sentence.

    A triple is usable if both entities have boundaries and start and end at word boundaries in the triple's sentence. Words
    are looked up by their start and end, so the time is proportional to the number of words plus triples.
    """
    name, text, sentences = document.name, document.text, document.sentences_boundaries
    if any(behind > len(text) for _, behind in sentences):
        report.drop(INCOMPLETE, name)
        return []
    words = document.words_boundaries or ()
    starts, ends = {start for start, _ in words}, {end for _, end in words}
    found = []
    for number, triple in enumerate(document.triples):
        if triple is None:
            problem = "the triple is incomplete"
        elif (subject := triple.subject.boundaries) is None or (object_ := triple.object.boundaries) is None:
            problem = "subject or object has no boundaries"
        elif not 0 <= triple.sentence_id < len(sentences):
            problem = "no such sentence"
        else:
            first, behind = sentences[triple.sentence_id]
            start, end = subject
            object_start, object_end = object_
            relation = triple.predicate.uri.rpartition("/")[2]
            # Words don't overlap, so all words of an entity are in the sentence if the first and the last are. Such rows are
            # valid in the schema, so they are not validated again, which would double the time.
            if not (
                (start in starts and end in ends and first <= start < end <= behind)
                and (object_start in starts and object_end in ends and first <= object_start < object_end <= behind)
            ):
                problem = "subject or object is not made of words of the sentence"
            elif start < object_end and object_start < end:
                problem = "subject and object overlap"
            elif text[start:end].isspace() or text[object_start:object_end].isspace():
                problem = "subject or object is empty"
            elif not relation:
                problem = "relation is not a name"
            else:
                spans = (start - first, end - first), (object_start - first, object_end - first)
                found.append((f"{name}#{number}", text[first:behind], *spans, relation))
                continue
        report.drop(problem, f"{name} triple {number}")
    # In one call, which is much faster.
    report.kept += len(found)
    report.labels.update([example[-1] for example in found])
    return found


class ExtractTrex(PipelineStep):
    """Writes the examples of file number `rank` as a Parquet file, then the report on them."""

    name = "T-REx extract"
    type = "EXTRACT"

    def __init__(self, files: list[str], shards: str, reports: str, strict: bool):
        super().__init__()
        self.files, self.shards, self.reports, self.strict = files, shards, reports, strict

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        path = Path(self.files[rank])
        report = Report()
        examples = file_examples(path, report)
        if self.strict and report.dropped:
            raise ValueError(f"{path}: {report.reasons()}")
        self.stat_update("examples", value=len(examples), unit="file")
        shards, reports = Path(self.shards), Path(self.reports)
        for folder in (shards, reports):
            folder.mkdir(parents=True, exist_ok=True)
        # Written atomically: a killed task is run again.
        draft = shards / f".{rank:05d}.draft"
        pq.write_table(examples, draft)
        draft.replace(shards / f"{rank:05d}.parquet")
        report.save(reports / f"{rank:05d}.json")


def file_examples(path: Path, report: Report) -> pa.Table:
    """The examples of a file, with unique ids."""
    with no_garbage_collection():
        examples = [
            example for document in _documents(path, report) for example in document_examples(document, report)
        ]
        columns = zip(*examples, strict=True) if examples else [()] * len(SHARD)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SHARD, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SHARD)


def _documents(path: Path, report: Report) -> list[TrexDocument]:
    try:
        content = path.read_bytes()
    except OSError:
        report.drop("the file can't be read", path.name)
        return []
    try:
        return DECODER.decode(content)
    except msgspec.MsgspecError:  # partly broken: the slower way below finds the intact parts
        pass
    try:
        documents = json.loads(content)  # which is more lenient, e.g. accepts NaN
    except UnicodeDecodeError:
        reason = "the file is not UTF-8"
    except ValueError:
        reason = "the file is not JSON"
    else:
        if isinstance(documents, list):
            read = (read_document(one, f"{path.name} document {place}", report) for place, one in enumerate(documents))
            return [document for document in read if document is not None]
        reason = "the file is not a list of documents"
    report.drop(reason, path.name)
    return []


def read_document(content: Any, name: str, report: Report) -> TrexDocument | None:
    """
    A document that may be partly broken; None if it is unusable.

    Args:
        name: the name in the report for a document without an id.
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


class SplitTrex(PipelineStep):
    """Writes train.parquet, test.parquet, relations.json, relations.png and report.json from the extracted shards."""

    name = "T-REx split"
    type = "SPLIT"

    def __init__(
        self,
        shards: str,
        reports: str,
        output: str,
        min_examples: int,
        split: Split,
        seed: int,
        names: dict[str, str],
        strict: bool,
    ):
        super().__init__()
        self.shards, self.reports, self.output = shards, reports, output
        self.min_examples, self.split, self.seed, self.strict = min_examples, split, seed, strict
        self.names = names

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
        if not sizes["train"]:
            raise ValueError(
                f"all {sizes['test']} examples are of documents in the test set: read more files, or split them with --split "
                "example or another --seed"
            )
        numbers, report.labels = report.labels, Counter()
        for number, count in numbers.items():
            report.labels[self.names.get(number, number)] += count
        draw(report, output / "relations.png")
        write_json(output / "relations.json", sorted(report.labels))
        for name, draft in drafts.items():
            draft.replace(output / f"{name}.parquet")
            if not sizes[name]:  # datasets rejects files without rows
                (output / f"{name}.parquet").unlink()
        report.save(output / "report.json", sizes=sizes, split=self.split, seed=self.seed)

    def _drop_relations(self, report: Report) -> None:
        if not report.labels:
            raise ValueError(f"no usable triple. {report.reasons() or 'The files have no triples'}")
        most, count = report.labels.most_common(1)[0]
        for relation, examples in report.labels.most_common():
            if relation in EXCLUDED:
                report.drop("relation is excluded", relation, examples)
            elif examples < self.min_examples:
                report.drop(f"relation with fewer than {self.min_examples} examples", relation, examples)
            else:
                continue
            report.kept -= examples
            del report.labels[relation]
        if not report.labels:
            raise ValueError(
                f"no relation is left: the most frequent, {most}, has {count} examples, the minimum is {self.min_examples}, "
                f"and {', '.join(EXCLUDED)} is excluded. --min-examples sets the minimum"
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
                        if not chosen:  # datasets can't read empty row groups
                            continue
                        rows = batch.take(pa.array(chosen, pa.int64())).select(COLUMNS.names)
                        if self.names:
                            named = [self.names.get(relation, relation) for relation in rows["relation"].to_pylist()]
                            rows = rows.set_column(COLUMNS.get_field_index("relation"), "relation", pa.array(named))
                        writers[part].write_batch(rows.cast(COLUMNS))
                        sizes[part] += len(chosen)
        return sizes


def in_test(key: str, seed: int) -> bool:
    """Whether a document or an example belongs to the test set; the same on every machine and in every order."""
    digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < TEST_SHARE * 2**64


def draw(report: Report, path: Path) -> None:
    """Draws a bar for each of the 200 most frequent relations, like the original."""
    counts = report.labels.most_common(200)[::-1]
    figure = new_figure(8, 1 + 0.2 * len(counts))
    if figure is None:
        return
    axes = figure.add_subplot()
    bars = axes.barh([relation for relation, _ in counts], [count for _, count in counts])
    axes.bar_label(bars, padding=2)
    axes.set_xlabel("examples")
    axes.set_title(f"{report.kept:,} examples of {len(report.labels)} relations")
    figure.savefig(path)
