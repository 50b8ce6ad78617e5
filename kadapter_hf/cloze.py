"""
Cloze questions: sentences with a mask, and the answers that a masked-language model prefers.

Source: `scripts/batch_eval_KB_completion.py` and `lama/evaluation_metrics.py` in github.com/facebookresearch/LAMA.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .corpora import Report
from .lama import MASK, Fact
from .modeling.heads_kadapter import KAdapterForMaskedLM
from .progress import progress


TOP = 10  # the number of best candidates in a prediction


# ---- Candidates -----------------------------------------------------------------------------------------------------


class Candidates:
    """
    The answers that a model ranks.

    Attributes:
        words: the answers as text.
        by_length: for each number of tokens, the indices of the answers of this length, `(answers,)`, and their token ids,
            `(answers, tokens)`.
    """

    def __init__(self, words: Sequence[str], ids: Sequence[Sequence[int]]):
        self.words = list(words)
        self.index = {tuple(tokens): number for number, tokens in enumerate(ids)}
        grouped = defaultdict(list)
        for number, tokens in enumerate(ids):
            grouped[len(tokens)].append(number)
        self.by_length = {
            length: (torch.tensor(numbers), torch.tensor([list(ids[number]) for number in numbers]))
            for length, numbers in grouped.items()
        }

    def __len__(self) -> int:
        return len(self.words)


def token_ids(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """The tokens of each word within a text, i.e. after a space."""
    encoded = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"] if words else []
    return [tuple(ids) for ids in encoded]


def single_token_words(tokenizer: PreTrainedTokenizerBase) -> Candidates:
    """
    The words that are one token: every token, except special ones, whose text has a letter or a digit and no space, and
    that the tokenizer makes of this text after a space. So parts of words (`##ing`) and punctuation are left out.
    """
    special = {*tokenizer.all_special_ids, *(n for n, t in tokenizer.added_tokens_decoder.items() if t.special)}
    numbers = [number for number in sorted(tokenizer.get_vocab().values()) if number not in special]
    words = [word.strip() for word in tokenizer.batch_decode([[number] for number in numbers])]
    is_word = [any(map(str.isalnum, word)) and not any(map(str.isspace, word)) for word in words]
    kept = [pair for pair, good in zip(zip(numbers, words, strict=True), is_word, strict=True) if good]
    encoded = token_ids([word for _, word in kept], tokenizer)
    kept = [(number, word) for (number, word), ids in zip(kept, encoded, strict=True) if ids == (number,)]
    return Candidates([word for _, word in kept], [(number,) for number, _ in kept])


def read_vocabulary(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Candidates, int]:
    """
    Reads a vocabulary with one word per line.

    Returns:
        The words that are one token, and the number of other lines: of several tokens, unknown to the tokenizer, or of the
        same token as an earlier line.

    Raises:
        ValueError: the file is not UTF-8, or none of its words is one token.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"'{path}' is not UTF-8.") from None
    words = [line.strip() for line in lines if line.strip()]
    kept: dict[tuple[int, ...], str] = {}
    for word, ids in zip(words, token_ids(words, tokenizer), strict=True):
        if len(ids) == 1 and ids[0] not in tokenizer.all_special_ids:
            kept.setdefault(ids, word)
    if not kept:
        raise ValueError(f"'{path}': no line is one token of the model's tokenizer.")
    return Candidates(list(kept.values()), list(kept)), len(words) - len(kept)


# ---- Ranks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """A fact as token ids with one mask, at `position`, and the index of the right one of the candidates."""

    fact: Fact
    ids: list[int]
    position: int
    candidates: Candidates
    answer: int


@dataclass(frozen=True)
class Prediction:
    """
    Attributes:
        rank: the rank of the right answer among the candidates, starting at 1, after all candidates with the same score.
        score: its log-probability; for several tokens, their mean.
        top: the best candidates, best first.
    """

    rank: int
    score: float
    top: list[str]


