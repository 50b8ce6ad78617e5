"""A dependency parser on a K-Adapter's fused states, and the search for the best tree."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .configuration_kadapter import KAdapterConfig
from .encoding_kadapter import Encoded, encodes_inputs
from .head_base_kadapter import HeadModel, ItemCount, can_be_checked, checked_positions, cross_entropy, first_position
from .registry_kadapter import register_head


@dataclass
class DependencyParserOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`, *optional*): the sum of those of arcs and relations, if both have labels.
        arc_logits (`torch.FloatTensor` of shape `(batch, words, words + 1)`): for each word, the score of each head: the
            root, then the words. Impossible pairs (a word itself, padding) have the lowest number of the dtype.
        relation_logits (`torch.FloatTensor` of shape `(batch, words, words + 1, num_labels)`): for each word and head, the
            score of each relation. None in training with labels, which only needs those of the correct heads.
        hidden_states, attentions (`tuple`, *optional*): the backbone's, if requested.
    """

    loss: torch.FloatTensor | None = None
    arc_logits: torch.FloatTensor | None = None
    relation_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def decode_tree(arc_scores: torch.Tensor | Sequence[Sequence[float]]) -> list[int]:
    """
    The best dependency tree of a sentence in which exactly one word has the root as its head.

    Args:
        arc_scores: `(words, words + 1)`, for each word the score of each head: the root, then the words.

    Returns:
        The head of each word: 0 for the root, else the number of the word, starting at 1.

    Raises:
        ValueError: a score is not a number.
    """
    scores = torch.as_tensor(arc_scores).detach().to(device="cpu", dtype=torch.float64, copy=True)
    if scores.isnan().any():
        raise ValueError("the scores of the arcs are not numbers (nan): has training diverged?")
    words = scores.shape[0]
    scores[:, 1:].fill_diagonal_(-torch.inf)
    heads = scores.argmax(-1).tolist() if words else []
    if not words or (heads.count(0) == 1 and not find_cycle([0, *heads])):
        return heads
    # Each further word on the root costs more than all other choices can gain.
    possible = scores[scores.isfinite()]
    scores[:, 0] -= (possible.max() - possible.min()) * words + 1
    nobody = torch.full((1, words + 1), -torch.inf, dtype=scores.dtype)
    return _best_heads(torch.cat([nobody, scores]))[1:]


def _best_heads(scores: torch.Tensor) -> list[int]:
    """
    The heads of the maximum spanning tree for `(nodes, nodes)` scores of each node's heads; node 0 is the root.

    Source: Chu and Liu (1965), Edmonds (1967), as in McDonald et al. (HLT 2005, figure 3).
    """
    heads = [0, *scores[1:].argmax(-1).tolist()]
    cycle = find_cycle(heads)
    if not cycle:
        return heads
    # The cycle is contracted to one node, the last. An arc into it replaces the arc within it to the same word.
    others = [node for node in range(len(heads)) if node not in cycle]
    within = scores[cycle, [heads[node] for node in cycle]]
    best_into = (scores[cycle][:, others] - within[:, None]).max(0)
    best_from = scores[others][:, cycle].max(1)
    contracted = scores.new_full([len(others) + 1] * 2, -torch.inf)
    contracted[:-1, :-1] = scores[others][:, others]
    contracted[-1, :-1], contracted[:-1, -1] = best_into.values, best_from.values
    found = _best_heads(contracted)
    for place, node in enumerate(others[1:], start=1):
        head = found[place]
        heads[node] = cycle[int(best_from.indices[place])] if head == len(others) else others[head]
    heads[cycle[int(best_into.indices[found[-1]])]] = others[found[-1]]
    return heads


def find_cycle(heads: Sequence[int]) -> list[int]:
    """The nodes of a cycle among the heads of nodes, if there is one. Node 0 is the root, whose head is not read."""
    done = {0}
    for node in range(1, len(heads)):
        path: list[int] = []
        while node not in done:
            if node in path:
                return path[path.index(node) :]
            path.append(node)
            node = heads[node]
        done.update(path)
    return []


