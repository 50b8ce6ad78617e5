"""
Time and memory of training and running a K-Adapter of roberta-large's size, beside the original's way and LoRA.

Random weights; the default adapters; batches of 16 texts of 18 to 64 tokens, as T-REx's sentences are. Each row compares two
things in one run: the ratio is what counts, as seconds depend on the machine. Medians over the steps after one for warm-up.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import in_fresh_process, kind_of_machine, machine
from _original import optimizer as original_optimizer
from _setting import (
    BF16,
    FLOAT32,
    LABELS,
    PRECISIONS,
    SMALL,
    WARM_UP,
    Batch,
    Bench,
    Lora,
    Precision,
    collate,
    fused_adamw,
    multiply_adds,
)
from datasets import Dataset
from transformers import logging

from kadapter_hf import KAdapterForRelationClassification
from kadapter_hf.activations import CachedStatesCollator, cached_states
from kadapter_hf.modeling.stacking_kadapter import run_adapters


BASELINES = Path(__file__).parent / "baselines"
WORSE = 0.85  # a ratio below this share of the committed one is marked


# ---- Rows: each yields (name, seconds here, seconds of the baseline, the ratio to reach) ------------------------------

Row = tuple[str, float, float, float | None]


@functools.cache
def original_step(bench: Bench) -> float:
    model = bench.original()
    return bench.seconds(bench.training(model, original_optimizer(model)), bench.batches(padded=True))


@functools.cache
def lora_step(bench: Bench, precision: Precision) -> float:
    model = Lora(bench, bench.dtype(precision.backbone)).train()
    return bench.seconds(bench.training(model, fused_adamw(model), precision.autocast), bench.batches())


@functools.cache
def our_step(bench: Bench, precision: Precision, compiled: bool = False) -> float:
    model = bench.model(dtype=precision.backbone)
    model.train_knowledge_adapter("adapter0", train_head=True)
    model.train()
    if compiled:
        model.compile(dynamic=True)
    return bench.seconds(bench.training(model, fused_adamw(model), precision.autocast), bench.batches())


@functools.cache
def cached_parts(bench: Bench, precision: Precision) -> tuple[float, float]:
    """Seconds per batch for computing and storing the states, and for a step that reads them."""
    model = bench.model(dtype=precision.backbone)
    model.train_knowledge_adapter("adapter0", train_head=True)
    rows = Dataset.from_list(bench.texts[WARM_UP * bench.batch_size :])
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    batches = [by_length[first : first + bench.batch_size] for first in range(0, len(rows), bench.batch_size)]
    step, collator = bench.training(model, fused_adamw(model), precision.autocast), CachedStatesCollator(collate)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.eval()(**bench.batches()[0])  # the warm-up
        bench.wait()
        start = time.perf_counter()
        cached = cached_states(model, rows, collator, folder, batch_size=bench.batch_size)
        bench.wait()
        computing = (time.perf_counter() - start) / len(batches)
        model.train()

        @torch.enable_grad()
        def read_and_train(places: Sequence[int]) -> None:
            batch = collator(cached.__getitems__(places))
            step({name: tensor.to(bench.device) for name, tensor in batch.items()})

        return computing, bench.seconds(read_and_train, 2 * batches)


def cached_epochs(bench: Bench, precision: Precision, epochs: int = 5) -> float:
    """Seconds per batch for all epochs together: the states are computed once and read in each epoch."""
    computing, step = cached_parts(bench, precision)
    return computing + epochs * step


def pretraining(bench: Bench) -> Iterator[Row]:
    for precision in PRECISIONS:
        target = None if precision.autocast else 2.0
        yield f"pre-training step, {precision.label}", our_step(bench, precision), original_step(bench), target


def cached(bench: Bench) -> Iterator[Row]:
    for precision in PRECISIONS:
        ours = cached_epochs(bench, precision)
        yield f"5 epochs of pre-training, cached, {precision.label}", ours, 5 * original_step(bench), 4.5


def beside_lora(bench: Bench) -> Iterator[Row]:
    for precision in PRECISIONS:
        theirs = lora_step(bench, precision)
        yield f"pre-training step beside LoRA's, {precision.label}", our_step(bench, precision), theirs, 2.0
        yield f"5 epochs, cached, beside LoRA's, {precision.label}", cached_epochs(bench, precision), 5 * theirs, 5.0


def fine_tuning(bench: Bench) -> Iterator[Row]:
    baseline = bench.original(adapters=2, trained_backbone=True)
    original = bench.training(baseline, original_optimizer(baseline))
    model = bench.model(adapters=2, fusion="concat")
    model.freeze_knowledge_adapters()
    model.unfreeze_backbone()
    step = bench.training(model.float().train(), fused_adamw(model))
    works = (lambda batches: step(batches[0]), lambda batches: original(batches[1]))
    ours, theirs = bench.seconds_of(works, zip(bench.batches(), bench.batches(padded=True), strict=True))
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
import _setting as setting
from _common import peak_memory, reset_peak
kind, device, batch_size, layers = sys.argv[1:]
bench = setting.Bench(device, 1, int(batch_size), int(layers))
if kind == "lora":
    model = setting.Lora(bench, torch.float32).train()
else:
    model = bench.model(dtype="float32")
    model.train_knowledge_adapter("adapter0", train_head=True)
    model.train()
step = bench.training(model, setting.fused_adamw(model))
batch = setting.collate(bench.texts[:bench.batch_size], setting.LENGTH)
batch = {{name: tensor.to(bench.device) for name, tensor in batch.items()}}
reset_peak(bench.device)
before = peak_memory(bench.device)
step(batch)
print(json.dumps({{"peak": peak_memory(bench.device) - before}}))
"""


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
    for precision in PRECISIONS:
        of_adapter = torch.bfloat16 if precision.autocast else torch.float32
        least = backbone / rate(bench, bench.dtype(precision.backbone)) + 3 * adapter / rate(bench, of_adapter)
        ours = our_step(bench, precision)
        yield f"pre-training step beside its multiply-adds at full rate, {precision.label}", ours, least, None


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


