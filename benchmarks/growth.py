"""
Time and memory of a pre-training step as the work grows: more adapters, more small adapters, longer texts, a larger corpus.

A backbone of roberta-large's width with --layers layers and random weights; all adapters train. Each point is measured in a
process of its own. Draws the figure of docs/performance.md.

    python benchmarks/growth.py [--output bench-output/growth.png]
"""

import argparse
import json
from pathlib import Path

import matplotlib.figure
import torch
from _common import in_fresh_process, peak_memory, print_table, reset_peak
from _setting import SMALL, Batch, Bench, collate, fused_adamw
from rich.progress import track
from transformers import logging


REPETITIONS = 3
STANDARD = {"adapters": 1, "small": False, "length": 64, "steps": 1}
# By what grows: its sizes, and the arguments of `measure`.
SERIES = {
    "adapters": [(number, {"adapters": number}) for number in (1, 2, 4, 8)],
    "small adapters": [(number, {"adapters": number, "small": True}) for number in (1, 4, 16, 64)],
    "tokens of a text": [(length, {"length": length}) for length in (32, 64, 128, 256, 512)],
    "steps, as the corpus grows": [(steps, {"steps": steps}) for steps in (1, 2, 5, 10)],
}


def measure(
    device: str, layers: int, batch_size: int, adapters: int, small: bool, length: int, steps: int
) -> dict[str, float]:
    """Seconds, and GB above the weights, of this many steps on texts of one length."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench(device, REPETITIONS, batch_size, layers)
    model = bench.model(adapters=adapters, dtype="float32", sizes=SMALL if small else {})
    model.train()
    step = bench.training(model, fused_adamw(model))
    generator = torch.Generator().manual_seed(0)
    texts = [bench.text(length, generator) for _ in range(bench.batch_size)]
    batch: Batch = {name: tensor.to(bench.device) for name, tensor in collate(texts).items()}

    def work(batch: Batch) -> None:
        for _ in range(steps):
            step(batch)

    reset_peak(bench.device)
    before = peak_memory(bench.device)
    work(batch)
    space = (peak_memory(bench.device) - before) / 1e9
    return {"seconds": bench.seconds(work, [batch] * (REPETITIONS + 1)), "space": space}


POINT = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from growth import measure
print(json.dumps(measure(**json.loads(sys.argv[1]))))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("bench-output", "growth.png"), help="the figure")
    arguments = parser.parse_args()
    setting = STANDARD | {name: getattr(arguments, name) for name in ("device", "layers", "batch_size")}
    points = [(name, size, json.dumps(setting | kwargs)) for name, sizes in SERIES.items() for size, kwargs in sizes]
    distinct = list(dict.fromkeys(point for *_, point in points))
    measured = {point: in_fresh_process(POINT, point) for point in track(distinct, "growth")}
    found: dict[str, list[tuple[int, float, float]]] = {name: [] for name in SERIES}
    for name, size, point in points:
        found[name].append((size, measured[point]["seconds"], measured[point]["space"]))
    figure = matplotlib.figure.Figure(figsize=(13, 3.2), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(SERIES)), found.items(), strict=True):
        sizes, seconds, spaces = zip(*values, strict=True)
        axes.plot(sizes, seconds, marker="o", label="seconds")
        axes.plot(sizes, spaces, marker="s", label="GB above the weights")
        axes.set(xlabel=name, ylim=(0, None), xlim=(0, None))
        axes.legend(fontsize="small")
    rows = [[name, str(size), f"{s:.2f}", f"{gb:.2f}"] for name, values in found.items() for size, s, gb in values]
    print_table(["", "number", "seconds", "GB above the weights"], rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=100)


if __name__ == "__main__":
    main()