def queries_of(
    facts: Iterable[Fact],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Candidates | None,
    most: int,
    report: Report,
) -> list[Query]:
    """
    The facts that can be scored.

    Args:
        vocabulary: words of one token; without it, the candidates of a fact are all objects of its relation.
        most: maximum number of tokens.
        report: records the facts that can't be scored.

    Raises:
        ValueError: no fact can be scored.
    """
    facts = list(facts)
    answers = token_ids([fact.object for fact in facts], tokenizer)
    texts = [fact.text.replace(MASK, str(tokenizer.mask_token)) for fact in facts]
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    unknown = tokenizer.unk_token_id
    kept = []
    for fact, answer, ids in zip(facts, answers, encoded, strict=True):
        reason = None
        if not answer or unknown in answer:
            reason = "the object is unknown to the tokenizer"
        elif vocabulary is not None and len(answer) > 1:
            reason = "the object is several tokens"
        elif vocabulary is not None and answer not in vocabulary.index:
            reason = "the object is not in the vocabulary"
        elif len(ids) + len(answer) - 1 > most:
            reason = "the sentence is too long for the model"
        if reason is None:
            kept.append((fact, answer, ids))
        else:
            report.drop(reason, f"{fact.part}, {fact.relation}, {fact.uuid}")
            report.kept -= 1
    if not kept:
        raise ValueError(f"no fact is left to score. {report.reasons()}")
    candidates = _objects_by_relation(kept) if vocabulary is None else defaultdict(lambda: vocabulary)
    queries = []
    for fact, answer, ids in kept:
        of_fact = candidates[fact.part, fact.relation]
        position = ids.index(tokenizer.mask_token_id)
        queries.append(Query(fact, ids, position, of_fact, of_fact.index[answer]))
    return queries


def _objects_by_relation(kept: list[tuple[Fact, tuple[int, ...], list[int]]]) -> dict[tuple[str, str], Candidates]:
    objects: dict[tuple[str, str], dict[tuple[int, ...], str]] = defaultdict(dict)
    for fact, answer, _ in kept:
        objects[fact.part, fact.relation].setdefault(answer, fact.object)
    return {relation: Candidates(list(answers.values()), list(answers)) for relation, answers in objects.items()}


@torch.inference_mode()
def predict(
    model: KAdapterForMaskedLM, queries: Sequence[Query], mask: int, batch_size: int = 32, name: str = "model"
) -> list[Prediction]:
    """
    Ranks the candidates of each query. A candidate of n tokens is scored with n masks in its place, by the mean of the
    log-probabilities of its tokens.

    Sentences of the same number of tokens are batched, so that nothing is padded.

    Args:
        mask: the id of the mask.
        name: what the progress bar says.
    """
    # One item for each query and each number of masks.
    items = [
        (len(query.ids) + masks - 1, masks, number)
        for number, query in enumerate(queries)
        for masks in query.candidates.by_length
    ]
    scores: dict[int, torch.Tensor] = {}
    missing = [len(query.candidates.by_length) for query in queries]
    predictions: list[Any] = [None] * len(queries)
    for batch in progress(_batches(sorted(items), batch_size), name):
        rows, positions = [], []
        for _, masks, number in batch:
            query = queries[number]
            rows.append([*query.ids[: query.position], *[mask] * masks, *query.ids[query.position + 1 :]])
            positions.append(range(query.position, query.position + masks))
        logits = logits_at(model, torch.tensor(rows), torch.tensor(list(map(list, positions))))
        # In float64, as different logits could be rounded to the same log-probability.
        for found, (_, masks, number) in zip(logits.cpu().double().log_softmax(-1), batch, strict=True):
            query = queries[number]
            indices, ids = query.candidates.by_length[masks]
            of_query = scores.setdefault(number, torch.empty(len(query.candidates), dtype=torch.float64))
            of_query[indices] = found[torch.arange(masks), ids].mean(-1)
            missing[number] -= 1
            if not missing[number]:
                predictions[number] = prediction_of(scores.pop(number), query)
    return predictions


def logits_at(model: KAdapterForMaskedLM, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    The logits at these positions only, as the output layer takes most of the time.

    Args:
        input_ids: `(batch, length)`, without padding.
        positions: `(batch, number)`.

    Returns:
        `(batch, number, vocab_size)`.
    """
    input_ids = input_ids.to(model.device)
    encoded = model.encode(input_ids, torch.ones_like(input_ids))  # type: ignore[arg-type]
    fused = model.fuse(encoded, positions)
    return model.lm_head(None, inputs_embeds=fused, return_dict=True).logits


def _batches(items: list[tuple[int, int, int]], size: int) -> list[list[tuple[int, int, int]]]:
    """Sorted items, at most `size` of the same numbers of tokens and masks in each batch."""
    batches: list[list[tuple[int, int, int]]] = []
    for item in items:
        if not batches or len(batches[-1]) == size or batches[-1][0][:2] != item[:2]:
            batches.append([])
        batches[-1].append(item)
    return batches


def prediction_of(scores: torch.Tensor, query: Query) -> Prediction:
    """The prediction from the scores of the query's candidates, `(candidates,)`."""
    right = scores[query.answer]
    best = scores.topk(min(TOP, len(scores))).indices.tolist()
    # A score that is not a number is no better than any.
    rank = int((~(scores < right)).sum())
    return Prediction(rank, float(right), [query.candidates.words[index] for index in best])