def many_adapters(bench: Bench) -> Iterator[Row]:
    """Without the backbone: with its states."""
    width = bench.backbone().config.hidden_size

    def run(batch: Batch, adapters: dict[str, Any], backward: bool) -> None:
        shape = (*batch["input_ids"].shape, width)
        states = dict.fromkeys(bench.adapter().backbone_layers, torch.ones(shape, device=bench.device))
        read = torch.stack([batch["subject_start"], batch["object_start"]], dim=1)
        with torch.set_grad_enabled(backward):
            outputs = run_adapters(adapters, states, batch["attention_mask"], read)
            if backward:
                torch.stack(list(outputs.values())).sum().backward()
        for adapter in adapters.values():
            adapter.zero_grad()

    for number, kind, sizes in ((8, "", {}), (16, "small ", SMALL), (64, "small ", SMALL)):
        adapters = dict(bench.model(adapters=number, dtype="float32", sizes=sizes).eval().adapters)
        one = {"adapter0": adapters["adapter0"]}
        for backward in (False, True) if sizes else (False,):
            works = [functools.partial(run, adapters=some, backward=backward) for some in (one, adapters)]
            alone, together = bench.seconds_of(works, bench.batches())
            what = f"{number} {kind}adapters, forward{' and backward' if backward else ''}"
            yield f"{what}, beside {number} times one", together, number * alone, 1.0


def sharing_states(bench: Bench, runs: int = 4) -> Iterator[Row]:
    """Several runs on one corpus, such as with other learning rates, share the states of the backbone."""
    model = bench.model(dtype="float32")
    model.train_knowledge_adapter("adapter0", train_head=True)
    model.train()
    frozen = model.backbone

    @torch.no_grad()
    def only_backbone(batch: Batch) -> None:
        frozen(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    step = bench.training(model, fused_adamw(model))
    whole, backbone = bench.seconds_of([step, only_backbone], bench.batches())
    least = runs * (whole - backbone) + backbone
    more = cached_epochs(bench, FLOAT32, runs)
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


def compiled(bench: Bench) -> Iterator[Row]:
    """On a GPU only; compiling takes minutes."""
    if bench.device.type == "cuda":
        step = our_step(bench, BF16, compiled=True)
        yield "pre-training step, --bf16 true --torch_compile true", step, our_step(bench, BF16), None


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
    "compiled": compiled,
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
    parser.add_argument(
        "--output", type=Path, default=Path("bench-output", "speed.json"), help="a file for the figures as JSON"
    )
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
    content = {"machine": machine(), "kind": kind, "batch_size": bench.batch_size, "rows": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
