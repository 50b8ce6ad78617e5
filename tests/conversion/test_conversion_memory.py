"""What a conversion needs of memory, in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import RobertaConfig


# A small conversion first, so that what is imported on the way is there before the measurement.
SCRIPT = """
import json, sys
from pathlib import Path
from kadapter_hf.conversion import convert

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

folder = Path(sys.argv[1])
backbone = folder / "backbone"
convert(folder / "small.bin", folder / "small", layers=[0, 1], backbone=backbone)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
convert(folder / "large.bin", folder / "large", layers=[0, 1], backbone=backbone)
print(json.dumps(status("VmHWM") - before))
"""
WIDTH = 1024


def checkpoint(hidden: int, inner: int, depth: int) -> dict[str, torch.Tensor]:
    def linear(name, rows, columns):
        return {f"{name}.weight": torch.randn(rows, columns), f"{name}.bias": torch.randn(rows)}

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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
def test_a_conversion_needs_the_checkpoints_size_and_one_tensor(tmp_path, zipped, record_property):
    RobertaConfig(hidden_size=WIDTH, num_attention_heads=16, num_hidden_layers=2).save_pretrained(
        tmp_path / "backbone"
    )
    large = checkpoint(768, 3072, 2)
    for name, content in (("small", checkpoint(12, 12, 1)), ("large", large)):
        torch.save(content, tmp_path / f"{name}.bin", _use_new_zipfile_serialization=zipped)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needed, size = json.loads(done.stdout), (tmp_path / "large.bin").stat().st_size
    assert size > 120e6
    largest = max(tensor.numel() * tensor.element_size() for tensor in large.values())
    record_property("needed / size", needed / size)
    print(f"{needed / 1e6:.1f} MB for a checkpoint of {size / 1e6:.1f} MB, largest tensor {largest / 1e6:.1f} MB")
    assert needed <= size + largest
