"""
The original's way to train and run, written from its description (the paper, and its scripts' settings), as a baseline.

float32; every text padded to the maximum length; eager attention; all hidden states of the backbone kept; the adapters and
the fusion computed at every position; the two marker states taken by products with one-hot vectors; AdamW one parameter
after the other.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from kadapter_hf import KnowledgeAdapterConfig
from kadapter_hf.modeling.adapters_kadapter import KnowledgeAdapter


class OriginalKAdapter(nn.Module):
    """Relation classification on `[state; adapter]` at the markers before the two entities."""

    def __init__(
        self, backbone: PreTrainedModel, adapters: int, labels: int, layers: list[int], trained_backbone: bool = False
    ):
        super().__init__()
        backbone.set_attn_implementation("eager")
        eager = PreTrainedConfig(attn_implementation="eager")
        width = backbone.config.hidden_size
        self.backbone = backbone.requires_grad_(trained_backbone).train(trained_backbone)
        self.adapters = nn.ModuleList(
            KnowledgeAdapter(KnowledgeAdapterConfig(backbone_layers=layers), width, eager) for _ in range(adapters)
        )
        self.task_dense = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(adapters))
        self.com_dense = nn.Linear(adapters * width, width) if adapters > 1 else nn.Identity()
        self.dense = nn.Linear(2 * width, width)
        self.out_proj = nn.Linear(width, labels)
        if trained_backbone:  # fine-tuning keeps the adapters
            self.adapters.requires_grad_(False).eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        subject_start: torch.Tensor,
        object_start: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        output = self.backbone(input_ids, attention_mask, output_hidden_states=True)
        states = output.last_hidden_state
        of_adapters = [adapter(output.hidden_states, attention_mask) for adapter in self.adapters]
        fused = [
            dense(torch.cat([states, other], -1)) for dense, other in zip(self.task_dense, of_adapters, strict=True)
        ]
        states = self.com_dense(torch.cat(fused, dim=-1))
        ends = []
        for start in (subject_start, object_start):
            one_hot = F.one_hot(start, states.shape[1]).to(states.dtype)
            ends.append((one_hot[:, None] @ states)[:, 0])
        logits = self.out_proj(self.dense(torch.cat(ends, dim=-1)))
        return F.cross_entropy(logits, labels)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, foreach=False, fused=False)
