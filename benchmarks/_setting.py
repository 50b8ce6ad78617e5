"""The model, the texts and the baselines of the benchmarks of speed."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from _original import OriginalKAdapter
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, RobertaModel

from kadapter_hf import KAdapterConfig, KAdapterForRelationClassification, KnowledgeAdapterConfig
from kadapter_hf.precision import cast_backbone, fast_dtype


LABELS, LENGTH, SHORTEST, WARM_UP = 430, 64, 18, 1
# The sizes of a small adapter, such as those of the partitions of MoP.
SMALL = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 256, "num_hidden_layers": 1}
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Precision:
    """`backbone` is what --backbone_dtype takes; with `autocast`, the adapters compute in bfloat16 too."""

    label: str
    backbone: str
    autocast: bool = False


FLOAT32, BF16 = Precision("all in float32", "float32"), Precision("--bf16 true", "auto", autocast=True)
PRECISIONS = (FLOAT32, Precision("default", "auto"), BF16)


class Bench:
    """What all rows share: the device, the sizes, and the texts."""

    def __init__(self, device: str, steps: int, batch_size: int, layers: int):
        self.device, self.steps, self.batch_size, self.layers = torch.device(device), steps, batch_size, layers
        generator = torch.Generator().manual_seed(0)
        count = batch_size * (steps + WARM_UP)
        lengths = torch.randint(SHORTEST, LENGTH + 1, (count,), generator=generator).tolist()
        self.texts = [self.text(length, generator) for length in lengths]

    def text(self, length: int, generator: torch.Generator) -> dict[str, Any]:
        places = torch.randperm(length, generator=generator)[:2].tolist()
        ids = torch.randint(5, 50_000, (length,), generator=generator).tolist()
        label = torch.randint(0, LABELS, (1,), generator=generator).item()
        return {"input_ids": ids, "subject_start": places[0], "object_start": places[1], "labels": label}

    def batches(self, padded: bool = False) -> list[Batch]:
        """The texts in batches: padded to the maximum length, or of similar length and padded to the longest of each."""
        texts = self.texts if padded else sorted(self.texts, key=lambda text: len(text["input_ids"]))
        made = [
            collate(texts[start : start + self.batch_size], LENGTH if padded else None)
            for start in range(0, len(texts), self.batch_size)
        ]
        order = torch.randperm(len(made), generator=torch.Generator().manual_seed(1)).tolist()
        return [{name: tensor.to(self.device) for name, tensor in made[place].items()} for place in order]

    def backbone(self) -> PreTrainedModel:
        config = KAdapterConfig().backbone_config
        config.num_hidden_layers = self.layers
        torch.manual_seed(0)
        with self.device:
            return RobertaModel(config, add_pooling_layer=False)

    def dtype(self, name: str) -> torch.dtype:
        return fast_dtype(self.device)[0] if name == "auto" else getattr(torch, name)

    def adapter(self, **fields) -> KnowledgeAdapterConfig:
        return KnowledgeAdapterConfig(backbone_layers=[0, self.layers // 2 - 1, self.layers - 2], **fields)

    def model(
        self,
        adapters: int = 1,
        dtype: str = "auto",
        model_class: Any = KAdapterForRelationClassification,
        sizes: Mapping[str, int] = MappingProxyType({}),
        **fields,
    ) -> Any:
        """With a frozen backbone in `dtype`; `sizes` are those of the adapters, by default the paper's."""
        made = model_class.from_backbone(
            self.backbone(),
            {f"adapter{number}": self.adapter(**sizes) for number in range(adapters)},
            **{"num_labels": LABELS, "fusion": "add"} | fields,
        )
        made = made.to(self.device)
        cast_backbone(made, dtype, self.device)
        return made

    def original(self, adapters: int = 1, trained_backbone: bool = False) -> OriginalKAdapter:
        layers = self.adapter().backbone_layers
        return OriginalKAdapter(self.backbone(), adapters, LABELS, layers, trained_backbone).to(self.device)

    def seconds(self, work: Callable[[Any], object], batches: Iterable[Any]) -> float:
        """The median time of `work` on a batch."""
        return self.seconds_of([work], batches)[0]

    def seconds_of(self, works: Sequence[Callable[[Any], object]], batches: Iterable[Any]) -> list[float]:
        """The median time of each, which take turns on the batches, so that their differences mean something."""
        times: list[list[float]] = [[] for _ in works]
        batches = list(batches)
        if self.device.type == "cuda":  # bfloat16 attention prepares itself for each length, which takes up to 0.3 s
            for batch in batches:
                for work in works:
                    work(batch)
        for batch in batches:
            for work, found in zip(works, times, strict=True):
                self.wait()
                start = time.perf_counter()
                work(batch)
                self.wait()
                found.append(time.perf_counter() - start)
        return [statistics.median(found[WARM_UP:]) for found in times]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def training(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, autocast: bool = False
    ) -> Callable[[Batch], None]:
        """A step of training, with the clipping of gradients that Trainer does."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def step(batch: Batch) -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                output = model(**batch)
            loss = output if torch.is_tensor(output) else output.loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step


def collate(texts: list[dict[str, Any]], length: int | None = None) -> Batch:
    width = length or max(len(text["input_ids"]) for text in texts)
    ids, mask = torch.ones(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text["input_ids"])] = torch.tensor(text["input_ids"])
        mask[row, : len(text["input_ids"])] = 1
    numbers = {name: torch.tensor([text[name] for text in texts]) for name in texts[0] if name != "input_ids"}
    return {"input_ids": ids, "attention_mask": mask, **numbers}


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """What Trainer uses by default."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


