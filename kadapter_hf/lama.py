"""
The data of the LAMA probe: facts as sentences in which the object is masked.

Source: Petroni et al., EMNLP 2019; `scripts/batch_eval_KB_completion.py` in github.com/facebookresearch/LAMA.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .corpora import Report
from .corpora.files import text_lines
from .messages import shortened


MASK, SUBJECT, OBJECT = "[MASK]", "[X]", "[Y]"
RELATIONS = "relations.jsonl"
# LAMA's templates for Google-RE, which are in its code (`scripts/run_experiments.py`) and not in relations.jsonl.
GOOGLE_RE = {
    "place_of_birth": "[X] was born in [Y] .",
    "date_of_birth": "[X] (born [Y]).",
    "place_of_death": "[X] died in [Y] .",
}
# P@1 in percent by part, of RoBERTa-large and with the factual adapter (an earlier version of the K-Adapter paper; its final
# one has examples only).
PUBLISHED = {
    "Google_RE": {"": 4.8, "F": 7.0},
    "Google_RE_UHN": {"": 2.5, "F": 3.7},
    "TREx": {"": 27.1, "F": 29.1},
    "TREx_UHN": {"": 20.1, "F": 23.0},
}
EXCLUDED = "excluded"
Pair = tuple[str, str]


@dataclass(frozen=True)
class Fact:
    """
    One fact.

    Attributes:
        part: the folder of its file: `TREx`, `Google_RE`, `ConceptNet`, `Squad`, …
        relation: the name of its file without `_test`; the part's, if the file is called test.jsonl.
        uuid: as in the file; otherwise the name of the file and the number of the line.
        subject: empty if the record has none.
        object: the word or words to be predicted.
        text: the sentence, with `[MASK]` for the object.
    """

    part: str
    relation: str
    uuid: str
    subject: str
    object: str
    text: str

    @property
    def pair(self) -> Pair:
        """Subject and object, case-folded."""
        return self.subject.casefold(), self.object.casefold()


def read_lama(path: str | Path, exclude: str | Path | None = None) -> tuple[list[Fact], Report]:
    """
    Reads the facts of a LAMA file, of one of its parts, or of a folder with several parts.

    The sentence of a fact is made from the template of its relation: that of `relations.jsonl` beside the file or in the
    folder above, or LAMA's own for Google-RE. Of facts with the same subject and object, the first is kept then. Without a
    template, it is the record's `masked_sentences`, joined by spaces.

    Args:
        exclude: a file of facts to leave out; see `read_exclusions`.

    Returns:
        The facts, and a report on those that are left out: repeated, excluded, or judged wrong by most raters (Google-RE).

    Raises:
        ValueError: a file is not in LAMA's format, a relation has no template, no fact is left, or no line of `exclude`
            occurs in the data. The message names the file, the line and the field.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
    files = [file for file in files if file.name != RELATIONS and not file.name.startswith(".")]
    if not files:
        raise ValueError(f"'{path}' has no .jsonl file of facts." if path.exists() else f"there is no '{path}'.")
    excluded = set() if exclude is None else read_exclusions(exclude)
    facts, report = [], Report()
    for file in files:
        for fact, problem, place in _read_file(file, excluded):
            if problem is None:
                facts.append(fact)
                report.keep(fact.relation)
            else:
                report.drop(problem, place)
    if excluded and not report.dropped[EXCLUDED]:
        raise ValueError(f"'{exclude}': none of these facts is in '{path}'.")
    if not facts:
        raise ValueError(f"'{path}': no fact is left. {report.reasons() or 'The files are empty'}")
    return facts, report


def read_exclusions(path: str | Path) -> set[str | Pair]:
    """
    Reads a list of facts, such as those that LAMA-UHN leaves out: a fact a line, as its uuid, as subject and object separated
    by a tab, or as a JSON object with `uuid`, or `sub_label` and `obj_label`, or all of them, like LAMA's own lines.

    Returns:
        uuids, and pairs of case-folded subjects and objects.

    Raises:
        ValueError: a line is of another format, or there is none.
    """
    excluded: set[str | Pair] = set()
    for place, line in text_lines(path):
        if line.startswith("{"):
            record = _parsed(line, place)
            names = [name for name in ("sub_label", "obj_label", "uuid") if name in record]
            if "uuid" in names:
                excluded.add(_text(record, "uuid", place))
            if "uuid" not in names or len(names) == 3:
                excluded.add(
                    (_text(record, "sub_label", place).casefold(), _text(record, "obj_label", place).casefold())
                )
        elif "\t" in line:
            words = [word.strip().casefold() for word in line.split("\t")]
            if len(words) != 2 or not all(words):
                raise ValueError(f"{place}: subject and object, separated by one tab, are expected.")
            excluded.add((words[0], words[1]))
        else:
            excluded.add(line)
    if not excluded:
        raise ValueError(f"'{path}' is empty.")
    return excluded


