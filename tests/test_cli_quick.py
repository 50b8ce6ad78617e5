"""Help, completion and complaints about arguments import nothing large; `import kadapter_hf` adds little to transformers."""

import inspect
import json
import os
import statistics
import subprocess
import sys
from functools import partial

import pytest

from kadapter_cli import _flags, _names as names
from kadapter_hf import finetuning, multitask, pretraining, probing, reproduction
from kadapter_hf.modeling.format_kadapter import _ADAPTER_NAME
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
    *([command, "-h"] for command in ("info", "evaluate", "prepare", "pretrain")),
    *([command, "--help"] for command in ("prepare", "pretrain", "finetune")),
    *(["prepare", corpus, "--help"] for corpus in ("trex", "fewrel", "docred", "tacred", "semeval", "conllu")),
]
NOT_POSSIBLE_HERE = [
    ["info", "./no/where"],
    ["info", "nowhere.safetensors"],
    ["evaluate", "tacred", "--model", "./nowhere", "--data", "x"],
    ["evaluate", "tacred", "--model", "x", "--data", "nowhere.json"],
    ["predict", "tacred", "--model", "./nowhere", "--input", "rows.json"],
    ["export", "./nowhere", "--output", "y"],
    ["convert", "nowhere.bin", "--output", "y"],
    ["app", "x", "./nowhere"],
    ["combine", "x", "name=./nowhere", "--output", "y"],
    ["combine", "x", "--backbone", "./nowhere", "--output", "y"],
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
    ["pretrain", "--data", "x", "factual", "--output_dir", "y"],
    ["finetune", "--data", "x", "tacred", "--output_dir", "y"],
    ["info", ""],
    ["evaluate", "tacred", "--model", "x", "--data", ""],
    ["predict", "tacred", "--model", "x", "--input", ""],
    ["predict", "tacred", "--model", "", "--input", "rows.json"],
    ["finetune", "tacrd", "--data", "x"],
    ["evaluate", "tacrd", "--model", "x", "--data", "y"],
    ["evaluate", "tacred", "--model", "x"],
    ["evaluate", "tacred", "--model", "x", "--data", "y", "--split", "tset"],
    ["predict", "tacred", "--model", "x", "--input", "nowhere"],
    ["predict", "tacred", "--model", "x", "--input", "rows.json", "--batch-size", "0"],
    ["convert", "rows.json", "--output", "y", "--task", "tacrd"],
    ["convert", "rows.json", "--output", "y", "--layers", "0,a"],
    ["convert", "rows.json", "--output", "y", "--heads", "many"],
    ["combine", "x"],
    ["combine", "x", "--output", "y", "--fusion", "ad"],
    ["combine", "x", "--output", "y", "--fusion-config", "top_k"],
    ["combine", "x", "--output", "y", "--fusion", "add", "--fusion-config", '{"scal": 1}'],
    ["push", "nowhere", "owner/x"],
    ["push", ".", "a/b/c"],
    ["pull", "a/b/c"],
    ["pull", "owner/x", "--token", ""],
    ["prepare", "fewrle"],
    ["prepare", "fewrel", "nowhere", "--output", "x"],
    ["prepare", "fewrel", "rows.json", "--output", "x", "--split", "tset"],
    ["prepare", "fewrel", "rows.json", "--output", "rows.json"],
    ["prepare", "trex", ".", "--output", "x", "--seed", "-1"],
    ["pretrain", "factual"],
    ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--lerning_rate", "1"],
    ["pretrain", "multitask", "--data", "x", "--output_dir", "y", "--num_train_epochs", "abc"],
    ["finetune", "tacred", "--data", "x"],
    ["finetune", "tacred", "--data", "x", "--output_dir", "y", "--negative_sampel", "1"],
    ["finetune", "tacred", "--data", "x", "--output_dir", "y", "--lr_scheduler_type", "cosin"],
    ["reproduce", "--data", "tacred=x"],
    ["reproduce", "--data", "tacred=x", "--adapters", "y", "--output_dir", "z", "--negative_sampel", "1"],
    ["reproduce", "--data", "tacrd=x", "--adapters", "y", "--output_dir", "z"],
    ["probe", "--model", "x", "--data", "y", "--protocl", "fusion"],
    ["probe", "--model", "x", "--data", "y", "--epochs", "0"],
    ["pretrain", "multitask", "--data", "factul=x", "--output_dir", "y"],
    ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--bf16", "--fp16"],
    ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--warmup_steps", "-3"],
    ["finetune", "search-qa", "--data", "x", "--output_dir", "y", "--stride", "-1"],
    ["finetune", "tacred", "--output_dir", "y"],
    ["finetune", "tacred", "--data", "x", "--output_dir", "y", "--fusion_config", "{"],
    ["finetune", "tacred", "--data", "x", "--output_dir", "y", "--fusion_config", '{"top_k": 1}'],
    ["pretrain", "linguistic", "--data", "x", "--output_dir", "y", "--metric_for_best_model", "micro_f1"],
    ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--deepspeed", "nowhere.json"],
    ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--fsdp", "full_shard wrong"],
    ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--accelerator_config", '{"x": 1}'],
    ["finetune", "tacred", "--data", "x", "--output_dir", "y", "--metric_for_best_model", "eval_macro_f1"],
    ["finetune", "tacred", "--data", "", "--output_dir", "y"],
    ["finetune", "tacred", "--train_file", "", "--output_dir", "y"],
    ["probe", "--model", "x", "--data", ""],
    ["pretrain", "multitask", "--data", "factual=x", "--output_dir", "y", "--max_length", "0"],
    ["pretrain", "factual", "--data", "x", "--output_dir", "rows.json"],
    ["pretrain", "factual", "--data", "nowhere.jsonl", "--output_dir", "y"],
    ["pretrain", "multitask", "--data", "factual=./nowhere", "--output_dir", "y"],
    ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--backbone", "./nowhere"],
    ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--log_level", "loud"],
    ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--quiet"],
    ["finetune", "tacred", "--data", "x", "--output_dir", "y", "--adapters", "x", "name=nowhere.safetensors"],
    ["finetune", "tacred", "--train_file", "nowhere.json", "--output_dir", "y"],
    ["probe", "--model", "./nowhere", "--data", "x"],
    ["--log_file", "no/where/log", "doctor"],
    ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--dropout", "1.5"],
    ["reproduce", "--data", "tacred=x", "--adapters", "y", "--output_dir", "z", "--learning_rate", "-1"],
    ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--load_best_model_at_end"],
    ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--logging_steps", "0"],
    ["finetune", "tacred", "--data", "x", "--output_dir", "y", "--save_strategy", "no", "--load_best_model_at_end"],
    ["reproduce", "--data", "tacred=x", "--adapters", "y", "--output_dir", "z", "--dataloader_prefetch_factor", "2"],
]
COMPLETED = {
    "kadapter pret": "pretrain",
    "kadapter info --ba": "--backbone",
    "kadapter finetune tac": "tacred",
    "kadapter pretrain factual --learn": "--learning_rate",
    "kadapter pretrain multitask --data x --learning-r": "--learning-rate",
    "kadapter finetune tacred --neg": "--negative_sample",
    "kadapter reproduce --see": "--seeds --seed",
    "kadapter probe --js": "--json",
    "kadapter probe --multi": "--multi_token",
}
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
    assert (output.split(), imported) == (COMPLETED[words].split(), [])


