"""What task heads share: one classifier layer over dropout on fused states, and losses that add up over micro-batches."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .configuration_kadapter import KAdapterConfig
from .modeling_kadapter import KAdapterPreTrainedModel


def loss_of(
    total: torch.Tensor, count: int | torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """
    The mean of `count` losses, or this micro-batch's share of it: Trainer, when it accumulates gradients, gives the
    number of labels in all the micro-batches of a step, and adds up what it gets. Without any label it is 0.
    """
    count = count if num_items_in_batch is None else num_items_in_batch
    if torch.is_tensor(count):
        count = count.to(total.device).clamp(min=1)
    return total / count


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Over `(…, classes)` and `(…)`; labels of -100 don't count."""
    labels = labels.reshape(-1).to(logits.device)
    total = F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), labels, reduction="sum")
    return loss_of(total, (labels != -100).sum(), num_items_in_batch)


def states_at(state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`(batch, length, width)` at one position of each row, `(batch,)`, or at several, `(batch, number)`."""
    rows = torch.arange(state.shape[0], device=state.device)
    return state[rows if positions.dim() == 1 else rows[:, None], positions.to(state.device)]


class HeadModel(KAdapterPreTrainedModel):
    """A head with one classifier layer over dropout."""

    _classifier_name = "classifier"

    def __init__(self, config: KAdapterConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self._add_head(config, config.backbone_config.hidden_size)
        self.post_init()

    def _add_head(self, config: KAdapterConfig, width: int) -> None:
        setattr(self, self._classifier_name, nn.Linear(width, config.num_labels))

    def _fused(self, state: torch.Tensor, knowledge: dict[str, torch.Tensor]) -> torch.Tensor:
        """The fused states in the head's dtype: without an active adapter they are the backbone's, in its own."""
        return self.fusion(state, knowledge).to(self._own_dtype())

    def _fused_at(
        self, state: torch.Tensor, knowledge: dict[str, torch.Tensor], positions: torch.Tensor
    ) -> torch.Tensor:
        """The fused states at these positions of each row (see `states_at`); the others are not fused at all."""
        knowledge = {name: states_at(other, positions) for name, other in knowledge.items()}
        return self._fused(states_at(state, positions), knowledge)

    def _first_position(self, state: torch.Tensor) -> torch.Tensor:
        return torch.zeros(state.shape[0], dtype=torch.long, device=state.device)
