"""The knowledge adapter (a side network that reads the backbone's hidden states) and the fusion of several."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import BertConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.modeling_bert import BertEncoder

from .configuration_kadapter import KnowledgeAdapterConfig


class KnowledgeAdapterLayer(nn.Module):
    """
    One unit of a knowledge adapter: project down, N transformer layers, project up, and a skip over all of it.

    Source: the paper's section 3.1; `Adapter` in the original's `pytorch_transformers/my_modeling_roberta.py`, whose
    tensor names it keeps (`down_project`, `encoder.layer.N…`, `up_project`).
    """

    def __init__(self, encoder_config: BertConfig, backbone_width: int, initializer_range: float):
        super().__init__()
        self.initializer_range = initializer_range
        self.down_project = nn.Linear(backbone_width, encoder_config.hidden_size)
        self.encoder = BertEncoder(encoder_config)
        self.up_project = nn.Linear(encoder_config.hidden_size, backbone_width)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """`hidden_states` and the result: (batch, length, backbone width); `attention_mask`: (batch, length) or None."""
        projected = self.down_project(hidden_states)
        checkpointing = self.training and any(layer.gradient_checkpointing for layer in self.encoder.layer)
        if checkpointing and torch.is_grad_enabled() and not projected.requires_grad:
            # PEFT may train what comes next and not the projection. A layer that is checkpointed with
            # use_reentrant=True gives no gradients to its weights if nothing that goes into it requires any.
            projected.requires_grad_()
        mask = create_bidirectional_mask(self.encoder.config, projected, attention_mask)
        encoded = self.encoder(projected, attention_mask=mask)[0]
        return hidden_states + self.up_project(encoded)


class KnowledgeAdapter(nn.Module):
    """
    A knowledge adapter: layer `i` reads the backbone's state `backbone_layers[i]` plus what layer `i - 1` gave.

    The two are summed, as the original's code does, where the paper (section 3.1) says concatenated.
    """

    def __init__(self, config: KnowledgeAdapterConfig, backbone_width: int, attn_implementation: str | None = None):
        super().__init__()
        self.config = config
        encoder_config = BertConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            hidden_dropout_prob=config.hidden_dropout_prob,
            attention_probs_dropout_prob=config.attention_probs_dropout_prob,
            layer_norm_eps=config.layer_norm_eps,
            attn_implementation=attn_implementation,
        )
        self.layers = nn.ModuleList(
            KnowledgeAdapterLayer(encoder_config, backbone_width, config.initializer_range)
            for _ in config.backbone_layers
        )

    def forward(
        self,
        hidden_states: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: the backbone's by index, (batch, length, width) each; at least those that are read.
            attention_mask: (batch, length), 1 at real tokens. Not used with `attend_to_padding`.

        Returns:
            (batch, length, width), in the adapter's own dtype and on its device.
        """
        weight = self.layers[0].down_project.weight
        if self.config.attend_to_padding:
            attention_mask = None
        elif attention_mask is not None:
            attention_mask = attention_mask.to(weight.device)
        states = [hidden_states[i].to(device=weight.device, dtype=weight.dtype) for i in self.config.backbone_layers]
        output = self.layers[0](states[0], attention_mask)
        for layer, state in zip(self.layers[1:], states[1:], strict=True):
            output = layer(state + output, attention_mask)
        return output


class KnowledgeFusion(nn.Module):
    """
    Makes one state of the backbone's last (`H`) and the active adapters' outputs (`y_k`).

    `"add"`: `H + Σ y_k`. `"concat"` (paper, section 3.2; `RobertaModelwithAdapter` in the original's
    `examples/run_finetune_*_adapter.py`): `f_k = W_k [H; y_k] + b_k`; with one active adapter the result is `f_1`, with
    several `Σ M_k f_k + b`. `M_k` is kept as one block per adapter, so that adding, removing or activating an adapter
    leaves the others' weights as they are. Without an active adapter the result is `H`.
    """

    def __init__(self, kind: str, names: list[str], width: int):
        super().__init__()
        self.kind = kind
        self.width = width
        if kind == "concat":
            self.states = nn.ModuleDict()
            self.mix = nn.ModuleDict()
            self.bias = nn.Parameter(torch.zeros(width))
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """Makes room for one more adapter; its new weights are for the caller to initialise."""
        if self.kind == "concat":
            self.states[name] = nn.Linear(2 * self.width, self.width)
            self.mix[name] = nn.Linear(self.width, self.width, bias=False)

    def remove(self, name: str) -> None:
        if self.kind == "concat":
            del self.states[name], self.mix[name]

    def forward(self, backbone_state: torch.Tensor, adapter_states: dict[str, torch.Tensor]) -> torch.Tensor:
        """All states (…, width), any leading shape; the result likewise. Without adapters, `backbone_state` itself."""
        if not adapter_states:
            return backbone_state
        if self.kind == "add":
            return sum(adapter_states.values(), start=backbone_state)
        fused = {}
        for name, state in adapter_states.items():
            weight = self.states[name].weight
            both = torch.cat([backbone_state.to(device=weight.device, dtype=weight.dtype), state.to(weight)], dim=-1)
            fused[name] = self.states[name](both)
        if len(fused) == 1:
            return next(iter(fused.values()))
        return sum((self.mix[name](state) for name, state in fused.items()), start=self.bias)
