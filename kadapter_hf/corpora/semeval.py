"""SemEval-2010 Task 8 (Hendrickx et al., 2010): directed relations between nominals, in tagged text."""

import re
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from ..progress import progress
from .schema import RELATION, Record, Report, Row, build


TAG = re.compile(r"</?e[12]>")


def read_semeval(path: str | Path, strict: bool = False) -> tuple[Dataset, Report]:
    """
    Reads a file of the task, e.g. TRAIN_FILE.TXT, as rows of the relation schema: `<e1>` is the subject, `<e2>` the object.

    Relations are directed: `Cause-Effect(e1,e2)` and `Cause-Effect(e2,e1)` are different labels.

    Raises:
        ValueError: the file has no usable record; with `strict`, a record is unusable.
    """
    return build(path, RELATION, records(path), strict)


def records(path: str | Path) -> Iterator[Record]:
    """Yields the name of each record of a file, and its row or what is wrong with it."""
    # A record consists of three lines (sentence, relation, comment) and a blank one.
    found = re.split(rb"\r?\n[ \t]*\r?\n", Path(path).read_bytes().strip())
    for number, record in enumerate(progress(found, path), start=1):
        try:
            lines = record.decode("utf-8-sig").strip().splitlines()
        except UnicodeDecodeError:
            yield f"record {number}", "not UTF-8"
            continue
        # The test file without relations has a sentence a line, and no blank ones.
        several = len(lines) > 1 and re.match(r"\d+\t", lines[1])
        for one_record in [[line] for line in lines] if several else [lines] if lines else []:
            yield one_record[0].partition("\t")[0], _row(one_record)


def _row(lines: list[str]) -> Row | str:
    number, tab, quoted = lines[0].partition("\t")
    if not (number.isdigit() and tab):
        return "does not consist of a number, a sentence and a relation"
    tagged = quoted.strip()
    if len(tagged) > 1 and tagged[0] == tagged[-1] == '"':
        tagged = tagged[1:-1]
    text, done, places = "", 0, {}
    for tag in TAG.finditer(tagged):
        text += tagged[done : tag.start()]
        done = tag.end()
        if tag.group() in places:
            return "a tag occurs twice"
        places[tag.group()] = len(text)
    if len(places) < 4:
        return "a tag is missing"
    relation = lines[1].strip() if len(lines) > 1 else None
    spans = [[places[f"<{entity}>"], places[f"</{entity}>"]] for entity in ("e1", "e2")]
    return {"text": text + tagged[done:], "subject": spans[0], "object": spans[1], "relation": relation}
