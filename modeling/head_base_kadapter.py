"""The base class of task heads, and losses that add up over micro-batches."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .configuration_kadapter import KAdapterConfig
from .encoding_kadapter import Encoded
from .modeling_kadapter import KAdapterPreTrainedModel


# The number of labels in all micro-batches of a step, passed by Trainer.
ItemCount = torch.Tensor | int | None


def loss_of(total: torch.Tensor, count: int | torch.Tensor, num_items_in_batch: ItemCount) -> torch.Tensor:
    """The mean of `count` losses, or this micro-batch's share of the mean of `num_items_in_batch`; 0 without labels."""
    count = count if num_items_in_batch is None else num_items_in_batch
    if torch.is_tensor(count):
        count = count.to(total.device).clamp(min=1)
    return total / count


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: ItemCount = None) -> torch.Tensor:
    """The mean over `(…, classes)` logits and `(…)` labels, see `loss_of`; labels of -100 are ignored."""
    labels = labels.reshape(-1).to(logits.device)
    total = F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), labels, reduction="sum")
    return loss_of(total, (labels != -100).sum(), num_items_in_batch)


def first_position(encoded: Encoded) -> torch.Tensor:
    """The position of the first token of each row, `(batch,)`."""
    state = encoded.backbone_state
    return torch.zeros(state.shape[0], dtype=torch.long, device=state.device)


def can_be_checked(tensor: torch.Tensor) -> bool:
    """Whether values can be read without waiting for a GPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def checked_positions(name: str, positions: torch.Tensor | None, encoded: Encoded, per_row: str = "") -> torch.Tensor:
    """
    Checks the positions of tokens in a text, `(batch,)`, and returns their positions among the states, in which PEFT's
    virtual tokens come first. `per_row` names the second dimension, if there is one; -1 then fills the rows.
    """
    batch, length = encoded.backbone_state.shape[:2]
    length -= encoded.virtual_tokens
    end = f", {per_row})" if per_row else ",)"
    if positions is None:
        raise ValueError(
            f"{name} is missing: the positions of tokens, of shape (batch{end}. From text, they are made by the pipelines "
            "entity-typing, relation-classification and dependency-parsing."
        )
    if positions.dim() != 1 + bool(per_row) or positions.shape[0] != batch or positions.is_floating_point():
        raise ValueError(
            f"{name} must be a LongTensor of shape ({batch}{end}, not {positions.dtype} of {tuple(positions.shape)}."
        )
    if can_be_checked(positions) and not encoded.at_positions:
        outside = positions[(positions < -bool(per_row)) | (positions >= length)]
        if outside.numel():
            raise ValueError(f"{name} has {outside[0].item()}, but the rows are {length} tokens long.")
    positions = positions.to(encoded.backbone_state.device)
    return torch.where(positions < 0, positions, positions + encoded.virtual_tokens)


class HeadModel(KAdapterPreTrainedModel):
    """
    Base class of task heads. A head overrides `add_head`, which creates its layers, and `forward`, which returns a
    `ModelOutput`. `register_head` makes it known to the Auto classes:

        @register_head("AutoModelForSequenceClassification")
        class MeanPooled(HeadModel):
            @encodes_inputs
            def forward(self, encoded, labels=None):
                logits = self.classifier(self.dropout(self.fused(encoded).mean(dim=1)))
                loss = None if labels is None else cross_entropy(logits, labels)
                return SequenceClassifierOutput(loss, logits)

    A `forward` without the decorator calls `encode` itself, e.g. with other inputs.
    """

    def __init__(self, config: KAdapterConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.add_head(config, config.backbone_config.hidden_size)
        self.post_init()

    def add_head(self, config: KAdapterConfig, width: int) -> None:
        """Creates the layers of the head, by default one linear layer; `width` is that of the fused states."""
        self.classifier = nn.Linear(width, config.num_labels)

    def fused(self, encoded: Encoded, positions: torch.Tensor | None = None) -> torch.Tensor:
        """
        The fused states, `(batch, length, width)`, in the head's dtype. With `positions`, of shape `(batch,)` or
        `(batch, number)`, only those are computed, `(batch, width)` or `(batch, number, width)`. Call it once per forward
        pass, with all positions that the head reads: the adapters run each time.
        """
        # Without an active adapter the result has the backbone's dtype.
        return self.fuse(encoded, positions).to(self.own_dtype())