def decode_parse(arc_logits: torch.Tensor, relation_logits: torch.Tensor) -> tuple[list[int], list[int]]:
    """The best tree of one sentence, and the best relation of each word to its head, from one row of the logits."""
    heads = decode_tree(arc_logits)
    return heads, relation_logits[range(len(heads)), heads].argmax(-1).tolist()


def _check_labels(
    head_labels: torch.Tensor, relation_labels: torch.Tensor, can_be_head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = can_be_head.shape[:2]
    for name, labels in (("head_labels", head_labels), ("relation_labels", relation_labels)):
        if labels.shape != shape or labels.is_floating_point():
            raise ValueError(
                f"{name} must be a LongTensor of shape {tuple(shape)}, as word_starts, not {labels.dtype} of "
                f"{tuple(labels.shape)}."
            )
    head_labels, relation_labels = (labels.to(can_be_head.device).long() for labels in (head_labels, relation_labels))
    if can_be_checked(head_labels):
        inside = (head_labels >= 0) & (head_labels <= shape[1])
        possible = can_be_head.gather(2, head_labels.where(inside, 0)[..., None])[..., 0] & inside
        row, word = torch.where(~possible & (head_labels != -100))
        if len(row):
            raise ValueError(
                f"head_labels has {head_labels[row[0], word[0]].item()} for word {word[0].item() + 1} of row "
                f"{row[0].item()}: neither 0, for the root, nor the number of another word of the row."
            )
    # There is no relation to a head that is not labelled.
    return head_labels, relation_labels.masked_fill(head_labels == -100, -100)


def _word_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: ItemCount) -> torch.Tensor:
    """
    The cross-entropy of `(batch, words, classes)` logits. Without a count, as Trainer only counts `labels`, it is the mean
    over the rows of the mean over a row's words, so that gradient accumulation does not change it.
    """
    if num_items_in_batch is not None:
        return cross_entropy(logits, labels, num_items_in_batch)
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return (losses.sum(1) / (labels != -100).sum(1).clamp(min=1)).mean()


