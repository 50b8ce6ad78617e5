"""The memory needed by a conversion, measured in a separate process."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import RobertaConfig, RobertaModel


# A small conversion first, so that all modules are imported before the measurement.
SCRIPT = """
import json, sys
from pathlib import Path
from kadapter_hf.conversion import convert

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

folder = Path(sys.argv[1])
own = {"backbone_weights": folder / "backbone.bin"} if (folder / "backbone.bin").exists() else {}
kwargs = {"layers": [0, 1], "backbone": folder / "backbone"}
convert(folder / "small.bin", folder / "small", **kwargs)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
convert(folder / "large.bin", folder / "large", **kwargs, **own)
print(json.dumps(status("VmHWM") - before))
"""
WIDTH = 1024
BACKBONE = RobertaConfig(hidden_size=WIDTH, num_attention_heads=16, num_hidden_layers=2, vocab_size=20_000)


def linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(rows, columns), f"{name}.bias": torch.randn(rows)}


def checkpoint(hidden: int, inner: int, depth: int) -> dict[str, torch.Tensor]:
    content = linear("com_dense", WIDTH, 2 * WIDTH) | linear("dense", WIDTH, 2 * WIDTH) | linear("out_proj", 9, WIDTH)
    for layer in range(2):
        content |= linear(f"adapter.{layer}.down_project", hidden, WIDTH)
        content |= linear(f"adapter.{layer}.up_project", WIDTH, hidden)
        for number in range(depth):
            inside = f"adapter.{layer}.encoder.layer.{number}"
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                content |= linear(f"{inside}.attention.{part}", hidden, hidden)
            content |= linear(f"{inside}.intermediate.dense", inner, hidden)
            content |= linear(f"{inside}.output.dense", hidden, inner)
            for norm in ("attention.output", "output"):
                content |= {f"{inside}.{norm}.LayerNorm.{kind}": torch.randn(hidden) for kind in ("weight", "bias")}
    return content


def fine_tuned(hidden: int, inner: int, depth: int) -> dict[str, torch.Tensor]:
    content = linear("dense", WIDTH, 2 * WIDTH) | linear("out_proj", 9, WIDTH)
    for name in ("task_dense_lin", "task_dense_fac", "task_dense"):
        content |= linear(name, WIDTH, 2 * WIDTH)
    for adapter in ("fac_adapter", "lin_adapter"):
        parts = checkpoint(hidden, inner, depth).items()
        content |= {f"{adapter}.{name}": tensor for name, tensor in parts if name.startswith("adapter.")}
    return content


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
@pytest.mark.parametrize("model", [False, True], ids=["adapter", "model"])
def test_a_conversion_needs_the_checkpoints_size_and_one_tensor(tmp_path, zipped, model):
    BACKBONE.save_pretrained(tmp_path / "backbone")
    files = {"large": (fine_tuned if model else checkpoint)(768, 3072, 2)}
    if model:
        files["backbone"] = {f"model.{name}": tensor for name, tensor in RobertaModel(BACKBONE).state_dict().items()}
    for name, content in {**files, "small": checkpoint(12, 12, 1)}.items():
        torch.save(content, tmp_path / f"{name}.bin", _use_new_zipfile_serialization=zipped)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needed = json.loads(done.stdout)
    size = sum((tmp_path / f"{name}.bin").stat().st_size for name in files)
    assert size > 120e6
    largest = max(tensor.nbytes for content in files.values() for tensor in content.values())
    print(f"{needed / 1e6:.1f} MB for checkpoints of {size / 1e6:.1f} MB, largest tensor {largest / 1e6:.1f} MB")
    assert needed <= size + largest
