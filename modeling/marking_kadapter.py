"""Token ids of texts with markers around entities. Used by pipelines, and by the features of the package kadapter-hf."""

from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def encode_marked(
    rows: list[tuple[str, list[tuple[int, int, list[int]]]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    original: bool = False,
    space_after: bool = False,
) -> dict[str, list]:
    """
    Encodes texts with markers around spans of them, which must not overlap.

    Args:
        rows: a text, and for each span its start, its end and the token ids of its marker.
        original: truncate long rows at the end. By default, the window is moved so that it contains all spans.
        space_after: whether a space follows a closing marker.

    Returns:
        `input_ids`, `attention_mask`, `starts` (the positions of the markers before the spans), and `row`: the indices of the
        rows whose spans fit into `max_length`.
    """
    before, after = special_tokens(tokenizer)
    most = most_tokens(tokenizer, max_length) - len(before) - len(after)
    pieces: list[str] = []
    orders = []
    for text, spans in rows:
        done = 0
        orders.append(sorted(range(len(spans)), key=spans.__getitem__))
        for index in orders[-1]:
            start, end, _ = spans[index]
            piece = text[done:start].rstrip()
            pieces += (spaced(piece) if done == 0 or space_after else piece, spaced(text[start:end]))
            done = end
        pieces.append(spaced(text[done:]) if space_after else text[done:])
    tokenized = iter(tokenize(pieces, tokenizer))
    encoded: dict[str, list] = {"input_ids": [], "attention_mask": [], "starts": [], "row": []}
    for row, ((_, spans), order) in enumerate(zip(rows, orders, strict=True)):
        ids: list[int] = []
        starts = [0] * len(spans)
        end = 0
        for index in order:
            marker = spans[index][2]
            ids += next(tokenized)
            starts[index] = len(ids)
            ids += [*marker, *next(tokenized), *marker]
            end = len(ids)
        ids += next(tokenized)
        first = 0
        if len(ids) > most and not original:
            if end - min(starts) > most:
                continue
            # Keeps equal amounts of text before and after the entities, as far as possible.
            first = min(max((min(starts) + end - most) // 2, 0), len(ids) - most)
        if max(starts) - first >= min(len(ids), most):
            continue
        ids = [*before, *ids[first : first + most], *after]
        encoded["input_ids"].append(ids)
        encoded["attention_mask"].append([1] * len(ids))
        encoded["starts"].append([start - first + len(before) for start in starts])
        encoded["row"].append(row)
    return encoded


def tokenize(pieces: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each piece, without special tokens; pieces may be empty or longer than the model's maximum."""
    distinct = list(dict.fromkeys(pieces))
    if tokenizer.is_fast:
        # The tokenizer's own call computes more than the ids of each piece, which takes longer than the ids.
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(distinct, add_special_tokens=False)]
    else:
        encoded = [tokenizer.encode(piece, add_special_tokens=False, verbose=False) for piece in distinct]
    ids = dict(zip(distinct, encoded, strict=True))
    return [ids[piece] for piece in pieces]


def spaced(text: str) -> str:
    """Adds a leading space, which marks the start of a word in RoBERTa's vocabulary."""
    return text if not text or text[0].isspace() else f" {text}"


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer adds before and after a text."""
    inner = tokenizer.encode(" a", add_special_tokens=False)
    whole = tokenizer.encode(" a")
    for place in range(len(whole)):
        if whole[place : place + len(inner)] == inner:
            return whole[:place], whole[place + len(inner) :]
    raise ValueError(f"{type(tokenizer).__name__} does not put the tokens of a text between its special tokens.")


def most_tokens(
    tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, backbone: PreTrainedConfig | None = None
) -> int:
    """
    The maximum number of tokens of a row: `max_length`, limited to the model's maximum.

    Args:
        backbone: configuration of the backbone, used if the tokenizer does not define a maximum.

    Raises:
        ValueError: the model's maximum is unknown.
    """
    most = tokenizer.model_max_length
    if most > 10**6 and backbone is not None:  # not defined by the tokenizer
        # RoBERTa's position ids start at padding_idx + 1.
        most = getattr(backbone, "max_position_embeddings", 512) - 2
    most = min(max_length or most, most)
    if most > 10**6:
        raise ValueError("the tokenizer does not define the model's maximum length: pass max_length.")
    return most
