"""Dependency trees from CoNLL-U files (Universal Dependencies), or from raw text parsed by a spaCy pipeline."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..messages import needs
from ..progress import progress
from .schema import DEPENDENCY, Record, Report, Row, build, token_spans


def read_conllu(path: str | Path, strict: bool = False) -> tuple[Dataset, Report]:
    """
    Reads a CoNLL-U file as rows of the dependency schema. Requires the `conllu` library, from the extra `knowledge`.

    Multiword tokens and empty nodes are not part of the tree. The text is the sentence's `# text` if it consists of the
    words; otherwise (e.g. French "du" = de + le), the words are joined according to SpaceAfter.

    Raises:
        ImportError: the `conllu` library is missing.
        ValueError: the file has no usable sentence; with `strict`, a sentence is unusable.
    """
    return build(path, DEPENDENCY, _sentences(path), strict)


def parse_text(lines: Iterable[str], pipeline: str, strict: bool = False) -> tuple[Dataset, Report]:
    """
    Parses raw text to rows of the dependency schema, one for each sentence that the pipeline finds in a line.

    Args:
        pipeline: the name or folder of an installed spaCy pipeline with a parser, e.g. "en_core_web_sm".

    Raises:
        ImportError: spaCy is missing; it is in the extra `parse`.
        ValueError: the pipeline is not installed or has no parser; no sentence is usable; with `strict`, one is
            unusable.
    """
    try:
        import spacy
    except ImportError:
        raise ImportError(needs("parsing text", "spaCy", "parse")) from None
    try:
        parser = spacy.load(pipeline)
    except OSError:
        raise ValueError(
            f"the spaCy pipeline {pipeline} is not installed: python -m spacy download {pipeline}"
        ) from None
    return build(f"text parsed by {pipeline}", DEPENDENCY, _parsed(lines, parser, pipeline), strict)


def _sentences(path: str | Path) -> Iterator[Record]:
    try:
        from conllu import parse
        from conllu.exceptions import ParseException
    except ImportError:
        raise ImportError(needs("reading CoNLL-U", "conllu", "knowledge")) from None
    blocks = re.split(rb"(?:\r?\n[ \t]*){2,}", Path(path).read_bytes().strip())
    for number, block in enumerate(progress(blocks, path), start=1):
        name = f"sentence {number}"
        try:
            for sentence in parse(block.decode("utf-8-sig")):
                yield str(sentence.metadata.get("sent_id") or name), _row(sentence)
        except UnicodeDecodeError:
            yield name, "not UTF-8"
        except ParseException:
            yield name, "not CoNLL-U"


def _row(sentence: Any) -> Row | str:
    # Ids of multiword tokens (3-4) and empty nodes (8.1) are tuples.
    words = [row for row in sentence if isinstance(row["id"], int)]
    if [word["id"] for word in words] != list(range(1, len(words) + 1)):
        return "words are not numbered from 1"
    if not all({"form", "head", "deprel"} <= word.keys() and isinstance(word["head"], int) for word in words):
        return "a word has no head or no label"
    tokens = [word["form"] for word in words]
    text = sentence.metadata.get("text")
    if not text or not _make_up(tokens, text):
        text = _joined(sentence)
    return {
        "text": text,
        "tokens": tokens,
        "heads": [word["head"] for word in words],
        "labels": [word["deprel"] for word in words],
    }


def _make_up(tokens: list[str], text: str) -> bool:
    """Whether the text consists of these tokens with only whitespace between them."""
    spans = token_spans(text, tokens)
    if spans is None:
        return False
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    return not any(text[end:start].strip() for end, start in zip(ends, starts, strict=True))


def _joined(sentence: Any) -> str:
    """Joins the words according to SpaceAfter; words of a multiword token are separated, so that each can be found."""
    text, multiword_end, multiword_misc = "", 0, None
    for row in sentence:
        if isinstance(row["id"], int):
            misc = row.get("misc")
            if row["id"] == multiword_end:
                misc = multiword_misc
            elif row["id"] < multiword_end:
                misc = None
            text += row["form"] + ("" if (misc or {}).get("SpaceAfter") == "No" else " ")
        elif row["id"][1] == "-":
            multiword_end, multiword_misc = row["id"][2], row.get("misc")
    return text.rstrip()


def _parsed(lines: Iterable[str], parser: Any, pipeline: str) -> Iterator[Record]:
    texts = [line.strip() for line in lines if line.strip()]
    for number, document in enumerate(parser.pipe(progress(texts, pipeline)), start=1):
        if not document.has_annotation("DEP"):
            raise ValueError(f"the spaCy pipeline {pipeline} has no parser")
        for sentence in document.sents:
            yield f"text {number}: {sentence.text[:40]}", _parsed_row(sentence)


def _parsed_row(sentence: Any) -> Row | str:
    # spaCy has whitespace tokens; only other whitespace tokens can depend on them.
    words = [token for token in sentence if not token.is_space]
    numbers = {token.i: number for number, token in enumerate(words, start=1)}
    if any(token.head.i not in numbers for token in words):
        return "a head is outside the sentence"
    return {
        "text": sentence.text,
        "tokens": [token.text for token in words],
        "heads": [0 if token.head.i == token.i else numbers[token.head.i] for token in words],
        "labels": [token.dep_ for token in words],
    }
