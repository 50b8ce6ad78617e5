"""
Compares a fine-tuned model on backbones with 8- and 4-bit weights, on rows of its task: size, outputs and metrics.

    pip install torchao bitsandbytes
    python examples/measure_quantization.py typing-model --data test.jsonl
"""

import argparse
import time
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import BitsAndBytesConfig, TorchAoConfig

from kadapter_hf.export import batches_of
from kadapter_hf.predicting import evaluate, load_finetuned, task_of


def quantizations() -> dict[str, dict[str, Any]]:
    """The arguments of `from_pretrained` by name, for what is installed and runs on a CPU."""
    configs: dict[str, Any] = {}
    if find_spec("torchao"):
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8WeightOnlyConfig

        configs["torchao, 8 bits"] = TorchAoConfig(Int8WeightOnlyConfig())
        configs["torchao, 4 bits"] = TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=32))
    if find_spec("bitsandbytes"):
        configs["bitsandbytes, 8 bits"] = BitsAndBytesConfig(load_in_8bit=True)
        configs["bitsandbytes, 4 bits"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    half = {"dtype": torch.bfloat16}  # in float32, torchao's 4-bit kernel for CPUs is slow
    quantized = {name: half | {"quantization_config": config} for name, config in configs.items()}
    return {"float32": {}, "bfloat16": half, **quantized}


def bytes_of(tensor: torch.Tensor) -> int:
    """The size of a tensor; torchao's consist of others."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("model", help="a model that `kadapter finetune` has made, whose backbone is frozen")
    parser.add_argument("--data", required=True, help="rows of its task, with labels")
    parser.add_argument("--metric", default="micro_f1")
    args = parser.parse_args()
    plain, tokenizer = load_finetuned(args.model)
    rows, _ = task_of(plain).read(args.data)
    batches = [dict(batch) for batch in batches_of(plain, tokenizer, args.data)]
    table = Table("backbone", "MB", "ms per row", "mean difference of logits", "largest", args.metric)
    wanted = None
    for name, kwargs in quantizations().items():
        model = type(plain).from_pretrained(args.model, **kwargs)
        started = time.perf_counter()
        logits = torch.cat([model(**batch).logits.float() for batch in batches])
        milliseconds = 1000 * (time.perf_counter() - started) / len(batches)
        wanted = logits if wanted is None else wanted
        differences = (logits - wanted).abs()
        _, metrics = evaluate(model, tokenizer, rows)
        size = sum(map(bytes_of, model.backbone.state_dict().values())) / 1e6
        cells = (differences.mean().item(), differences.max().item(), metrics[args.metric])
        table.add_row(name, f"{size:.1f}", f"{milliseconds:.1f}", *(f"{value:.3f}" for value in cells))
    Console().print(table)


if __name__ == "__main__":
    main()
