"""The base class of task heads, and losses that add up over micro-batches."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .configuration_kadapter import KAdapterConfig
from .modeling_kadapter import Encoded, KAdapterPreTrainedModel


def loss_of(
    total: torch.Tensor, count: int | torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """
    The mean of `count` losses, or this micro-batch's share of it: when Trainer accumulates gradients, it passes the number
    of labels in all micro-batches of a step, and adds up the results. Without any label it is 0.
    """
    count = count if num_items_in_batch is None else num_items_in_batch
    if torch.is_tensor(count):
        count = count.to(total.device).clamp(min=1)
    return total / count


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Of `(…, classes)` logits and `(…)` labels; labels of -100 are ignored."""
    labels = labels.reshape(-1).to(logits.device)
    total = F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), labels, reduction="sum")
    return loss_of(total, (labels != -100).sum(), num_items_in_batch)


def states_at(state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Selects from `(batch, length, width)` at one position of each row, `(batch,)`, or at several, `(batch, number)`."""
    rows = torch.arange(state.shape[0], device=state.device)
    return state[rows if positions.dim() == 1 else rows[:, None], positions.to(state.device)]


class HeadModel(KAdapterPreTrainedModel):
    """
    Base class of task heads.

    A head overrides `add_head`, which makes its layers, and `forward`, which calls `encode` and `fused` and returns a
    `ModelOutput`. `register_head` makes it known to the Auto classes:

        @register_head("AutoModelForSequenceClassification")
        class MeanPooled(HeadModel):
            def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
                states = self.fused(self.encode(input_ids, attention_mask, **kwargs))
                logits = self.classifier(self.dropout(states.mean(dim=1)))
                loss = None if labels is None else cross_entropy(logits, labels)
                return SequenceClassifierOutput(loss=loss, logits=logits)
    """

    def __init__(self, config: KAdapterConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.add_head(config, config.backbone_config.hidden_size)
        self.post_init()

    def add_head(self, config: KAdapterConfig, width: int) -> None:
        """
        Makes the layers of the head as attributes of the model; by default one linear layer, `classifier`.

        Args:
            width: of the fused states.
        """
        self.classifier = nn.Linear(width, config.num_labels)

    def fused(self, encoded: Encoded, positions: torch.Tensor | None = None) -> torch.Tensor:
        """
        The fused states, in the head's dtype.

        Args:
            encoded: what `encode` returned.
            positions: those of each row that the head reads, `(batch,)` or `(batch, number)`; the others are not fused.

        Returns:
            `(batch, length, width)`; with `positions`, `(batch, width)` or `(batch, number, width)`.
        """
        state, knowledge = encoded.backbone_state, encoded.knowledge
        if positions is not None:
            state = states_at(state, positions)
            knowledge = {name: states_at(other, positions) for name, other in knowledge.items()}
        # Without an active adapter the result has the backbone's dtype.
        return self.fusion(state, knowledge).to(self.own_dtype())


def first_position(encoded: Encoded) -> torch.Tensor:
    """The position of the first token of each row, `(batch,)`."""
    state = encoded.backbone_state
    return torch.zeros(state.shape[0], dtype=torch.long, device=state.device)