@register_head()
class KAdapterForDependencyParsing(HeadModel):
    """
    Predicts the head of each word and the relation to it, from the fused states of the words' first tokens. The first token
    of the text represents the root.

    Source: the biaffine attention of Dozat and Manning (ICLR 2017, section 3). The original's `lin-adapter.py` instead
    classifies each sub-word as one of the positions of a text of fixed length, without relations.
    """

    def add_head(self, config: KAdapterConfig, width: int) -> None:
        arc, relation = min(500, width), min(100, width)
        self.arc_word, self.arc_head = nn.Linear(width, arc), nn.Linear(width, arc)
        self.relation_word, self.relation_head = nn.Linear(width, relation), nn.Linear(width, relation)
        # From a word, a scorer computes weights for the features of heads; for relations, also a bias.
        self.arc_scorer = nn.Linear(arc, arc)
        self.relation_scorer = nn.Linear(relation, config.num_labels * (relation + 1))

    @encodes_inputs
    def forward(
        self,
        encoded: Encoded,
        word_starts: torch.LongTensor | None = None,
        head_labels: torch.LongTensor | None = None,
        relation_labels: torch.LongTensor | None = None,
        num_items_in_batch: ItemCount = None,
    ) -> DependencyParserOutput:
        """
        Args:
            word_starts: `(batch, words)`, the position of each word's first token; -1 fills rows with fewer words.
            head_labels: `(batch, words)`, the head of each word: 0 for the root, else the number of the word, starting
                at 1; -100 is ignored.
            relation_labels: `(batch, words)`, the index of each word's relation to its head; -100 is ignored.
            num_items_in_batch: the number of words to average over. By default the mean over each row's words is averaged
                over the rows.

        Returns:
            `arc_logits`, and `relation_logits` except in training with labels; `decode` returns the trees.

        Raises:
            ValueError: an argument is missing, has another shape, or names a position outside the text.
        """
        word_starts = checked_positions("word_starts", word_starts, encoded, per_row="words")
        if can_be_checked(word_starts) and ((word_starts[:, :-1] < 0) & (word_starts[:, 1:] >= 0)).any():
            raise ValueError("word_starts has a word after a -1; -1 fills the end of a row with fewer words.")
        positions = torch.cat([first_position(encoded)[:, None], word_starts.clamp(min=0)], dim=1)
        heads = self.fused(encoded, positions)
        words = heads[:, 1:]
        arc_logits = self._features(words, self.arc_word, self.arc_scorer) @ self._features(heads, self.arc_head).mT
        can_be_head = _can_be_head(word_starts >= 0)
        arc_logits = arc_logits.masked_fill(~can_be_head, torch.finfo(arc_logits.dtype).min)

        scorer = self._features(words, self.relation_word, self.relation_scorer)
        scorer = scorer.unflatten(-1, (self.config.num_labels, -1))  # (batch, words, num_labels, features + 1)
        head_features = self._features(heads, self.relation_head)
        loss = relation_logits = None
        if not self.training or head_labels is None or relation_labels is None:
            relation_logits = torch.einsum("bwlf,bhf->bwhl", scorer[..., :-1], head_features)
            relation_logits = relation_logits + scorer[..., -1].unsqueeze(2)
        if head_labels is not None and relation_labels is not None:
            head_labels, relation_labels = _check_labels(head_labels, relation_labels, can_be_head)
            right = head_labels.clamp(min=0)[..., None]
            if relation_logits is None:
                right_features = head_features.gather(1, right.expand(-1, -1, head_features.shape[-1]))
                at_right = (scorer[..., :-1] @ right_features.unsqueeze(-1)).squeeze(-1) + scorer[..., -1]
            else:
                at_right = relation_logits.take_along_dim(right[..., None], dim=2).squeeze(2)
            loss = _word_loss(arc_logits, head_labels, num_items_in_batch)
            loss = loss + _word_loss(at_right, relation_labels, num_items_in_batch)
        return DependencyParserOutput(loss, arc_logits, relation_logits, encoded.hidden_states, encoded.attentions)

    def _features(self, states: torch.Tensor, layer: nn.Linear, scorer: nn.Linear | None = None) -> torch.Tensor:
        features = self.dropout(F.leaky_relu(layer(states), 0.1))
        return features if scorer is None else scorer(features)

    def decode(
        self, output: DependencyParserOutput, word_starts: torch.LongTensor
    ) -> list[tuple[list[int], list[str]]]:
        """
        The best tree of each sentence.

        Args:
            output: of the model in evaluation mode or without labels.
            word_starts: those that the model was called with.

        Returns:
            For each row, the head of each word (0 for the root, else the number of the word, starting at 1), and the name
            of the relation to it.

        Raises:
            ValueError: the output has no `relation_logits`.
        """
        if output.relation_logits is None:
            raise ValueError("the output has no relation_logits: call the model without labels or in evaluation mode.")
        parses = []
        for row, words in enumerate((word_starts >= 0).sum(1).tolist()):
            heads, relations = decode_parse(
                output.arc_logits[row, :words, : words + 1], output.relation_logits[row, :words]
            )
            parses.append((heads, [self.config.id2label[relation] for relation in relations]))
        return parses


def _can_be_head(is_word: torch.Tensor) -> torch.Tensor:
    """`(batch, words, words + 1)`: whether a head is possible for a word."""
    numbers = torch.arange(is_word.shape[1] + 1, device=is_word.device)
    is_head = F.pad(is_word, (1, 0), value=True)
    return is_word[:, :, None] & is_head[:, None, :] & (numbers[1:, None] != numbers)
