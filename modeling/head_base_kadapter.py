"""The base class of task heads, and losses that add up over micro-batches."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .configuration_kadapter import KAdapterConfig
from .encoding_kadapter import Encoded
from .modeling_kadapter import KAdapterPreTrainedModel


# The number of labels in all micro-batches of a step, which Trainer passes when it accumulates gradients.
ItemCount = torch.Tensor | int | None


def loss_of(total: torch.Tensor, count: int | torch.Tensor, num_items_in_batch: ItemCount) -> torch.Tensor:
    """
    The mean of `count` losses, or this micro-batch's share of the mean over `num_items_in_batch`: Trainer adds up the
    shares. 0 without any label.
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
    """Selects from `(batch, length, width)` one position of each row, `(batch,)`, or several, `(batch, number)`."""
    rows = torch.arange(state.shape[0], device=state.device)
    return state[rows if positions.dim() == 1 else rows[:, None], positions.to(state.device)]


def first_position(encoded: Encoded) -> torch.Tensor:
    """The position of the first token of each row, `(batch,)`."""
    state = encoded.backbone_state
    return torch.zeros(state.shape[0], dtype=torch.long, device=state.device)


def can_be_checked(tensor: torch.Tensor) -> bool:
    """Reading values from a GPU would wait for it."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def checked_positions(name: str, positions: torch.Tensor | None, encoded: Encoded, per_row: str = "") -> torch.Tensor:
    """
    The positions of tokens in a text, `(batch,)`, as positions among the states, where PEFT's virtual tokens come first.

    Args:
        per_row: what there are several of in each row, for positions of shape `(batch, number)`; -1 fills the rows.

    Raises:
        ValueError: positions are missing, of another shape, or outside the text.
    """
    batch, length = encoded.backbone_state.shape[:2]
    length -= encoded.virtual_tokens
    end = f", {per_row})" if per_row else ",)"
    if positions is None:
        raise ValueError(f"{name} is missing: the positions of tokens, of shape (batch{end}.")
    if positions.dim() != 1 + bool(per_row) or len(positions) != batch or positions.is_floating_point():
        raise ValueError(
            f"{name} must be a LongTensor of shape ({batch}{end}, not {positions.dtype} of {tuple(positions.shape)}."
        )
    if can_be_checked(positions):
        outside = positions[(positions < -bool(per_row)) | (positions >= length)]
        if outside.numel():
            raise ValueError(f"{name} has {outside[0].item()}, but the rows are {length} tokens long.")
    positions = positions.to(encoded.backbone_state.device)
    return torch.where(positions < 0, positions, positions + encoded.virtual_tokens)


class HeadModel(KAdapterPreTrainedModel):
    """
    Base class of task heads.

    A head overrides `add_head`, which makes its layers, and `forward`, which reads the fused states and returns a
    `ModelOutput`. `register_head` makes it known to the Auto classes:

        @register_head("AutoModelForSequenceClassification")
        class MeanPooled(HeadModel):
            @encodes_inputs
            def forward(self, encoded, labels=None):
                logits = self.classifier(self.dropout(self.fused(encoded).mean(dim=1)))
                loss = None if labels is None else cross_entropy(logits, labels)
                return SequenceClassifierOutput(loss, logits)

    A `forward` without the decorator, which may change the inputs first, calls `encode` itself.
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
            positions: those that the head reads, `(batch,)` or `(batch, number)`; the others are not fused.

        Returns:
            `(batch, length, width)`; with `positions`, `(batch, width)` or `(batch, number, width)`.
        """
        state, knowledge = encoded.backbone_state, encoded.knowledge
        if positions is not None:
            state = states_at(state, positions)
            knowledge = {name: states_at(other, positions) for name, other in knowledge.items()}
        # Without an active adapter the result has the backbone's dtype.
        return self.fusion(state, knowledge).to(self.own_dtype())
