"""FewRel (Han et al., 2018): Wikidata relations in tokenised Wikipedia sentences."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..messages import shortened
from ..progress import progress
from .files import read_json
from .schema import MALFORMED, RELATION, Record, Report, Row, build, is_name, relation_row


def read_fewrel(path: str | Path, names: str | Path | None = None, strict: bool = False) -> tuple[Dataset, Report]:
    """
    Reads a FewRel file, e.g. train_wiki.json, as rows of the relation schema. The head is the subject, the tail the object.

    Only the first mention of an entity is used.

    Args:
        names: the file pid2name.json, to use names of relations instead of Wikidata numbers.

    Raises:
        ValueError: the file is not in FewRel's format; with `strict`, a record is unusable.
    """
    return build(path, RELATION, _records(path, relation_names(names)), strict)


def relation_names(path: str | Path | None) -> dict[str, str]:
    """Names of Wikidata relations, from a file of id -> name or id -> [name, description]; empty without a file."""
    if path is None:
        return {}
    content = read_json(path, dict)
    names = {relation: name[0] if name and isinstance(name, list) else name for relation, name in content.items()}
    wrong = next((relation for relation, name in names.items() if not is_name(name)), None)
    if wrong is not None:
        raise ValueError(f"{path} has no name for '{shortened(wrong)}', but {shortened(content[wrong])}")
    return names


def names_beside(data: str | Path) -> dict[str, str]:
    """
    The names of labels in the file relations.json in a folder, or beside a file: id -> name, or id -> [name, description] as in
    FewRel's pid2name.json. Empty if there is none, or a list of labels, as `kadapter prepare` writes.

    Raises:
        ValueError: the file is not JSON.
    """
    folder = Path(data) if Path(data).is_dir() else Path(data).parent
    path = folder / "relations.json"
    if not Path(data).exists() or not path.is_file() or isinstance(read_json(path, object), list):
        return {}
    return relation_names(path)


def _records(path: str | Path, names: dict[str, str]) -> Iterator[Record]:
    for relation, instances in progress(list(read_json(path, dict).items()), path):
        if not isinstance(instances, list):
            yield relation, "not a list of records"
            continue
        label = names[relation] if relation in names else relation
        for number, instance in enumerate(instances):
            yield f"{relation} record {number}", _row(instance, label)


def _row(instance: Any, relation: str) -> Row | str:
    try:
        head, tail = instance["h"][2][0], instance["t"][2][0]
        if any(words != list(range(words[0], words[0] + len(words))) for words in (head, tail)):
            return "an entity's words are not next to each other"
        return relation_row(instance["tokens"], (head[0], head[-1] + 1), (tail[0], tail[-1] + 1), relation)
    except MALFORMED:
        return "the record is incomplete"