class Lora(nn.Module):
    """LoRA on the queries and values of the same backbone, with the same kind of head on its last state."""

    def __init__(self, bench: Bench, dtype: torch.dtype):
        from peft import LoraConfig, get_peft_model

        super().__init__()
        backbone = bench.backbone().to(dtype)
        width = backbone.config.hidden_size
        self.backbone = get_peft_model(backbone, LoraConfig(r=8, target_modules=["query", "value"]))
        self.dense, self.out_proj = nn.Linear(2 * width, width), nn.Linear(width, LABELS)
        self.to(bench.device)

    def forward(self, subject_start: torch.Tensor, object_start: torch.Tensor, labels: torch.Tensor, **inputs):
        states = self.backbone(**inputs).last_hidden_state
        rows = torch.arange(len(labels), device=labels.device)[:, None]
        pair = states[rows, torch.stack([subject_start, object_start], dim=1)].flatten(1)
        return F.cross_entropy(self.out_proj(self.dense(pair.to(self.dense.weight.dtype))), labels)


def multiply_adds(batch: Batch, bench: Bench, adapters: int, read: int) -> tuple[float, float]:
    """Those of the backbone, and those of the adapters if the head reads `read` positions, for one batch."""
    rows, length = batch["input_ids"].shape
    config, adapter = KAdapterConfig().backbone_config, bench.adapter()
    width, inner, tokens = config.hidden_size, adapter.hidden_size, rows * length

    def layer(size: int, feed_forward: int, queries: int) -> float:
        keys_and_values = tokens * 2 * size**2
        return keys_and_values + queries * (2 * size**2 + 2 * size * feed_forward + 2 * length * size)

    backbone = bench.layers * layer(width, config.intermediate_size, tokens)
    number = len(adapter.backbone_layers) * adapter.num_hidden_layers
    inside = (number - 1) * layer(inner, adapter.intermediate_size, tokens)
    inside += layer(inner, adapter.intermediate_size, rows * read)
    projections = width * inner * (tokens * (2 * len(adapter.backbone_layers) - 1) + rows * read)
    return backbone, adapters * (inside + projections)
