"""The knowledge adapter: a side network that reads some of the backbone's hidden states and never writes to it."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, initialization as init
from transformers.masking_utils import create_bidirectional_mask

from .configuration_kadapter import KnowledgeAdapterConfig
from .fusion_kadapter import to_layer
from .layers_kadapter import TransformerEncoder, states_at


class KnowledgeAdapterLayer(nn.Module):
    """
    A layer of a knowledge adapter: project down, transformer layers, project up, and a skip connection over all of it.

    Source: paper, section 3.1; `Adapter` in the original's `pytorch_transformers/my_modeling_roberta.py`, with the same
    tensor names.
    """

    def __init__(self, config: KnowledgeAdapterConfig, backbone_width: int, attention: PreTrainedConfig):
        super().__init__()
        self.initializer_range = config.initializer_range
        self.down_project = nn.Linear(backbone_width, config.hidden_size)
        self.encoder = TransformerEncoder(config, attention)
        self.up_project = nn.Linear(config.hidden_size, backbone_width)

    def init_projections(self) -> None:
        for projection in (self.down_project, self.up_project):
            init.normal_(projection.weight, mean=0.0, std=self.initializer_range)
            init.zeros_(projection.bias)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Maps `(batch, length, backbone width)` to the same shape or, with `positions` of shape `(batch, number)`, to
        `(batch, number, backbone width)`. `attention_mask` is in the format of the attention implementation.
        """
        projected = self.down_project(hidden_states)
        checkpointing = self.training and any(layer.gradient_checkpointing for layer in self.encoder.layer)
        if checkpointing and torch.is_grad_enabled() and not projected.requires_grad:
            # With use_reentrant=True, a checkpointed layer has no gradients unless an input requires them. If PEFT trains
            # the layer but not the projection, no input does.
            projected.requires_grad_()
        read = hidden_states if positions is None else states_at(hidden_states, positions)
        return read + self.up_project(self.encoder(projected, attention_mask, positions))


class KnowledgeAdapter(nn.Module):
    """
    A knowledge adapter: layer `i` reads the sum of the backbone's hidden state `backbone_layers[i]` and the output of
    layer `i - 1`. The paper (section 3.1) says that they are concatenated, but the original's code adds them.
    """

    def __init__(self, config: KnowledgeAdapterConfig, backbone_width: int, attention: PreTrainedConfig | None = None):
        """`attention` is the configuration whose attention implementation the layers use, such as the K-Adapter's."""
        super().__init__()
        self.config = config
        self.attention = attention = attention or PreTrainedConfig()
        self.layers = nn.ModuleList(
            KnowledgeAdapterLayer(config, backbone_width, attention) for _ in config.backbone_layers
        )

    def forward(
        self,
        hidden_states: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: the backbone's hidden states by index, `(batch, length, width)` each; at least those that the adapter
                reads.
            attention_mask: `(batch, length)`, 1 at real tokens. Ignored with `attend_to_padding`.
            positions: `(batch,)` or `(batch, number)`: compute the output at these positions only.

        Returns:
            `(batch, length, width)`, in the adapter's dtype and on its device; with positions, `(batch, width)` or
            `(batch, number, width)`.
        """
        states = [to_layer(hidden_states[i], self.layers[0].down_project) for i in self.config.backbone_layers]
        if self.config.attend_to_padding:
            attention_mask = None
        elif attention_mask is not None:
            attention_mask = attention_mask.to(states[0].device)
        if self.config.num_hidden_layers:  # made once for all layers, as it synchronises with a GPU
            attention_mask = create_bidirectional_mask(self.attention, states[0], attention_mask)
        *lower, last = self.layers
        state = states[0]
        for layer, read in zip(lower, states[1:], strict=True):
            state = read + layer(state, attention_mask)
        if positions is not None and positions.dim() == 1:
            return last(state, attention_mask, positions[:, None])[:, 0]
        return last(state, attention_mask, positions)
