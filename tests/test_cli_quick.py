"""Help, completion and complaints about arguments import nothing large; `import kadapter_hf` adds little to transformers."""

import json
import os
import statistics
import subprocess
import sys

import pytest

from kadapter_cli import _names as names
from kadapter_hf.modeling.fusion_kadapter import FUSIONS
from kadapter_hf.objectives import OBJECTIVES
from kadapter_hf.tasks import TASKS


# Commands with the exit codes 0, 1 and 2.
HELP = [
    ["--help"],
    ["--version"],
    *(
        [command, "--help"]
        for command in ("info", "push", "pull", "combine", "convert", "evaluate", "predict", "app", "export", "doctor")
    ),
    *([command, "--help"] for command in ("prepare", "pretrain", "finetune")),
    *(["prepare", corpus, "--help"] for corpus in ("trex", "fewrel", "docred", "tacred", "semeval", "conllu")),
]
NOT_POSSIBLE_HERE = [
    ["info", "./no/where"],
    ["info", "nowhere.safetensors"],
    ["combine", "x", "--output", "full"],
    ["pull", "owner/x", "--output", "full"],
    ["prepare", "fewrel", "rows.json", "--output", "full"],
    ["prepare", "trex", "rows.json", "--output", "full"],
    ["prepare", "conllu", "rows.json", "--output", "full"],
]
WRONG = [
    [],
    ["inof"],
    ["--quick"],
    ["info"],
    ["info", "x", "--bakcbone", "y"],
    ["pretrain"],
    ["pretrain", "factul"],
    ["finetune", "tacrd", "--data", "x"],
    ["evaluate", "tacrd", "--model", "x", "--data", "y"],
    ["evaluate", "tacred", "--model", "x"],
    ["evaluate", "tacred", "--model", "x", "--data", "y", "--split", "tset"],
    ["predict", "tacred", "--model", "x", "--input", "nowhere"],
    ["predict", "tacred", "--model", "x", "--input", "rows.json", "--batch-size", "0"],
    ["convert", "x", "--output", "y", "--task", "tacrd"],
    ["convert", "x", "--output", "y", "--layers", "0,a"],
    ["convert", "x", "--output", "y", "--heads", "many"],
    ["combine", "x"],
    ["combine", "x", "--output", "y", "--fusion", "ad"],
    ["combine", "x", "--output", "y", "--fusion-config", "top_k"],
    ["push", "nowhere", "owner/x"],
    ["push", ".", "a/b/c"],
    ["pull", "a/b/c"],
    ["pull", "owner/x", "--token", ""],
    ["prepare", "fewrle"],
    ["prepare", "fewrel", "nowhere", "--output", "x"],
    ["prepare", "fewrel", "rows.json", "--output", "x", "--split", "tset"],
    ["prepare", "trex", ".", "--output", "x", "--seed", "-1"],
]
COMPLETED = {"kadapter pret": "pretrain", "kadapter info --ba": "--backbone", "kadapter finetune tac": "tacred"}
LARGE = ("datasets", "kadapter_hf", "torch", "transformers")
# Runs commands in one process, and prints the exit code of each, its output, and which large packages it has imported.
PROGRAM = f"""
import json, sys
from typer.testing import CliRunner
from kadapter_cli import app

for arguments, environment in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, arguments, env=environment, prog_name="kadapter")
    print(json.dumps([done.exit_code, done.output, [name for name in {LARGE} if name in sys.modules]]))
"""


def completion(words: str) -> dict[str, str]:
    """The environment in which bash asks for completions."""
    count = str(len(words.split()) - 1)
    return {"_KADAPTER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The current folder of the commands."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "full").mkdir()
    for name in ("rows.json", "full/train.parquet"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def done(folder):
    """What became of each command, or of each completion."""
    runs = [(arguments, {}) for arguments in (*HELP, *NOT_POSSIBLE_HERE, *WRONG)]
    runs += [([], completion(words)) for words in COMPLETED]
    command = [sys.executable, "-c", PROGRAM, json.dumps(runs)]
    printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()
    keys = [*(" ".join(arguments) for arguments, _ in runs[: -len(COMPLETED)]), *COMPLETED]
    return dict(zip(keys, map(json.loads, printed), strict=True))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [*((one, 0) for one in HELP), *((one, 1) for one in NOT_POSSIBLE_HERE), *((one, 2) for one in WRONG)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_needs_no_model_imports_nothing_large(arguments, code, done):
    exit_code, output, imported = done[" ".join(arguments)]
    assert (exit_code, imported) == (code, []), output


@pytest.mark.parametrize("words", COMPLETED)
def test_the_shells_questions_are_answered_without_importing_anything_large(words, done):
    _, output, imported = done[words]
    assert (output.split(), imported) == ([COMPLETED[words]], [])


def test_the_names_that_commands_check_are_those_of_the_registries():
    assert set(names.TASKS) == set(TASKS)
    assert set(names.OBJECTIVES) == set(OBJECTIVES)
    assert set(names.FUSIONS) == set(FUSIONS)


def test_the_command_can_be_run_as_a_module(folder):
    command = [sys.executable, "-m", "kadapter_cli", "pretrain", "factul"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True).stderr
    assert "Usage: kadapter pretrain" in said and "Did you mean 'factual'?" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--help"], ["pretrain", "factul"], ["pull", "a/b/c"], ["prepare", "fewrel", "--help"]], ids=" ".join
)
def test_an_answer_takes_less_than_half_a_second(arguments, folder):
    times = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "kadapter_cli", *arguments], cwd=folder, capture_output=True)
        after = os.times()
        # Processor time, which depends less on what else the machine does.
        times.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert statistics.median(times) < 0.5


@pytest.mark.slow
def test_importing_the_package_adds_little_to_importing_transformers():
    program = """
from time import process_time
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY
start = process_time()
import kadapter_hf
print(process_time() - start)
"""
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(3)]
    assert statistics.median(float(done.stdout) for done in runs) < 0.3
