"""
From rows of a corpus to what the models take: token ids, marker positions, labels.

Each function takes a batch of rows as `datasets.Dataset.map(batched=True)` gives it, so that one call of a fast tokenizer
does the whole batch. Use them through `encode`, which counts the rows that had to be left out.

The defaults give the same ids as the original's converters (`examples/utils_glue.py` and the `convert_examples_to_features`
of its scripts). There a marker is a token of its own, and the text between two markers is tokenised apart from the rest.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)

Batch = Mapping[str, Sequence[Any]]


def encode(dataset: Dataset, features: Callable[..., dict[str, list]], tokenizer: PreTrainedTokenizerBase, **kwargs):
    """
    A data set of features: `features(batch, tokenizer, **kwargs)` for all rows, without the columns of the corpus.

    Rows that can't be encoded within the tokenizer's or `max_length` tokens are left out, counted and named in a warning.

    Raises:
        ValueError: no row is left, or a label is not among those given.
    """

    def numbered(batch: Batch, indices: list[int]) -> dict[str, list]:
        encoded = features(batch, tokenizer, **kwargs)
        kept = encoded.pop("row")
        return encoded | {"row": [indices[position] for position in kept]}

    encoded = dataset.map(
        numbered,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        load_from_cache_file=False,  # datasets knows a function of a package by its name, not by what it does
        desc="Tokenizing",
    )
    kept = set(encoded["row"]) if len(encoded) else set()
    dropped = [row for row in range(len(dataset)) if row not in kept]
    if dropped:
        logger.warning(
            f"{len(dropped)} of {len(dataset)} rows don't fit into the model's length (or have a word of which the "
            f"tokenizer leaves nothing) and are left out; the first of them: {dropped[:5]}."
        )
    if not kept:
        raise ValueError("no row is left: the corpus is empty, or its texts don't fit into max_length tokens.")
    return encoded.remove_columns("row")


def relation_features(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    *,
    markers: tuple[str, str] = ("@", "#"),
    max_length: int | None = None,
    original: bool = False,
) -> dict[str, list]:
    """
    For `KAdapterForRelationClassification`: rows of the relation schema, each entity between two markers.

    Args:
        labels: the relations; a row's label is its place among them.
        markers: around the subject and the object, with a leading space where the tokenizer is to see one. The
            original's for T-REx and TACRED by default; for SemEval-2010 Task 8 it has `(" @", " ^")`.
        max_length: tokens with the special ones; by default as many as the model takes.
        original: cut long rows at their end, as the original does, and leave out those whose markers are cut. By
            default the window moves so that it has both entities in it.

    Returns:
        `input_ids`, `attention_mask`, `subject_start`, `object_start` (positions of the first of each two markers),
        `labels`, and `row`, the places in the batch of the rows that were kept.
    """
    subject, object_ = (tokenizer.encode(marker, add_special_tokens=False) for marker in markers)
    marked = []
    for text, *spans in zip(batch["text"], batch["subject"], batch["object"], strict=True):
        marked.append((text, [(*spans[0], subject), (*spans[1], object_)]))
    encoded = _encode_marked(marked, tokenizer, max_length, original)
    starts = encoded.pop("starts")
    encoded["subject_start"] = [subject_start for subject_start, _ in starts]
    encoded["object_start"] = [object_start for _, object_start in starts]
    encoded["labels"] = [_index(labels, batch["relation"][row], "relation") for row in encoded["row"]]
    return encoded


def typing_features(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    *,
    marker: str = " @",
    max_length: int | None = None,
    original: bool = False,
) -> dict[str, list]:
    """
    For `KAdapterForEntityTyping`: rows of the typing schema, the entity between two markers.

    Arguments and result as for `relation_features`, with `entity_start`, and in `labels` 1.0 or 0.0 for each type.
    """
    ids = tokenizer.encode(marker, add_special_tokens=False)
    marked = [(text, [(start, end, ids)]) for text, (start, end) in zip(batch["text"], batch["entity"], strict=True)]
    # The original's typing, unlike its SemEval, has a space behind the closing marker, whatever the text has there.
    encoded = _encode_marked(marked, tokenizer, max_length, original, space_after=True)
    encoded["entity_start"] = [starts[0] for starts in encoded.pop("starts")]
    encoded["labels"] = []
    for row in encoded["row"]:
        types = {_index(labels, name, "type") for name in batch["types"][row]}
        encoded["labels"].append([float(index in types) for index in range(len(labels))])
    return encoded


def multiple_choice_features(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> dict[str, list]:
    """
    For `KAdapterForMultipleChoice`: `context`, `question`, `choices` (a list of texts) and `label` (the right one's place).

    Each choice is `context, question, choice`, with the tokenizer's separator behind each. Where that is too long, the
    context loses its end.

    Returns:
        `input_ids`, `attention_mask` (choices × length), `labels`, and `row`.
    """
    before, after = _specials(tokenizer)
    encoded: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": [], "row": []}
    separator = [tokenizer.sep_token_id]
    most = most_tokens(tokenizer, max_length)
    counts = [len(choices) for choices in batch["choices"]]
    texts = [*batch["context"], *batch["question"], *(choice for choices in batch["choices"] for choice in choices)]
    ids = _tokenize([_spaced(text) for text in texts], tokenizer)
    rows = len(counts)
    contexts, questions, choices = ids[:rows], ids[rows : 2 * rows], iter(ids[2 * rows :])
    for row, count in enumerate(counts):
        row_ids: list[Any] = []
        for choice in (next(choices) for _ in range(count)):
            rest = [*separator, *questions[row], *separator, *choice, *after]
            room = most - len(before) - len(rest)
            row_ids.append([*before, *contexts[row][: max(room, 0)], *rest] if room >= 0 else None)
        if None in row_ids:
            continue
        encoded["input_ids"].append(row_ids)
        encoded["attention_mask"].append([[1] * len(one) for one in row_ids])
        encoded["labels"].append(int(batch["label"][row]))
        encoded["row"].append(row)
    return encoded


def dependency_features(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], *, max_length: int | None = None
) -> dict[str, list]:
    """
    For `KAdapterForDependencyParsing`: rows of the dependency schema, whole sentences.

    A sentence that is too long, or a word of which the tokenizer leaves nothing, leaves the row out: part of a tree is
    none.

    Returns:
        `input_ids`, `attention_mask`, `word_starts` (each word's first token), `head_labels` (0 is the root, else the
        head's number from 1 on), `relation_labels`, and `row`.
    """
    pieces = []
    for row, tokens in enumerate(batch["tokens"]):
        text = batch["text"][row] if "text" in batch and batch["text"][row] else " ".join(tokens)
        place = 0
        for token in tokens:
            start = text.index(token, place)
            # Words are tokenised apart: in one go, "don't" (do + n't) may become "don", "'" and "t".
            pieces.append(token if start == place > 0 else f" {token}")
            place = start + len(token)
    tokenized = iter(_tokenize(pieces, tokenizer))
    before, after = _specials(tokenizer)
    most = most_tokens(tokenizer, max_length)
    names = ("input_ids", "attention_mask", "word_starts", "head_labels", "relation_labels", "row")
    encoded: dict[str, list] = {name: [] for name in names}
    for row, tokens in enumerate(batch["tokens"]):
        words = [next(tokenized) for _ in tokens]
        starts = list(itertools.accumulate(map(len, words[:-1]), initial=len(before)))
        ids = [*before, *itertools.chain(*words), *after]
        if len(ids) > most or [] in words:
            continue
        relations = [_index(labels, label, "relation") for label in batch["labels"][row]]
        for name, value in zip(names, (ids, [1] * len(ids), starts, batch["heads"][row], relations, row), strict=True):
            encoded[name].append(value)
    return encoded


def _encode_marked(
    rows: list[tuple[str, list[tuple[int, int, list[int]]]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    original: bool,
    space_after: bool = False,
) -> dict[str, list]:
    """Texts with spans and each span's marker to `input_ids`, `attention_mask`, `starts` (of the spans) and `row`."""
    before, after = _specials(tokenizer)
    most = most_tokens(tokenizer, max_length) - len(before) - len(after)
    pieces = []
    for text, spans in rows:
        done = 0
        for start, end, _ in sorted(spans, key=lambda span: span[:2]):
            piece = text[done:start].rstrip()
            pieces += [_spaced(piece) if done == 0 or space_after else piece, _spaced(text[start:end])]
            done = end
        pieces.append(_spaced(text[done:]) if space_after else text[done:])
    tokenized = iter(_tokenize(pieces, tokenizer))
    encoded: dict[str, list] = {"input_ids": [], "attention_mask": [], "starts": [], "row": []}
    for row, (_, spans) in enumerate(rows):
        ids: list[int] = []
        starts = [0] * len(spans)
        end = 0
        for index in sorted(range(len(spans)), key=lambda index: spans[index][:2]):
            ids += next(tokenized)
            starts[index] = len(ids)
            ids += [*spans[index][2], *next(tokenized), *spans[index][2]]
            end = len(ids)
        ids += next(tokenized)
        first = 0
        if len(ids) > most and not original:
            if end - min(starts) > most:
                continue
            # As much of the text before the entities as behind them, as far as there is any.
            first = min(max((min(starts) + end - most) // 2, 0), len(ids) - most)
        ids = ids[first : first + most]
        starts = [start - first for start in starts]
        if max(starts) >= len(ids):
            continue
        ids = [*before, *ids, *after]
        encoded["input_ids"].append(ids)
        encoded["attention_mask"].append([1] * len(ids))
        encoded["starts"].append([len(before) + start for start in starts])
        encoded["row"].append(row)
    return encoded


def _tokenize(pieces: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each piece on its own, without special tokens; pieces may be empty or longer than the model."""
    if not pieces:
        return []
    return tokenizer(
        pieces, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


def _spaced(text: str) -> str:
    """With a space before it, which in RoBERTa's vocabulary makes it begin with a word."""
    return text if not text or text[0].isspace() else f" {text}"


def _specials(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind one text."""
    inner = tokenizer.encode(" a", add_special_tokens=False)
    whole = tokenizer.encode(" a")
    for place in range(len(whole)):
        if whole[place : place + len(inner)] == inner:
            return whole[:place], whole[place + len(inner) :]
    raise ValueError(f"{type(tokenizer).__name__} does not put a text's tokens between its special ones.")


def most_tokens(
    tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, backbone: PreTrainedConfig | None = None
) -> int:
    """
    How many tokens a row may have: `max_length`, but never more than the model takes.

    Args:
        backbone: its configuration knows if the tokenizer does not.

    Raises:
        ValueError: nothing says how many tokens the model takes.
    """
    most = tokenizer.model_max_length
    if most > 10**6 and backbone is not None:  # the tokenizer does not know
        # RoBERTa's position ids start at padding_idx + 1.
        most = getattr(backbone, "max_position_embeddings", 512) - 2
    most = min(max_length or most, most)
    if most > 10**6:
        raise ValueError("the tokenizer does not say how many tokens its model takes: give max_length.")
    return most


def _index(labels: Sequence[str], label: str, kind: str) -> int:
    try:
        return labels.index(label)
    except ValueError:
        raise ValueError(
            f"the {kind} '{label}' is not among the {len(labels)} labels: {', '.join(labels[:5])}, …"
        ) from None
