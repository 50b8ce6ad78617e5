"""
Where the time of a pre-training step goes, by kind of operation, with torch's profiler.

The model and the texts are those of speed.py. "adapter alone" is what a step costs from the second epoch on if the backbone's
states are cached.

    python benchmarks/step_profile.py [--device cuda]
"""

import argparse
import re
from collections.abc import Callable

import torch
from _common import print_table
from _setting import BF16, FLOAT32, PRECISIONS, WARM_UP, Batch, Bench, Precision, fused_adamw
from torch.profiler import ProfilerActivity, profile
from transformers import logging


# The first kind whose pattern an operation's name matches; what is behind the namespace counts.
KINDS = {
    "matrix products": r"(add|b|badd)?mm$|linear|mkldnn|gemm|cutlass|xmma|nvjet",
    "attention": r"attention|attn|fmha|softmax",
    "LayerNorm": r"layer_norm",
    "GELU": r"gelu",
    "dropout": r"dropout|bernoulli|fused_dropout",
    "optimizer and clipping": r"adam|foreach|norm",
    "copies and casts": r"copy|clone|^cat$|stack|index|gather|embedding|fill|zero|contiguous|transpose",
    "sums and products of elements": r"^(add|mul|sum|sub|div|neg|mean|where|masked)|elementwise|reduce",
}
STEPS = 3


def kind_of(operation: str) -> str:
    name = operation.rsplit("::", 1)[-1].lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def shares(work: Callable[[Batch], object], batches: list[Batch]) -> dict[str, float]:
    """The share of each kind of operation in the time of all, without the steps for warm-up."""
    on_gpu = batches[0]["input_ids"].is_cuda
    for batch in batches[:WARM_UP]:
        work(batch)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for batch in batches[WARM_UP:]:
            work(batch)
    spent: dict[str, float] = {}
    for event in found.key_averages():
        seconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[kind_of(event.key)] = spent.get(kind_of(event.key), 0) + seconds
    return {kind: seconds / sum(spent.values()) for kind, seconds in spent.items()}


def whole_step(bench: Bench, precision: Precision) -> dict[str, float]:
    model = bench.model(dtype=precision.backbone)
    model.train_knowledge_adapter("adapter0", train_head=True)
    return shares(bench.training(model.train(), fused_adamw(model), precision.autocast), bench.batches())


def adapter_alone(bench: Bench, precision: Precision) -> dict[str, float]:
    """With states of the right shape, which are not computed."""
    model = bench.model(dtype=precision.backbone)
    model.train_knowledge_adapter("adapter0", train_head=True)
    width = model.config.hidden_size
    batches = bench.batches()
    for batch in batches:
        rows, length = batch["input_ids"].shape
        states = len(model.backbone_states_read())
        batch["backbone_states"] = torch.randn(rows, states, length, width, device=bench.device)
        batch["fusion_states"] = torch.randn(rows, 1, 2, width, device=bench.device)
    return shares(bench.training(model.train(), fused_adamw(model), precision.autocast), batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--layers", type=int, default=24, help="layers of the backbone (default: %(default)s)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    bench = Bench(arguments.device, STEPS, arguments.batch_size, arguments.layers)
    columns = {f"step, {precision.label}": whole_step(bench, precision) for precision in PRECISIONS}
    for precision in (FLOAT32, BF16):
        columns[f"adapter alone, {precision.label}"] = adapter_alone(bench, precision)
    rows = [[kind, *(f"{100 * column.get(kind, 0):.0f}" for column in columns.values())] for kind in (*KINDS, "other")]
    print_table(["% of the time", *columns], rows)


if __name__ == "__main__":
    main()
