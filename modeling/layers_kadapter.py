"""The transformer layer inside knowledge adapters: BERT's, with LayerNorm after each residual connection."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compat_kadapter import attn_implementation_of
from .configuration_kadapter import KnowledgeAdapterConfig


# The names of the modules are those of the tensors in adapter files, and of the original's checkpoints.


def states_at(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Selects from `(batch, length, width)` one position of each row, `(batch,)`, or several, `(batch, number)`."""
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows if positions.dim() == 1 else rows[:, None], positions.to(states.device)]


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain PyTorch, with the signature of transformers' attention functions."""
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SelfAttention(nn.Module):
    """Multi-head attention on transformers' attention interface: SDPA, Flash Attention, eager and others."""

    is_causal = False

    def __init__(self, config: KnowledgeAdapterConfig, attention: PreTrainedConfig):
        super().__init__()
        self.config = attention
        self.head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, read: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        query, key, value = (
            projection(of).unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (batch, heads, length, head size)
            for projection, of in ((self.query, read), (self.key, states), (self.value, states))
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attn_implementation_of(self.config), eager_attention)
        dropout = self.dropout.p if self.training else 0.0
        attended, _ = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.head_size**-0.5)
        return attended.flatten(2)


class Residual(nn.Module):
    """`LayerNorm(dropout(dense(new)) + states)`"""

    def __init__(self, config: KnowledgeAdapterConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, new: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(new)) + states)


class Attention(nn.Module):
    def __init__(self, config: KnowledgeAdapterConfig, attention: PreTrainedConfig):
        super().__init__()
        self.self = SelfAttention(config, attention)
        self.output = Residual(config, config.hidden_size)

    def forward(self, read: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.output(self.self(read, states, attention_mask), read)


class Intermediate(nn.Module):
    def __init__(self, config: KnowledgeAdapterConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(states))


class TransformerLayer(GradientCheckpointingLayer):
    """Self-attention and a feed-forward part, each with a residual connection."""

    def __init__(self, config: KnowledgeAdapterConfig, attention: PreTrainedConfig):
        super().__init__()
        self.attention = Attention(config, attention)
        self.intermediate = Intermediate(config)
        self.output = Residual(config, config.intermediate_size)

    def forward(
        self, states: torch.Tensor, attention_mask: torch.Tensor | None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Maps `(batch, length, hidden_size)` to the same shape or, with `positions` of shape `(batch, number)`, to
        `(batch, number, hidden_size)`. `attention_mask` is in the format of the attention implementation.
        """
        read = states if positions is None else states_at(states, positions)
        if positions is not None and attention_mask is not None:
            attention_mask = attention_mask[:, :, :1]  # hides the same tokens from every position
        states = self.attention(read, states, attention_mask)
        return self.output(self.intermediate(states), states)


class TransformerEncoder(nn.Module):
    """
    A stack of transformer layers; without any, the activation alone. `attention` holds the name of the attention
    implementation, which may change.
    """

    def __init__(self, config: KnowledgeAdapterConfig, attention: PreTrainedConfig):
        super().__init__()
        self.layer = nn.ModuleList(TransformerLayer(config, attention) for _ in range(config.num_hidden_layers))
        self.activation = None if config.num_hidden_layers else ACT2FN[config.hidden_act]

    def forward(
        self, states: torch.Tensor, attention_mask: torch.Tensor | None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Maps `(batch, length, hidden_size)` to the same shape or, with `positions` of shape `(batch, number)`, to
        `(batch, number, hidden_size)`. `attention_mask` is in the format of the attention implementation.
        """
        if self.activation is not None:
            return self.activation(states if positions is None else states_at(states, positions))
        # Flash Attention's mask is `(batch, length)`, and flex attention's no tensor: they compute all positions.
        early = attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4)
        for number, layer in enumerate(self.layer, start=1):
            states = layer(states, attention_mask, positions if early and number == len(self.layer) else None)
        if positions is not None and not early:
            states = states_at(states, positions)
        return states