def _read_file(file: Path, excluded: set[str | Pair]) -> Iterator[tuple[Fact, str | None, str]]:
    """The facts of a file, each with the reason to leave it out, or None, and its place."""
    part = file.resolve().parent.name
    relation = part if file.stem == "test" else file.stem.removesuffix("_test")
    template = _templates(file).get(relation) or GOOGLE_RE.get(relation)
    seen = set()
    for number, (place, line) in enumerate(text_lines(file), start=1):
        record = _parsed(line, place)
        answer = _text(record, "obj_label", place)
        subject = _text(
            record, "sub_label" if template or "sub_label" in record else "sub", place, needed=bool(template)
        )
        uuid = record.get("uuid", record.get("id", f"{file.stem}-{number}"))
        text = _sentence(record, template, subject, relation, place)
        fact = Fact(part, relation, str(uuid), subject, answer, text)
        reason = None
        if fact.uuid in excluded or fact.pair in excluded:
            reason = EXCLUDED
        elif _judged_wrong(record, place):
            reason = "judged wrong by most raters"
        elif template and (subject, answer) in seen:
            reason = "repeats subject and object of another"
        else:
            seen.add((subject, answer))
        yield fact, reason, place


def _sentence(record: dict[str, Any], template: str | None, subject: str, relation: str, place: str) -> str:
    if template:
        return template.replace(OBJECT, MASK).replace(SUBJECT, subject)
    sentences = record.get("masked_sentences")
    if sentences is None:
        raise ValueError(
            f"{place}: the relation '{shortened(relation)}' has no template in {RELATIONS}, and the record no field "
            "'masked_sentences'."
        )
    if not isinstance(sentences, list) or not sentences or not all(isinstance(text, str) for text in sentences):
        raise ValueError(f"{place}: 'masked_sentences' is not a list of sentences.")
    text = " ".join(sentences)
    if MASK not in text:
        raise ValueError(f"{place}: 'masked_sentences' has no {MASK}.")
    return text


def _judged_wrong(record: dict[str, Any], place: str) -> bool:
    """Whether more raters said no than yes, as in LAMA's `filter_samples`."""
    judgments = record.get("judgments", [])
    if not isinstance(judgments, list) or not all(isinstance(judgment, dict) for judgment in judgments):
        raise ValueError(f"{place}: 'judgments' is not a list of objects.")
    yes = sum(judgment.get("judgment") == "yes" for judgment in judgments)
    return len(judgments) - yes > yes


def _templates(file: Path) -> dict[str, str]:
    """The templates that apply to a file: those beside it, or in the folder above."""
    for folder in file.resolve().parents[:2]:
        path = folder / RELATIONS
        if path.is_file():
            return {relation: template for relation, template in _read_templates(path)}
    return {}


def _read_templates(path: Path) -> Iterator[tuple[str, str]]:
    for place, line in text_lines(path):
        record = _parsed(line, place)
        relation, template = _text(record, "relation", place), _text(record, "template", place)
        if SUBJECT not in template or template.count(OBJECT) != 1:
            raise ValueError(f"{place}: 'template' needs {SUBJECT} and one {OBJECT}, not '{shortened(template)}'.")
        yield relation, template


def _parsed(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        raise ValueError(f"{place} is not JSON.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place} is not a JSON object.")
    return record


def _text(record: dict[str, Any], name: str, place: str, needed: bool = True) -> str:
    """A field that holds text; empty if it is not needed and missing."""
    value = record.get(name, None if needed else "")
    if not isinstance(value, str) or (needed and not value.strip()):
        raise ValueError(f"{place}: the field '{name}' is missing, or is not text.")
    return value.strip()
