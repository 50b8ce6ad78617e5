"""Training in separate processes: killed and resumed, and distributed."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights, free_port, load_script, small_adapter
from transformers import set_seed

from kadapter_hf import (
    KAdapterForMaskedLM,
    KAdapterForSequenceClassification,
    KAdapterForTokenClassification,
    KAdapterModel,
)


SCRIPT = str(Path(__file__).parent / "scripts" / "train.py")
HEADS = {
    head.__name__: head
    for head in (KAdapterForMaskedLM, KAdapterForSequenceClassification, KAdapterForTokenClassification)
}


def launch() -> tuple[str, ...]:
    return (
        *("-m", "accelerate.commands.launch", "--num_machines", "1", "--main_process_port", str(free_port())),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    )


def start(command: Sequence[str], settings: dict, **environment: str) -> subprocess.Popen:
    """A process in its own group, so that its children can be killed too."""
    return subprocess.Popen(
        [sys.executable, *command, SCRIPT, json.dumps(settings)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    """Its output, after it has ended without an error."""
    try:
        printed, _ = process.communicate(timeout=300)
    except BaseException:
        kill(process)
        raise
    assert process.returncode == 0, printed
    return printed


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_forks(target: Callable[[int], None]) -> None:
    """Runs `target(number)` in two forks of this process, which have imported everything already, at the same time."""
    forks = [multiprocessing.get_context("fork").Process(target=target, args=(number,)) for number in (0, 1)]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(timeout=300)
        fork.kill()
    assert [fork.exitcode for fork in forks] == [0, 0]


def train(settings: dict, command: Sequence[str] = ()) -> dict:
    """Runs the script to its end. Trainer's warnings about missing or unexpected weights are errors."""
    printed = finish(start(command, settings))
    assert "missing keys" not in printed and "unexpected keys" not in printed, printed
    return json.loads(Path(settings["output"], "result.json").read_text())


def trained(run: Path, settings: dict):
    return HEADS[settings["head"]].from_pretrained(run / "trained")


def assert_close(model, other) -> None:
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- Killed and resumed ---------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_and_resumed_ends_with_the_same_weights_bit_for_bit(backbone, tmp_path, capfd):
    """All parts train, with dropout; steps after the last checkpoint are repeated."""
    settings = {
        "backbone": backbone,
        "head": "KAdapterForTokenClassification",
        "freeze_backbone": False,
        "arguments": {"max_steps": 8, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3},
    }
    killed = start([], settings | {"output": str(tmp_path / "killed"), "stop_after": 5})
    try:
        assert any("waiting" in line for line in killed.stdout)
    finally:
        kill(killed)
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-3"]
    script = load_script(Path(SCRIPT))
    settings = script.SETTINGS | settings
    script.main(settings | {"output": str(tmp_path / "killed"), "resume": True})
    script.main(settings | {"output": str(tmp_path / "whole")})
    printed = capfd.readouterr().err
    assert "missing keys" not in printed and "unexpected keys" not in printed
    assert_same_weights(trained(tmp_path / "killed", settings), trained(tmp_path / "whole", settings))


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(backbone, tmp_path):
    """The content of the unfinished folder is replaced when the run reaches that step again."""
    settings = {
        "backbone": backbone,
        "head": "KAdapterForTokenClassification",
        "freeze_backbone": False,
        "arguments": {"max_steps": 8, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2},
    }
    whole = start([], settings | {"output": str(tmp_path / "whole")})
    run, resume, left = tmp_path / "killed", None, set()
    for step, delay in ((4, 0.0), (6, 0.02), (8, 0.05)):
        process = start([], settings | {"output": str(run), "resume": resume})
        try:
            while not (run / f"checkpoint-{step}" / ".kadapter-saving").exists() and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(delay)
        finally:
            kill(process)
        finished = [folder for folder in run.glob("checkpoint-*") if (folder / "trainer_state.json").exists()]
        left |= {folder.name for folder in run.glob("checkpoint-*")} - {folder.name for folder in finished}
        resume = str(max(finished, key=lambda folder: int(folder.name.partition("-")[2])))
    assert left  # otherwise it was always killed too late
    finish(whole)
    train(settings | {"output": str(run), "resume": resume})
    assert_same_weights(trained(tmp_path / "killed", settings), trained(tmp_path / "whole", settings))


# ---- Several processes ----------------------------------------------------------------------------------------------