def test_the_names_that_commands_check_are_those_of_the_registries():
    assert set(names.TASKS) == set(TASKS)
    assert set(names.OBJECTIVES) == set(OBJECTIVES)
    assert names.FUSIONS == {
        name: tuple(sorted(inspect.signature(fusion).parameters.keys() - {"width"}))
        for name, fusion in FUSIONS.items()
    }
    assert names.ADAPTER_NAME == _ADAPTER_NAME.pattern


COMMANDS = [
    *(("pretrain", name) for name in (*names.OBJECTIVES, "multitask")),
    *(("finetune", name) for name in names.TASKS),
    *(("reproduce", ""), ("probe", "")),
]


def parser_of(command, name):
    """The parser of a command itself."""
    if command == "finetune":
        return finetuning.parser(name)
    if command == "pretrain":
        return multitask.parser() if name == "multitask" else pretraining.parser(name)
    return probing.parser("kadapter probe") if command == "probe" else reproduction.parser()


def flags_of(parser):
    """What decides how a command line is parsed."""
    checked = ("int", "float", "string_to_bool")
    return {
        tuple(action.option_strings): (
            *(action.dest, action.nargs, action.const, action.required),
            # The levels of logs are the only choices that are not literal in the source.
            list(action.choices) if action.choices and not action.dest.startswith("log_level") else None,
            action.type.__name__ if getattr(action.type, "__name__", None) in checked else None,
        )
        for action in parser._actions
    }


