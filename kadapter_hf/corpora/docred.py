"""DocRED (Yao et al., 2019) and Re-DocRED (Tan et al., 2022): Wikidata relations in Wikipedia documents, as words."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from datasets import Dataset

from .fewrel import relation_names
from .schema import MALFORMED, RELATION, Record, Report, Row, build, progress, read_json, relation_row


def read_docred(path: str | Path, names: str | Path | None = None, strict: bool = False) -> tuple[Dataset, Report]:
    """
    A DocRED or Re-DocRED file as rows of the relation schema, one for each labelled pair that shares a sentence.

    The text is that one sentence. Of several pairs of mentions the row has the first in the file's order, the head's
    before the tail's, that don't overlap. A pair that shares none is left out and counted, also with `strict`.

    Args:
        names: DocRED's rel_info.json, to have relations by name and not by their Wikidata number.

    Raises:
        ValueError: the file isn't DocRED's; with `strict`, a record isn't usable.
    """
    apart = Report()
    dataset, report = build(path, RELATION, _records(path, relation_names(names), apart), strict)
    report.add(apart)
    return dataset, report


def _records(path: str | Path, names: dict[str, str], apart: Report) -> Iterator[Record]:
    for number, document in enumerate(progress(read_json(path, list), path)):
        try:
            title, labels = document.get("title", f"document {number}"), document["labels"]
            pairs = [(label["h"], label["r"], label["t"]) for label in labels]
        except MALFORMED:
            yield f"document {number}", "the document is incomplete"
            continue
        for head, relation, tail in pairs:
            name = f"{title}: {head} {relation} {tail}"
            row = _row(document, head, names.get(relation, relation), tail)
            if row is None:
                apart.drop("subject and object share no sentence", name)
            else:
                yield name, row


def _row(document: dict[str, Any], head: int, relation: str, tail: int) -> Row | str | None:
    try:
        together = [
            (subject["sent_id"], subject["pos"], object_["pos"])
            for subject, object_ in product(document["vertexSet"][head], document["vertexSet"][tail])
            if subject["sent_id"] == object_["sent_id"]
        ]
        if not together:
            return None
        apart = (pair for pair in together if pair[1][1] <= pair[2][0] or pair[2][1] <= pair[1][0])
        sentence, subject, object_ = next(apart, together[0])
        return relation_row(document["sents"][sentence], tuple(subject), tuple(object_), relation)
    except MALFORMED:
        return "the record is incomplete"