def train_side_by_side(settings: dict, tmp_path: Path, *flags: str, processes: int = 2) -> list[str]:
    """
    Trains in one process and in several, on the same batches, and compares the steps and the weights.

    DDP is told that all parameters are used, so that it fails if one is not.

    Returns:
        The classes of what the model was wrapped in.
    """
    arguments = {"max_steps": 4, "optim": "sgd", "ddp_find_unused_parameters": False} | settings["arguments"]
    settings = settings | {"dropout": False, "output": str(tmp_path / "one")}
    alone = start(
        [],
        settings | {"fsdp_on_cpu": False, "arguments": arguments | {"per_device_train_batch_size": 4}},
        CUDA_VISIBLE_DEVICES="0",
    )
    settings |= {
        "output": str(tmp_path / "several"),
        "arguments": arguments | {"per_device_train_batch_size": 4 // processes},
    }
    train(settings, (*launch(), *flags, "--num_processes", str(processes)))
    finish(alone)
    return assert_trained_alike(settings, tmp_path, processes)


def assert_trained_alike(settings: dict, tmp_path: Path, processes: int = 2) -> list[str]:
    """The runs in `one` and `several` had the same steps, and saved the same weights."""
    expected, found = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "several"))
    assert (expected["processes"], found["processes"]) == (1, processes)
    assert len(found["steps"]) == 4 and found["steps"] == [pytest.approx(step, rel=1e-4) for step in expected["steps"]]
    assert_close(trained(tmp_path / "several", settings), trained(tmp_path / "one", settings))
    stored = (tmp_path / "several" / "trained" / "backbone.safetensors").exists()
    assert stored is not settings["freeze_backbone"]
    return found["wrapped"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a fork can't train where autograd has threads for GPUs")
def test_two_processes_train_as_one_does(backbone, tmp_path):
    """With the variables by which a launcher makes the processes known to each other."""
    script = load_script(Path(SCRIPT))
    arguments = {"max_steps": 4, "optim": "sgd", "ddp_find_unused_parameters": False}
    settings = script.SETTINGS | {
        "backbone": backbone,
        "active": ["factual"],
        "freeze_backbone": False,
        "dropout": False,
        "output": str(tmp_path / "several"),
        "arguments": arguments | {"per_device_train_batch_size": 2},
    }
    several = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def train_as(rank: int) -> None:
        os.environ.update(several, RANK=str(rank), LOCAL_RANK=str(rank))
        trainer = script.main(settings)  # noqa: F841
        os._exit(0)  # as the script does, where the reason is

    run_forks(train_as)
    arguments |= {"per_device_train_batch_size": 4}
    script.main(settings | {"output": str(tmp_path / "one"), "arguments": arguments})
    assert "DistributedDataParallel" in assert_trained_alike(settings, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "active", "freeze_backbone", "arguments", "fusion"),
    [
        ("KAdapterForTokenClassification", ["factual"], False, {}, "concat"),
        ("KAdapterForTokenClassification", ["factual", "linguistic"], True, {}, "attention"),
        ("KAdapterForSequenceClassification", ["factual"], True, {}, "gate"),
        (
            "KAdapterForMaskedLM",
            ["factual", "linguistic"],
            True,
            {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
            "concat",
        ),
        ("KAdapterForMaskedLM", ["linguistic"], False, {}, "concat"),
        ("KAdapterForSequenceClassification", [], False, {}, "concat"),
    ],
)
def test_two_processes_of_a_launcher_train_as_one_does(
    head, active, freeze_backbone, arguments, fusion, backbone, tmp_path
):
    settings = {
        "backbone": backbone,
        "head": head,
        "active": active,
        "freeze_backbone": freeze_backbone,
        "arguments": arguments,
        "fusion": fusion,
    }
    wrapped = train_side_by_side(settings, tmp_path, "--multi_gpu")  # the launcher's term, with or without GPUs
    assert "DistributedDataParallel" in wrapped


FSDP = ("--use_fsdp", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_state_dict_type", "FULL_STATE_DICT")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "model_type", "active", "freeze_backbone", "fusion"),
    [
        ("KAdapterForTokenClassification", "roberta", ["factual"], True, "gate"),
        ("KAdapterForSequenceClassification", "bert", ["factual", "linguistic"], False, "attention"),
        # The output layers of RoBERTa and BERT have a bias with two names, which accelerate can't shard.
        ("KAdapterForMaskedLM", "modernbert", ["factual", "linguistic"], False, "concat"),
    ],
)
def test_two_processes_that_share_the_weights_out_train_as_one_does(
    head, model_type, active, freeze_backbone, fusion, backbones, tmp_path
):
    settings = {
        "backbone": backbones[model_type],
        "head": head,
        "active": active,
        "freeze_backbone": freeze_backbone,
        "fsdp_on_cpu": True,
        "arguments": {},
        "fusion": fusion,
    }
    assert "FSDPModule" in train_side_by_side(settings, tmp_path, *FSDP, "--fsdp_version", "2")


@pytest.mark.slow
def test_processes_that_share_the_weights_out_can_be_resumed(backbone, tmp_path):
    arguments = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    settings = {
        "backbone": backbone,
        "head": "KAdapterForTokenClassification",
        "fsdp_on_cpu": True,
        "output": str(tmp_path / "whole"),
        "arguments": arguments,
    }
    command = (*launch(), *FSDP, "--fsdp_version", "2", "--num_processes", "2")
    train(settings, command)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert not (checkpoint / "backbone.safetensors").exists()
    train(settings | {"output": str(tmp_path / "resumed"), "resume": str(checkpoint)}, command)
    assert_same_weights(trained(tmp_path / "resumed", settings), trained(tmp_path / "whole", settings))


@pytest.mark.cuda
@pytest.mark.parametrize("version", ["1", "2"])
def test_gpus_that_share_the_weights_out_train_as_one_does(version, backbone, tmp_path):
    """With one GPU there is one process, whose weights are still gathered and sharded."""
    settings = {
        "backbone": backbone,
        "head": "KAdapterForTokenClassification",
        "active": ["factual"],
        "freeze_backbone": False,
        "arguments": {"use_cpu": False, "save_strategy": "steps", "save_steps": 2},
    }
    flags = (*FSDP, "--fsdp_version", version)
    wrapped = train_side_by_side(settings, tmp_path, *flags, processes=min(torch.cuda.device_count(), 2))
    assert {"1": "FullyShardedDataParallel", "2": "FSDPModule"}[version] in wrapped


def test_two_processes_save_into_one_folder_in_turn(backbone, tmp_path):
    """Whichever save comes last is complete: neither crashes, and the folder is never a mix."""

    def save_again_and_again(seed: int) -> None:
        set_seed(seed)
        model = KAdapterModel.from_backbone(backbone, {"factual": small_adapter()})
        for _ in range(15):
            model.save_pretrained(tmp_path / "model")

    run_forks(save_again_and_again)
    assert KAdapterModel.from_pretrained(tmp_path / "model").active_knowledge_adapters == ["factual"]