@pytest.mark.parametrize(("command", "name"), COMMANDS)
def test_the_flags_read_from_the_source_are_those_of_the_command(command, name):
    quick, real = _flags.quick_parser(command, name), parser_of(command, name)
    assert flags_of(quick) == flags_of(real)
    assert quick.prog == real.prog


REQUIRED = ["--data", "x", "--output_dir", "y"]


@pytest.mark.parametrize(
    "flags",
    [
        *(
            "",
            "--data x",
            "--data x --output_dir y y",
            "--data x --output_dir y -x",
            "--data x --output_dir y -- --seed",
        ),
        *(
            f"--data x --output_dir y {wrong}"
            for wrong in (
                *("--lerning_rate 1", "--lerning_rate=1", "--lear 1", "--seed", "--no_remove_unused_columns=1"),
                *("--num_train_epochs abc", "--use_cpu maybe", "--run_name -x", "--lr_scheduler_type cosin"),
                *("--adapter_hidden_size 100", "--dropout 1.5", "--max_steps -5", "--num_train_epochs 0"),
                *("--report_to nix", "--name a/b"),
                *("--eval_size 0", "--learning_rate nan", "--fusion ad", "--cache_activations rows.json"),
                *("--save_steps 1.5", "--torch_empty_cache_steps 0", "--dataloader_prefetch_factor 2"),
                "--load_best_model_at_end --eval_strategy steps --eval_steps 2 --save_steps 3",
                "--load_best_model_at_end --eval_strategy steps --save_steps 0.05 --logging_steps 0.03",
                *("--lr_scheduler_type reduce_lr_on_plateau", "--hub_model_id a/b/c", "--lr_scheduler_kwargs [1]"),
                *("--data nowhere.csv", "--backbone ./nowhere", "--backbone a/b/c", "--verbose"),
            )
        ),
    ],
)
def test_a_complaint_about_flags_is_that_of_the_command(flags, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    said = []
    for parse in (partial(_flags.check_flags, "pretrain", "factual"), pretraining.parser("factual").parse):
        with pytest.raises(SystemExit, match="^2$"):
            parse(flags.split())
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] and said[0].startswith("Error: ")


@pytest.mark.parametrize(
    "flags",
    [
        *(["--learning-rate=1e-3"], ["--seed", "1", "--seed", "2"], ["--run_name=-x"], ["--max_steps", "-1"]),
        *(["--use_cpu"], ["--use_cpu", "NO"], ["--no_remove_unused_columns"], ["--no-remove-unused-columns"]),
        *(["--adapter_layers", "0", "1"], ["--data", "x", "y"], ["--log_level", "info"]),
        *(["--report_to", "none"], ["--lr_scheduler_kwargs", '{"x": -1}'], ["--warmup_steps", "1e-1"]),
        "--load_best_model_at_end --eval_strategy steps --save_steps 0.04".split(),  # eval_steps is logging_steps
        *(["--load_best_model_at_end", "--save_strategy", "best"], ["--lr_scheduler_type", "cosine"]),
        *(["--accelerator_config", '{"split_batches": true}'], ["--gradient_checkpointing_kwargs", "{}"]),
        *(["--max_grad_norm", "-1"], ["--data", "rows.json", "owner/rows"], ["--log_level", "passive"]),
    ],
    ids=" ".join,
)
def test_flags_that_the_command_accepts_are_accepted(flags, folder, monkeypatch):
    monkeypatch.chdir(folder)
    flags = [*REQUIRED, "--use_cpu", *flags]
    pretraining.parser("factual").parse(flags)
    _flags.check_flags("pretrain", "factual", flags)


def test_nothing_is_refused_if_the_source_of_transformers_is_not_as_expected(tmp_path):
    (tmp_path / "transformers").mkdir()
    for name in ("__init__", "hf_argparser", "training_args"):
        (tmp_path / "transformers" / f"{name}.py").touch()
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from kadapter_cli._flags import check_flags
check_flags("pretrain", "factual", ["--lerning_rate", "1"])
"""
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True)


def test_the_command_can_be_run_as_a_module(folder):
    command = [sys.executable, "-m", "kadapter_cli", "pretrain", "factul"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True).stderr
    assert "Usage: kadapter pretrain" in said and "Did you mean 'factual'?" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["pretrain", "factul"], ["pull", "a/b/c"], ["prepare", "fewrel", "--help"]),
        *(one for one in WRONG if one[:1] in (["pretrain"], ["finetune"], ["reproduce"], ["probe"])),
    ],
    ids=" ".join,
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
