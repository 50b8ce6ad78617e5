"""Training in processes of its own: killed and resumed, and several of them side by side."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights

from kadapter_hf import KAdapterForMaskedLM, KAdapterForSequenceClassification, KAdapterForTokenClassification


SCRIPT = str(Path(__file__).parent / "scripts" / "train.py")
LAUNCH = [
    "-m",
    "accelerate.commands.launch",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]


def start(command: list[str], settings: dict, **environment: str) -> subprocess.Popen:
    """A process in a group of its own, so that all of its children can be killed with it."""
    return subprocess.Popen(
        [sys.executable, *command, SCRIPT, json.dumps(settings)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    """What it printed; it must end well."""
    try:
        printed, _ = process.communicate(timeout=300)
    except BaseException:
        kill(process)
        raise
    assert process.returncode == 0, printed
    return printed


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def train(settings: dict, command: tuple[str, ...] = (), **environment: str) -> dict:
    """Runs the script to its end. What Trainer says of missing or unexpected weights is an error."""
    printed = finish(start([*command], settings, **environment))
    assert "missing keys" not in printed and "unexpected keys" not in printed, printed
    return json.loads(Path(settings["output"], "result.json").read_text())


def assert_close(model, other) -> None:
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- Killed and resumed ---------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_and_resumed_ends_with_the_same_weights_bit_for_bit(backbone, tmp_path):
    """All parts train, with dropout; what happened after the last checkpoint is done again."""
    settings = {
        "backbone": backbone,
        "freeze_backbone": False,
        "arguments": {"max_steps": 8, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3},
    }
    whole = start([], settings | {"output": str(tmp_path / "whole")})
    killed = start([], settings | {"output": str(tmp_path / "killed"), "stop_after": 5})
    try:
        assert any("waiting" in line for line in killed.stdout)
    finally:
        kill(killed)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"checkpoint-3"}
    finish(whole)
    train(settings | {"output": str(tmp_path / "killed"), "resume": True})
    first, second = (
        KAdapterForTokenClassification.from_pretrained(tmp_path / run / "trained") for run in ("whole", "killed")
    )
    assert_same_weights(second, first)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(backbone, tmp_path):
    """What is in the unfinished folder is replaced when the run gets there again."""
    settings = {
        "backbone": backbone,
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
    assert left  # or it was killed too late each time
    finish(whole)
    train(settings | {"output": str(run), "resume": resume})
    first, second = (
        KAdapterForTokenClassification.from_pretrained(tmp_path / run / "trained") for run in ("whole", "killed")
    )
    assert_same_weights(second, first)


# ---- Two processes --------------------------------------------------------------------------------------------------


def side_by_side(settings: dict, tmp_path: Path, *flags: str) -> dict:
    """
    Trains in one process and in two, on the same batches, and compares the steps and the weights.

    DDP is told that all parameters are used, so that it fails if one is not.
    """
    arguments = {"max_steps": 4, "optim": "sgd", "ddp_find_unused_parameters": False} | settings.pop("arguments", {})
    settings |= {"dropout": False}
    one = start(
        [],
        settings
        | {
            "fsdp_on_cpu": False,
            "output": str(tmp_path / "one"),
            "arguments": arguments | {"per_device_train_batch_size": 4},
        },
    )
    two = settings | {"output": str(tmp_path / "two"), "arguments": arguments | {"per_device_train_batch_size": 2}}
    found = train(two, (*LAUNCH, *flags, "--num_processes", "2", "--main_process_port", "0"))
    finish(one)
    expected = json.loads((tmp_path / "one" / "result.json").read_text())
    assert (expected["processes"], found["processes"]) == (1, 2)
    assert len(found["steps"]) == 4 and found["steps"] == [pytest.approx(step, rel=1e-4) for step in expected["steps"]]
    model_class = {head.__name__: head for head in HEADS}[settings["head"]]
    one, two = (model_class.from_pretrained(tmp_path / run / "trained") for run in ("one", "two"))
    assert_close(two, one)
    assert (tmp_path / "two" / "trained" / "backbone.safetensors").exists() is not settings["freeze_backbone"]
    return found


HEADS = (KAdapterForMaskedLM, KAdapterForSequenceClassification, KAdapterForTokenClassification)


@pytest.mark.parametrize(
    ("head", "active", "freeze_backbone", "arguments"),
    [
        ("KAdapterForTokenClassification", ["factual"], False, {}),
        pytest.param(
            "KAdapterForMaskedLM",
            ["factual", "linguistic"],
            True,
            {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param("KAdapterForMaskedLM", ["linguistic"], False, {"bf16": False}, marks=pytest.mark.slow),
        pytest.param("KAdapterForSequenceClassification", [], False, {}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one_does(head, active, freeze_backbone, arguments, backbone, tmp_path):
    settings = {
        "backbone": backbone,
        "head": head,
        "active": active,
        "freeze_backbone": freeze_backbone,
        "arguments": arguments,
    }
    found = side_by_side(settings, tmp_path, "--multi_gpu")  # that is what the launcher calls it, also without any
    assert "DistributedDataParallel" in found["wrapped"]


FSDP = ("--use_fsdp", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_state_dict_type", "FULL_STATE_DICT")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "model_type", "active", "freeze_backbone"),
    [
        ("KAdapterForTokenClassification", "roberta", ["factual"], True),
        ("KAdapterForSequenceClassification", "bert", ["factual", "linguistic"], False),
        # The output layer of RoBERTa's and BERT's heads has a bias by two names, which accelerate does not share out.
        ("KAdapterForMaskedLM", "modernbert", ["factual", "linguistic"], False),
    ],
)
def test_two_processes_that_share_the_weights_out_train_as_one_does(
    head, model_type, active, freeze_backbone, backbones, tmp_path
):
    settings = {
        "backbone": backbones[model_type],
        "head": head,
        "active": active,
        "freeze_backbone": freeze_backbone,
        "fsdp_on_cpu": True,
        "arguments": {"save_strategy": "steps", "save_steps": 2},
    }
    found = side_by_side(settings, tmp_path, *FSDP, "--fsdp_version", "2")
    assert "FSDPModule" in found["wrapped"]
