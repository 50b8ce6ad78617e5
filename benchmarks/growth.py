"""
Time and memory of a pre-training step as the work grows: more adapters, longer texts, a larger corpus.

A backbone of roberta-large's width with --layers layers and random weights. Draws the figure of docs/performance.md.

    python benchmarks/growth.py [--output growth.png]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import torch
from _common import peak_memory, print_table, reset_peak
from _setting import Batch, Bench, collate, fused_adamw
from transformers import logging


def measured(bench: Bench, adapters: int, length: int, steps: int = 1) -> tuple[float, float]:
    """Seconds, and GB above the weights, of this many steps on texts of one length."""
    model = bench.model(adapters=adapters, dtype="float32")
    model.train()
    optimizer = fused_adamw(model)
    step = bench.training(model, optimizer)
    generator = torch.Generator().manual_seed(0)
    texts = [bench.text(length, generator) for _ in range(bench.batch_size)]
    batch: Batch = {name: tensor.to(bench.device) for name, tensor in collate(texts).items()}

    def work(batch: Batch) -> None:
        for _ in range(steps):
            step(batch)

    step(batch)  # which makes the optimizer's state, part of the weights here
    reset_peak(bench.device)
    before = peak_memory(bench.device)
    seconds = bench.seconds(work, [batch] * (bench.steps + 1))
    return seconds, (peak_memory(bench.device) - before) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--output", type=Path, help="the figure")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench(arguments.device, 3, arguments.batch_size, arguments.layers)
    series: dict[str, tuple[list[int], Callable[[int], tuple[float, float]]]] = {
        "adapters": ([1, 2, 4, 8], lambda adapters: measured(bench, adapters, 64)),
        "tokens of a text": ([32, 64, 128, 256, 512], lambda length: measured(bench, 1, length)),
        "steps, as the corpus grows": ([1, 2, 5, 10], lambda steps: measured(bench, 1, 64, steps)),
    }
    rows, figure = [], matplotlib.figure.Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (name, (sizes, measure)) in zip(figure.subplots(1, 3), series.items(), strict=True):
        found = [measure(size) for size in sizes]
        rows += [
            [name, str(size), f"{time:.2f}", f"{space:.2f}"] for size, (time, space) in zip(sizes, found, strict=True)
        ]
        axes.plot(sizes, [time for time, _ in found], marker="o", label="seconds")
        axes.plot(sizes, [space for _, space in found], marker="s", label="GB above the weights")
        axes.set(xlabel=name, ylim=(0, None), xlim=(0, None))
        axes.legend(fontsize="small")
    print_table(["", "number", "seconds", "GB above the weights"], rows)
    if arguments.output:
        figure.savefig(arguments.output, dpi=120)


if __name__ == "__main__":
    main()
