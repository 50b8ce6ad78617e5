"""Shared by the benchmarks: fresh processes, a description of the machine, Markdown tables."""

import ctypes
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers


def in_fresh_process(script: str, *arguments: str, memory: bool = False) -> dict:
    """
    Runs `script` (Python source whose last line of output is a JSON object) in a new interpreter and returns the object.

    Args:
        memory: return freed memory to the system immediately, so that peaks are comparable; slower.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    if memory:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> str:
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return (
        f"{os.cpu_count()} cores ({name}), Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def kind_of_machine(device: torch.device) -> str:
    """What decides about ratios of times: the model of the GPU, or the processor's widest units for bfloat16 and float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    capabilities = torch.cpu.get_capabilities()
    units = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")
    found = next((unit for unit in units if capabilities.get(unit)), platform.machine())
    return f"{os.cpu_count()}-cores-{found.replace('_', '-')}"


def reset_peak(device: torch.device) -> None:
    """Starts the measurement that `peak_memory` returns; on a CPU, Linux does it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # returns what was freed before to the system
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most memory that was used since `reset_peak`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(f"\nMeasured on: {machine()}.")
