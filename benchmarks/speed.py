"""
Time and memory of training and running a K-Adapter of roberta-large's size, beside the original's way and LoRA.

Random weights; the default adapters; batches of 16 texts of 18 to 64 tokens, as T-REx's sentences are. Each row compares two
things in one run: the ratio is what counts, as seconds depend on the machine. Medians over the steps after two for warm-up.
Writes the figures to --output as JSON, and compares the ratios with those committed for the same kind of machine.

    python benchmarks/speed.py [--device cuda] [--rows pretraining lora …]
"""

import argparse
import functools
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from _common import in_fresh_process, kind_of_machine, machine, peak_memory, reset_peak  # noqa: F401
from _original import OriginalKAdapter, optimizer as original_optimizer
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, RobertaModel, logging

from kadapter_hf import KAdapterConfig, KAdapterForRelationClassification, KnowledgeAdapterConfig
from kadapter_hf.activations import ROW, CachedActivationsCollator, cached_activations
from kadapter_hf.precision import cast_backbone, fast_dtype


LABELS, LENGTH, SHORTEST, WARM_UP = 430, 64, 18, 2
BASELINES = Path(__file__).parent / "baselines"
WORSE = 0.85  # a ratio below this share of the committed one is marked
Batch = dict[str, torch.Tensor]


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
        return RobertaModel(config, add_pooling_layer=False).to(self.device)

    def dtype(self, name: str) -> torch.dtype:
        return fast_dtype(self.device)[0] if name == "auto" else getattr(torch, name)

    def adapter(self, **fields) -> KnowledgeAdapterConfig:
        return KnowledgeAdapterConfig(backbone_layers=[0, self.layers // 2 - 1, self.layers - 2], **fields)

    def model(
        self, adapters: int = 1, dtype: str = "auto", model_class: Any = KAdapterForRelationClassification, **fields
    ) -> Any:
        """With a frozen backbone in `dtype`."""
        made = model_class.from_backbone(
            self.backbone(),
            {f"adapter{number}": self.adapter() for number in range(adapters)},
            **{"num_labels": LABELS, "fusion": "add"} | fields,
        )
        made = made.to(self.device)
        cast_backbone(made, dtype, self.device)
        return made

    def original(self, adapters: int = 1, trained_backbone: bool = False) -> OriginalKAdapter:
        layers = self.adapter().backbone_layers
        return OriginalKAdapter(self.backbone(), adapters, LABELS, layers, trained_backbone).to(self.device)

    def seconds(self, work: Callable[[Batch], object], batches: Iterable[Batch]) -> float:
        """The median time of `work` on a batch."""
        times, batches = [], list(batches)
        if self.device.type == "cuda":  # bfloat16 attention prepares itself for each length, which takes up to 0.3 s
            for batch in batches:
                work(batch)
        for batch in batches:
            self.wait()
            start = time.perf_counter()
            work(batch)
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[WARM_UP:])

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


# ---- Rows: each yields (name, seconds here, seconds of the baseline, the ratio to reach) ------------------------------

Row = tuple[str, float, float, float | None]


@functools.cache
def original_step(bench: Bench) -> float:
    model = bench.original()
    return bench.seconds(bench.training(model, original_optimizer(model)), bench.batches(padded=True))


@functools.cache
def lora_step(bench: Bench, dtype: str) -> float:
    model = Lora(bench, bench.dtype(dtype)).train()
    return bench.seconds(bench.training(model, fused_adamw(model)), bench.batches())


@functools.cache
def our_step(bench: Bench, dtype: str, autocast: bool = False, compiled: bool = False) -> float:
    model = bench.model(dtype=dtype)
    model.train_knowledge_adapter("adapter0", train_head=True)
    model.train()
    if compiled:
        model.compile(dynamic=True)
    return bench.seconds(bench.training(model, fused_adamw(model), autocast), bench.batches())


@functools.cache
def cached_epochs(bench: Bench, dtype: str, epochs: int = 5) -> float:
    """Seconds per step and epoch, all in: the states are computed once and read in each epoch."""
    model = bench.model(dtype=dtype)
    model.train_knowledge_adapter("adapter0", train_head=True)
    rows = Dataset.from_list(bench.texts[WARM_UP * bench.batch_size :])
    step = bench.training(model, fused_adamw(model))
    with tempfile.TemporaryDirectory() as folder:
        collator = CachedActivationsCollator(collate, None)  # type: ignore[arg-type]
        bench.wait()
        start = time.perf_counter()
        collator.cache = cached_activations(model, rows, Padding(), folder, model.backbone.dtype, bench.batch_size)
        by_length = sorted(range(len(rows)), key=lambda row: len(bench.texts[row]["input_ids"]))
        model.train()
        for _ in range(epochs):
            for first in range(0, len(rows), bench.batch_size):
                places = by_length[first : first + bench.batch_size]
                batch = collator([{**rows[place], ROW: place} for place in places])
                step({name: tensor.to(bench.device) for name, tensor in batch.items()})
        bench.wait()
        seconds = time.perf_counter() - start
    return seconds / bench.steps


class Padding:
    """The part of a tokenizer that the cache uses."""

    padding_side = "right"

    def pad(self, rows: list[dict[str, Any]], **kwargs) -> Batch:
        return collate(rows)


def pretraining(bench: Bench) -> Iterator[Row]:
    for dtype, label in (("float32", "all in float32"), ("auto", "default")):
        yield f"pre-training step, {label}", our_step(bench, dtype), original_step(bench), 2.0
    yield "pre-training step, --bf16", our_step(bench, "auto", autocast=True), original_step(bench), None
    if bench.device.type == "cuda":
        compiled = our_step(bench, "auto", autocast=True, compiled=True)
        yield "pre-training step, --bf16 --torch_compile", compiled, original_step(bench), None


def cached(bench: Bench) -> Iterator[Row]:
    for dtype, label in (("float32", "all in float32"), ("auto", "default")):
        yield f"5 epochs of pre-training, cached, {label}", cached_epochs(bench, dtype), 5 * original_step(bench), 4.5


def beside_lora(bench: Bench) -> Iterator[Row]:
    for dtype, label in (("float32", "all in float32"), ("auto", "same dtype of the backbone")):
        yield f"pre-training step beside LoRA's, {label}", our_step(bench, dtype), lora_step(bench, dtype), 2.0
        yield (
            f"5 epochs, cached, beside LoRA's, {label}",
            cached_epochs(bench, dtype),
            5 * lora_step(bench, dtype),
            5.0,
        )


def fine_tuning(bench: Bench) -> Iterator[Row]:
    baseline = bench.original(adapters=2, trained_backbone=True)
    theirs = bench.seconds(bench.training(baseline, original_optimizer(baseline)), bench.batches(padded=True))
    del baseline
    model = bench.model(adapters=2, fusion="concat")
    model.freeze_knowledge_adapters()
    model.unfreeze_backbone()
    model.float().train()
    ours = bench.seconds(bench.training(model, fused_adamw(model)), bench.batches())
    yield "fine-tuning step, backbone trained", ours, theirs, 1.5


def memory(bench: Bench) -> Iterator[Row]:
    """In GB, above the weights; on a CPU, Linux counts it."""
    arguments = (str(bench.device), str(bench.batch_size), str(bench.layers))
    ours, theirs = (in_fresh_process(PEAK, kind, *arguments, memory=True)["peak"] for kind in ("kadapter", "lora"))
    yield "peak memory of a pre-training step beside LoRA's, all in float32, GB", ours / 1e9, theirs / 1e9, 2.0


PEAK = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import speed
kind, device, batch_size, layers = sys.argv[1:]
bench = speed.Bench(device, 1, int(batch_size), int(layers))
if kind == "lora":
    model = speed.Lora(bench, torch.float32).train()
else:
    model = bench.model(dtype="float32")
    model.train_knowledge_adapter("adapter0", train_head=True)
    model.train()
step = bench.training(model, speed.fused_adamw(model))
batch = speed.collate(bench.texts[:bench.batch_size], speed.LENGTH)
batch = {{name: tensor.to(bench.device) for name, tensor in batch.items()}}
speed.reset_peak(bench.device)
before = speed.peak_memory(bench.device)
step(batch)
print(json.dumps({{"peak": speed.peak_memory(bench.device) - before}}))
"""


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


@functools.cache
def rate(bench: Bench, dtype: torch.dtype) -> float:
    """The multiply-adds per second of a large product of matrices."""
    size = 8192 if bench.device.type == "cuda" else 2048
    one, other = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    return size**3 / bench.seconds(lambda _: one @ other, [{}] * (5 + WARM_UP))


def limit(bench: Bench) -> Iterator[Row]:
    """The multiply-adds of a step, at the rates of large products: the backbone forward, the adapter forward and backward."""
    batches = bench.batches()[WARM_UP:]
    counts = [multiply_adds(batch, bench, adapters=1, read=2) for batch in batches]
    backbone, adapter = (statistics.median(part) for part in zip(*counts, strict=True))
    for dtype, label in (("float32", "all in float32"), ("auto", "default")):
        least = backbone / rate(bench, bench.dtype(dtype)) + 3 * adapter / rate(bench, torch.float32)
        yield f"pre-training step beside its multiply-adds at full rate, {label}", our_step(bench, dtype), least, None
    least = (backbone + 3 * adapter) / rate(bench, torch.bfloat16)
    ours = our_step(bench, "auto", autocast=True)
    yield "pre-training step beside its multiply-adds at full rate, --bf16", ours, least, None


@torch.no_grad()
def forward(bench: Bench) -> Iterator[Row]:
    model = bench.model(adapters=2, dtype="float32", fusion="concat").eval()
    batches = bench.batches()
    ours = bench.seconds(lambda batch: model(**batch), batches)
    names = ("input_ids", "attention_mask")
    alone = bench.seconds(lambda batch: model.backbone(**{name: batch[name] for name in names}), batches)
    shares = [multiply_adds(batch, bench, adapters=2, read=2) for batch in batches[WARM_UP:]]
    least = alone * statistics.median((backbone + adapters) / backbone for backbone, adapters in shares)
    yield "forward, two adapters, beside its multiply-adds at the backbone's speed", ours, least, 1 / 1.1


@torch.no_grad()
def many_adapters(bench: Bench) -> Iterator[Row]:
    model = bench.model(adapters=8, dtype="float32").eval()
    batches = bench.batches()
    names = list(model.adapters)
    times = {}
    for count in (0, 1, 8):
        model.set_active_knowledge_adapters(names[:count])
        times[count] = bench.seconds(lambda batch: model(**batch), batches)
    yield "8 adapters, forward, beside 8 times one", times[8] - times[0], 8 * (times[1] - times[0]), 1.0


def sharing_states(bench: Bench, runs: int = 4) -> Iterator[Row]:
    """Several runs on one corpus, such as with other learning rates, share the states of the backbone."""
    more = cached_epochs(bench, "float32", runs)
    whole = our_step(bench, "float32")
    model = bench.model(dtype="float32").eval()
    with torch.no_grad():
        names = ("input_ids", "attention_mask")
        backbone = bench.seconds(
            lambda batch: model.backbone(**{name: batch[name] for name in names}), bench.batches()
        )
    least = runs * (whole - backbone) + backbone
    yield f"{runs} runs that share the cached states, beside {runs} adapters and one backbone", more, least, 1 / 1.1


def positions(bench: Bench) -> Iterator[Row]:
    """Forward and backward of an adapter whose head reads two positions, beside all positions."""
    adapter = bench.model(dtype="float32").adapters["adapter0"].train()
    width = bench.backbone().config.hidden_size

    def run(batch: Batch, places: torch.Tensor | None) -> None:
        shape = (*batch["input_ids"].shape, width)
        states = dict.fromkeys(adapter.config.backbone_layers, torch.ones(shape, device=bench.device))
        adapter(states, batch["attention_mask"], places).sum().backward()
        adapter.zero_grad()

    def two(batch: Batch) -> None:
        run(batch, torch.stack([batch["subject_start"], batch["object_start"]], dim=1))

    ours, all_of_them = (
        bench.seconds(two, bench.batches()),
        bench.seconds(lambda batch: run(batch, None), bench.batches()),
    )
    yield "an adapter's forward and backward, two positions read, beside all", ours, all_of_them, None


def saving(bench: Bench) -> Iterator[Row]:
    """A second save of a training, beside writing as many bytes."""
    with tempfile.TemporaryDirectory() as folder:
        bench.backbone().save_pretrained(f"{folder}/backbone")
        model = KAdapterForRelationClassification.from_backbone(
            f"{folder}/backbone", {"adapter0": bench.adapter()}, num_labels=LABELS
        )
        model.train_knowledge_adapter("adapter0", train_head=True)
        model.save_pretrained(f"{folder}/first")
        times, sizes = [], 0
        for number in range(3):
            with torch.no_grad():
                model.out_proj.weight += 1
                model.adapters["adapter0"].layers[0].down_project.weight += 1
            start = time.perf_counter()
            model.save_pretrained(f"{folder}/{number}")
            times.append(time.perf_counter() - start)
            sizes = sum(path.stat().st_size for path in Path(folder, str(number)).rglob("*") if path.is_file())
        content, writes = bytes(sizes), []
        for number in range(3):
            start = time.perf_counter()
            with open(f"{folder}/bytes{number}", "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            writes.append(time.perf_counter() - start)
    yield (
        "a save while training, beside writing its files",
        statistics.median(times),
        statistics.median(writes),
        1 / 1.5,
    )


ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "pretraining": pretraining,
    "cached": cached,
    "lora": beside_lora,
    "memory": memory,
    "limit": limit,
    "fine-tuning": fine_tuning,
    "forward": forward,
    "adapters": many_adapters,
    "runs": sharing_states,
    "positions": positions,
    "saving": saving,
}


def committed(kind: str) -> dict[str, float]:
    """The ratios of an earlier version on this kind of machine, by row."""
    path = BASELINES / f"{kind}.json"
    found = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return {row["name"]: row["ratio"] for row in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each kind (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--layers", type=int, default=24, help="layers of the backbone (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which rows (default: all)")
    parser.add_argument("--output", type=Path, help="a file for the figures as JSON")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench(arguments.device, arguments.steps, arguments.batch_size, arguments.layers)
    kind = kind_of_machine(bench.device)
    earlier, rows = committed(kind), []
    print(
        f"{kind}: {machine()}\n\n| | here, s | baseline, s | ratio | to reach | earlier |\n|---|---|---|---|---|---|"
    )
    for name in arguments.rows:
        for label, ours, theirs, target in ROWS[name](bench):
            ratio = theirs / ours
            before = earlier.get(label)
            worse = " (worse)" if before is not None and ratio < WORSE * before else ""
            cells = [f"{ours:.3g}", f"{theirs:.3g}", f"{ratio:.2f}{worse}"]
            cells += [f"{number:.2f}" if number is not None else "–" for number in (target, before)]
            print(f"| {label} | {' | '.join(cells)} |", flush=True)
            rows.append({"name": label, "here": ours, "baseline": theirs, "ratio": ratio, "to_reach": target})
            gc.collect()
    if arguments.output:
        content = {"machine": machine(), "kind": kind, "batch_size": bench.batch_size, "rows": rows}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
