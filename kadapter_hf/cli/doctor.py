"""`kadapter doctor`: what kadapter-hf finds on this machine."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ._arguments import AsJson
from ._output import print_json, print_rows, running


if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

PACKAGE = "kadapter-hf"
# What the extras for users are for; their packages are in the package's metadata.
EXTRAS = {
    "app": "`kadapter app`",
    "export": "`kadapter export`",
    "knowledge": "T-REx and CoNLL-U corpora, the metrics of relations, figures",
    "parse": "dependency trees from raw text",
    "peft": "LoRA and other PEFT adapters inside a K-Adapter",
    "search": "the search for hyperparameters in examples/",
    "serve": "the server in examples/serve/",
}


def doctor(as_json: AsJson = False) -> None:
    """
    Show versions, devices, the fastest precision, caches and missing packages of this machine. For bug reports, too.

    The exit code is 1 if a package that is required is missing or too old, else 0.

    Example: `kadapter doctor`
    """
    required = requirements()
    problems = missing(required)
    found: dict[str, Any] = {
        "versions": {PACKAGE: version(PACKAGE), "python": platform.python_version(), "system": platform.platform()}
        | {one.name: installed(one.name) for one in required},
        "problems": problems,
        "extras": {
            extra: {"for": purpose, "missing": missing(requirements(extra))} for extra, purpose in EXTRAS.items()
        },
    }
    if not problems:
        with running():
            found |= {"devices": devices(), "precision": precision(), "hub": hub(), "caches": caches()}
    if as_json:
        print_json(found)
    else:
        show(found)
    raise typer.Exit(1 if problems else 0)


# ---- Packages -------------------------------------------------------------------------------------------------------


def requirements(extra: str = "") -> list["Requirement"]:
    """The requirements in the package's metadata that apply to this machine: those of an extra, or the general ones."""
    from packaging.requirements import Requirement

    return [
        one
        for one in map(Requirement, requires(PACKAGE) or ())
        if ("extra" in str(one.marker)) == bool(extra)
        and (one.marker is None or one.marker.evaluate({"extra": extra}))
    ]


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def missing(wanted: list["Requirement"]) -> list[str]:
    """The requirements that are not met, each with the installed version."""
    unmet = []
    for one in wanted:
        there = installed(one.name)
        if there is None:
            unmet.append(f"{one.name} is not installed")
        elif not one.specifier.contains(there, prereleases=True):
            unmet.append(f"{one.name} {there} is installed, and {one.name}{one.specifier} is required")
    return unmet


# ---- Machine --------------------------------------------------------------------------------------------------------


def devices() -> list[dict[str, Any]]:
    """The processor, and the accelerators that torch can use."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    found = [
        {
            "device": "cpu",
            "name": f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
            "memory": memory.total,
            "free": memory.available,
        }
    ]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        found.append({"device": f"cuda:{number}", "name": name, "memory": total, "free": free})
    if (other := training_device().type) not in ("cpu", "cuda"):
        found.append({"device": other, "name": other, "memory": None, "free": None})
    return found


def training_device() -> "torch.device":
    """The accelerator that torch can use, otherwise the processor."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def precision() -> dict[str, str]:
    """The data type that `--backbone_dtype auto` takes on the device that models train on."""
    from kadapter_hf.precision import fast_dtype

    device = training_device()
    dtype, reason = fast_dtype(device)
    return {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "reason": reason}


def hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    return {
        "endpoint": constants.ENDPOINT,
        "offline": constants.HF_HUB_OFFLINE,
        "logged_in": get_token() is not None,
    }


def caches() -> list[dict[str, Any]]:
    """The folders in which the libraries keep what they download and prepare, their sizes, and the free disk there."""
    from datasets import config
    from huggingface_hub import constants
    from transformers.utils import HF_MODULES_CACHE

    folders = {
        "models and data of the Hub": constants.HF_HUB_CACHE,
        "prepared data sets": config.HF_DATASETS_CACHE,
        "code of repositories": HF_MODULES_CACHE,
    }
    return [
        {"content": content, "path": str(path), "bytes": size_of(Path(path)), "free": free_at(Path(path))}
        for content, path in folders.items()
    ]


def size_of(folder: Path) -> int:
    """The bytes of all files. Links, which the Hub's cache is full of, are not followed."""
    return sum(os.lstat(os.path.join(root, file)).st_size for root, _, files in os.walk(folder) for file in files)


def free_at(folder: Path) -> int:
    """The free bytes of the disk that a folder is on or would be on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ---- Output ---------------------------------------------------------------------------------------------------------


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.filesize import decimal

    console = Console(soft_wrap=True)
    print_rows(console, "versions", {name: number or "missing" for name, number in found["versions"].items()})
    if found["problems"]:
        for problem in found["problems"]:
            console.print(problem, markup=False, highlight=False)
    else:
        for_devices = {device["device"]: device_words(device) for device in found["devices"]}
        chosen = found["precision"]
        print_rows(console, "devices", for_devices | {"fast precision": f"{chosen['dtype']}: {chosen['reason']}"})
        state = [
            found["hub"]["endpoint"],
            "logged in" if found["hub"]["logged_in"] else "not logged in (hf auth login)",
        ]
        state += ["offline"] if found["hub"]["offline"] else []
        rows = {"Hub": ", ".join(state)}
        for cache in found["caches"]:
            rows[cache["content"]] = f"{decimal(cache['bytes'])} in {cache['path']}; {decimal(cache['free'])} free"
        print_rows(console, "Hub and caches", rows)
    rows = {}
    for name, extra in found["extras"].items():
        advice = f"{'; '.join(extra['missing'])}: pip install '{PACKAGE}[{name}]'" if extra["missing"] else "installed"
        rows[name] = f"{extra['for']}: {advice}"
    print_rows(console, "extras", rows)


def device_words(device: dict[str, Any]) -> str:
    from rich.filesize import decimal

    if device["memory"] is None:
        return device["name"]
    return f"{device['name']}, {decimal(device['memory'])} of memory, {decimal(device['free'])} free"
