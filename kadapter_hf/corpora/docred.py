"""DocRED (Yao et al., 2019) and Re-DocRED (Tan et al., 2022): Wikidata relations in tokenised Wikipedia documents."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..progress import progress
from .fewrel import relation_names
from .files import read_json
from .schema import MALFORMED, RELATION, Record, Report, Row, build, relation_row


def read_docred(path: str | Path, names: str | Path | None = None, strict: bool = False) -> tuple[Dataset, Report]:
    """
    Reads a DocRED or Re-DocRED file as rows of the relation schema, one for each labelled pair in the same sentence.

    The text is that sentence. Of several pairs of mentions, the first one without overlap is used, in the order of the
    file, with the head's mentions in the outer loop. Pairs without a common sentence are dropped and counted, even with
    `strict`.

    Args:
        names: DocRED's rel_info.json, to use names of relations instead of Wikidata numbers.

    Raises:
        ValueError: the file is not in DocRED's format; with `strict`, a record is unusable.
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
