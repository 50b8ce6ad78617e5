"""
Features of corpus rows: token ids, marker positions and labels.

Each function takes a batch of rows as passed by `datasets.Dataset.map(batched=True)`, so that a fast tokenizer processes the
batch in one call. Call them through `encode`, which reports dropped rows.

The defaults produce the same ids as the original's converters (`examples/utils_glue.py` and `convert_examples_to_features` in
its scripts): a marker is a separate token, and the text between two markers is tokenised separately.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from .corpora.schema import no_garbage_collection
from .messages import shortened
from .modeling.marking_kadapter import encode_marked, most_tokens, spaced, special_tokens, tokenize


logger = logging.get_logger(__name__)

Batch = Mapping[str, Sequence[Any]]


def load_tokenizer(backbone: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a backbone or a model.

    Raises:
        OSError: there is none. For some folders without one, `AutoTokenizer` returns a tokenizer without a vocabulary.
        ValueError: transformers has no tokenizer for this kind of model.
    """
    missing = f"'{backbone}' has no tokenizer: save one there, with its save_pretrained."
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone)
    except ValueError as error:
        if "backend tokenizer" in str(error):  # there are no files to make one from
            raise OSError(missing) from error
        raise
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise OSError(missing)
    return tokenizer


def encode(
    dataset: Dataset,
    features: Callable[..., dict[str, list]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep_numbers: bool = False,
    **kwargs,
) -> Dataset:
    """
    Applies `features(batch, tokenizer, **kwargs)` to all rows and removes the columns of the corpus.

    Rows that don't fit into the tokenizer's maximum or `max_length` are dropped; a warning counts and lists them. Another
    counts truncated rows, if `features` returns a column `truncated`.

    Args:
        keep_numbers: keep the column `row`, the number of the row that the features belong to.

    Raises:
        ValueError: no row is left, or a label is unknown.
    """

    def numbered(batch: Batch, indices: list[int]) -> dict[str, list]:
        encoded = features(batch, tokenizer, **kwargs)
        kept = encoded.pop("row")
        return encoded | {"row": [indices[position] for position in kept]}

    with no_garbage_collection():
        encoded = dataset.map(
            numbered,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            load_from_cache_file=False,  # datasets identifies a package's function by name, not by its code
            desc="Tokenizing",
        )
    kept = set(encoded["row"][:]) if len(encoded) else set()
    dropped = [row for row in range(len(dataset)) if row not in kept]
    if dropped:
        logger.warning(
            f"{len(dropped)} of {len(dataset)} rows are dropped, as they exceed the model's maximum length or have a word "
            f"without tokens; the first ones: {dropped[:5]}."
        )
    if not kept:
        raise ValueError(f"no row is left of {len(dataset)}: no text fits into max_length tokens.")
    if "truncated" in encoded.column_names:
        truncated = sum(encoded["truncated"][:])
        if truncated:
            logger.warning(f"{truncated} of {len(dataset)} rows are truncated to fit into max_length tokens.")
        encoded = encoded.remove_columns("truncated")
    return encoded if keep_numbers else encoded.remove_columns("row")


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
    Features for `KAdapterForRelationClassification` from rows of the relation schema, with markers around each entity.

    Args:
        labels: the relations; a row's label is the index of its relation.
        markers: around the subject and the object, with a leading space if the tokenizer should see one. The default is
            the original's for T-REx and TACRED; for SemEval-2010 Task 8 it uses `(" @", " ^")`.
        max_length: maximum number of tokens, including special tokens; by default the model's maximum.
        original: truncate long rows at the end, as the original does, and drop rows that lose a marker. By default, the
            window is moved so that it contains both entities.

    Returns:
        `input_ids`, `attention_mask`, `subject_start`, `object_start` (positions of the markers before the entities),
        `labels` if the rows have a relation, and `row`, the indices in the batch of the rows that were kept.
    """
    subject, object_ = (tokenizer.encode(marker, add_special_tokens=False) for marker in markers)
    marked = []
    for text, *spans in zip(batch["text"], batch["subject"], batch["object"], strict=True):
        marked.append((text, [(*spans[0], subject), (*spans[1], object_)]))
    encoded = encode_marked(marked, tokenizer, max_length, original)
    starts = encoded.pop("starts")
    encoded["subject_start"] = [subject_start for subject_start, _ in starts]
    encoded["object_start"] = [object_start for _, object_start in starts]
    if "relation" in batch:
        encoded["labels"] = [index_of(labels, batch["relation"][row], "relation") for row in encoded["row"]]
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
    Features for `KAdapterForEntityTyping` from rows of the typing schema, with markers around the entity.

    Arguments and result as in `relation_features`, with `entity_start`; `labels` has 1.0 or 0.0 for each type.
    """
    ids = tokenizer.encode(marker, add_special_tokens=False)
    marked = [(text, [(start, end, ids)]) for text, (start, end) in zip(batch["text"], batch["entity"], strict=True)]
    # For entity typing, unlike for SemEval, the original always adds a space after the closing marker.
    encoded = encode_marked(marked, tokenizer, max_length, original, space_after=True)
    encoded["entity_start"] = [starts[0] for starts in encoded.pop("starts")]
    if "types" not in batch:
        return encoded
    encoded["labels"] = []
    for row in encoded["row"]:
        types = {index_of(labels, name, "type") for name in batch["types"][row]}
        encoded["labels"].append([float(index in types) for index in range(len(labels))])
    return encoded


def multiple_choice_features(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> dict[str, list]:
    """
    Features for `KAdapterForMultipleChoice` from rows with `context`, `question`, `choices` (a list of texts) and, if known,
    `label` (the index of the correct one).

    Each choice is encoded as `context, question, choice`, each followed by the tokenizer's separator. If that is too long,
    the context is truncated at the end.

    Returns:
        `input_ids`, `attention_mask` (choices × length), `labels` if the rows have a label, `truncated`, and `row`.
    """
    before, after = special_tokens(tokenizer)
    encoded: dict[str, list] = {"input_ids": [], "attention_mask": [], "truncated": [], "row": []}
    separator = [tokenizer.sep_token_id]
    most = most_tokens(tokenizer, max_length)
    counts = [len(choices) for choices in batch["choices"]]
    texts = [*batch["context"], *batch["question"], *(choice for choices in batch["choices"] for choice in choices)]
    ids = tokenize([spaced(text) for text in texts], tokenizer)
    rows = len(counts)
    contexts, questions, choices = ids[:rows], ids[rows : 2 * rows], iter(ids[2 * rows :])
    for row, count in enumerate(counts):
        row_ids: list[Any] = []
        truncated = False
        for choice in (next(choices) for _ in range(count)):
            rest = [*separator, *questions[row], *separator, *choice, *after]
            room = most - len(before) - len(rest)
            truncated |= room < len(contexts[row])
            row_ids.append([*before, *contexts[row][: max(room, 0)], *rest] if room >= 0 else None)
        if None in row_ids:
            continue
        encoded["input_ids"].append(row_ids)
        encoded["attention_mask"].append([[1] * len(one) for one in row_ids])
        encoded["truncated"].append(truncated)
        encoded["row"].append(row)
    if "label" in batch:
        encoded["labels"] = [int(batch["label"][row]) for row in encoded["row"]]
    return encoded


def dependency_features(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], *, max_length: int | None = None
) -> dict[str, list]:
    """
    Features for `KAdapterForDependencyParsing` from rows of the dependency schema.

    Rows with too long a sentence or with a word without tokens are dropped, because trees can't be truncated.

    Returns:
        `input_ids`, `attention_mask`, `word_starts` (each word's first token), `row`, and if the rows have trees `head_labels`
        (0 for the root, otherwise the number of the head, starting at 1) and `relation_labels`.
    """
    pieces = []
    for row, tokens in enumerate(batch["tokens"]):
        text = batch["text"][row] if "text" in batch and batch["text"][row] else " ".join(tokens)
        place = 0
        for token in tokens:
            start = text.index(token, place)
            # Words are tokenised separately: as one text, "don't" (do + n't) may become "don", "'" and "t".
            pieces.append(token if start == place > 0 else f" {token}")
            place = start + len(token)
    tokenized = iter(tokenize(pieces, tokenizer))
    before, after = special_tokens(tokenizer)
    most = most_tokens(tokenizer, max_length)
    names = ("input_ids", "attention_mask", "word_starts", "row")
    encoded: dict[str, list] = {name: [] for name in names}
    for row, tokens in enumerate(batch["tokens"]):
        words = [next(tokenized) for _ in tokens]
        starts = list(itertools.accumulate(map(len, words[:-1]), initial=len(before)))
        ids = [*before, *itertools.chain(*words), *after]
        if len(ids) > most or [] in words:
            continue
        for name, value in zip(names, (ids, [1] * len(ids), starts, row), strict=True):
            encoded[name].append(value)
    if "heads" in batch:
        encoded["head_labels"] = [batch["heads"][row] for row in encoded["row"]]
        encoded["relation_labels"] = [
            [index_of(labels, label, "relation") for label in batch["labels"][row]] for row in encoded["row"]
        ]
    return encoded


def index_of(labels: Sequence[str], label: str, kind: str) -> int:
    """The index of a label. Raises a `ValueError` if it is unknown, in which `kind` is what the label is called."""
    try:
        return labels.index(label)
    except ValueError:
        raise ValueError(
            f"the {kind} '{shortened(label)}' is not among the {len(labels)} labels: "
            f"{', '.join(map(shortened, labels[:5]))}, …"
        ) from None
