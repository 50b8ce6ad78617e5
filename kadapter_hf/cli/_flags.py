"""
The flags of `kadapter pretrain`, `finetune`, `reproduce` and `probe`.

They are the fields of dataclasses, most of them of transformers' TrainingArguments, whose import takes seconds. So that wrong
flags are reported and flags completed at once, the fields are read from the source.
"""

import argparse
import importlib.util
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ._names import (
    ADAPTER_NAME,
    METRICS,
    TASKS,
    data_problem,
    did_you_mean,
    fusion_problem,
    is_repo_id,
    one_line,
    parsed_object,
    source_problem,
)
from ._source import fields_of, file_of, keys_of, read_dataclass, run_as_far_as_known, values_of


TRAINING_ARGUMENTS = "transformers.training_args.TrainingArguments"
# The defaults of `kadapter finetune` that decide which of Trainer's flags go together.
EVERY_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch"}
# The smallest values that make sense. Trainer refuses others after minutes of preparation, or not at all.
LEAST = {"learning_rate": 0, "weight_decay": 0, "num_train_epochs": 0, "seed": 0} | {
    "max_steps": -1,
    "warmup_steps": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
}
# The smallest values of what limits the rows; None is no limit.
LIMITS = {"max_train_samples": 1, "max_eval_samples": 1, "max_length": 1}
# What names a folder, file or repository, with what tells why it can't.
PLACES: dict[str, Callable[[str], str | None] | None] = {
    **dict.fromkeys(("adapters", "backbone", "model", "multitask", "untrained_like"), source_problem),
    **dict.fromkeys(("corpus", "data", "exclude", "train_text", "vocab"), data_problem),
    **dict.fromkeys(("test_file", "train_file", "validation_file"), data_problem),
    **dict.fromkeys(("cache_activations", "output_dir")),
}


def check_least(arguments: Any, least: Mapping[str, float]) -> None:
    """Raises a ValueError if a flag has a smaller value than this."""
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= smallest:  # not even if it is NaN
            raise ValueError(f"--{name} must be at least {smallest}, not {value}")


def check_rows(arguments: Any) -> None:
    """Raises a ValueError for an impossible part or number of rows, or place of what is computed for them."""
    check_least(arguments, LIMITS)
    if not 0 < arguments.eval_size < 1:
        raise ValueError(f"--eval_size must be between 0 and 1, not {arguments.eval_size}")
    folder = getattr(arguments, "cache_activations", None)
    if folder is not None and Path(folder).is_file():
        raise ValueError(f"--cache_activations must be a folder; '{folder}' is a file")


def check_adapter_name(name: str) -> None:
    """Raises a ValueError for a name that no adapter can have; a few others are refused when the model is made."""
    if not re.fullmatch(ADAPTER_NAME, name):
        raise ValueError(
            f"{name[:80]!r} can't name a knowledge adapter: a name has 1 to 64 letters, digits, '_' or '-', and starts with a "
            "letter or digit"
        )


def fusion_values(fusion: str, text: str | None) -> dict[str, Any]:
    """The configuration of a fusion. Raises a ValueError if it is not JSON, or has what the fusion doesn't."""
    values = parsed_object(text or "{}")
    if values is None:
        raise ValueError(f'the configuration of a fusion must be a JSON object like {{"scale": 0.1}}, not {text}')
    if problem := fusion_problem(fusion, values):
        raise ValueError(f"fusion_config: {problem}")
    return values


def check_values(training: Any) -> None:
    """Raises a ValueError for a value in TrainingArguments that Trainer can't use, which it would notice only later."""
    check_least(training, LEAST)
    if training.fp16 and training.bf16:
        raise ValueError("give either --bf16 or --fp16")
    if training.max_steps <= 0 and not training.num_train_epochs:
        raise ValueError("--num_train_epochs must be more than 0 without --max_steps")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= (value := getattr(training, name)) < 1:
            raise ValueError(f"--{name} must be in [0, 1), not {value}")
    if Path(training.output_dir).is_file():
        raise ValueError(f"--output_dir must be a folder; '{training.output_dir}' is a file")
    for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        value = getattr(training, name, None)
        if isinstance(value, str) and parsed_object(value) is None:
            raise ValueError(f"--{name} must be a JSON object, not {value}")
    for name in ("accelerator_config", "deepspeed", "fsdp_config"):
        value = getattr(training, name, None)
        if not isinstance(value, str) or Path(value).is_file() or (name == "deepspeed" and "." not in value):
            continue
        if parsed_object(value) is None:
            raise ValueError(f"--{name} must be a JSON object or a file, and there is no file '{value}'")
    if training.hub_model_id is not None and not is_repo_id(training.hub_model_id):
        raise ValueError(f"--hub_model_id: '{training.hub_model_id}' is not a valid name of a repository on the Hub")


class FlagParser(argparse.ArgumentParser):
    """What the parsers have in common: wrong usage is reported without the list of all flags, and with exit code 2."""

    dataclass_types: Any
    parse_args_into_dataclasses: Any

    def __init__(self, dataclasses: Any, **kwargs: Any):
        super().__init__(dataclasses, allow_abbrev=False, **kwargs)
        if "TrainingArguments" in [one.__name__ for one in self.dataclass_types]:
            # transformers' default is a folder in the current one.
            (action,) = (action for action in self._actions if action.dest == "output_dir")
            action.required, action.help = True, "The output folder, also for checkpoints."
            self.set_defaults(logging_steps=0.02)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {one_line(message)}\nTry '{self.prog} --help' for help.\n")

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        found, rest = super().parse_known_args(*args, **kwargs)
        for name, problem_of in PLACES.items():
            value = getattr(found, name, None)
            for place in value if isinstance(value, list) else [value] if isinstance(value, str) else []:
                if not place:  # as a shell variable that is not set; it would be taken for the current folder
                    self.error(f"--{name} is empty")
                if problem_of and (problem := problem_of(place)):
                    self.error(f"--{name}: {problem}")
        return found, rest

    def refuse(self, rest: Sequence[str]) -> None:
        """Exits if there are arguments that were not used."""
        for word in rest:
            flag = word.partition("=")[0]
            if flag in ("--quiet", "--verbose", "--log_file", "--log-file"):
                self.error(f"{flag} comes before the command: kadapter {flag} {self.prog.partition(' ')[2]} …")
            if flag.startswith("--"):
                self.error(f"there is no flag {flag}.{did_you_mean(flag, self._option_string_actions)}")
        if rest:
            self.error(f"unexpected arguments: {shlex.join(rest)}")


def quick_parser(command: str, name: str = "") -> FlagParser | None:
    """
    The parser of a command, for an objective or task if it has one, without the defaults that depend on that or on other flags.
    None if the installed version of transformers is written in another way.
    """
    of_pretraining = "multitask.MultitaskArguments" if name == "multitask" else "pretraining.PretrainingArguments"
    of_task = TASKS.get(name, "task.Options")
    places = {
        "pretrain": [f"kadapter_hf.{of_pretraining}", TRAINING_ARGUMENTS],
        "finetune": ["kadapter_hf.finetuning.FinetuningArguments", f"kadapter_hf.tasks.{of_task}", TRAINING_ARGUMENTS],
        "reproduce": ["kadapter_hf.reproduction.ReproductionArguments"],
        "probe": ["kadapter_hf.probing.ProbingArguments"],
    }
    try:
        # The parser of transformers is in a file that imports nothing else of transformers.
        spec = importlib.util.spec_from_file_location("hf_argparser", file_of("transformers.hf_argparser"))
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        kind = type("QuickParser", (FlagParser, module.HfArgumentParser), {})
        dataclasses = [read_dataclass(place, checked=place != TRAINING_ARGUMENTS) for place in places[command]]
        parser = kind(dataclasses, prog=f"kadapter {command} {name}".rstrip())
        parser.set_defaults(**(EVERY_EPOCH if command == "finetune" else {}))
        return parser
    except Exception:
        return None


def check_metric(task: str, metric: str | None) -> None:
    """Raises a ValueError if an evaluation for this has no such metric, which Trainer would notice after an epoch."""
    known = ("loss", *METRICS[task])
    name = (metric or "loss").removeprefix("eval_")
    if name not in known and not name.endswith(("runtime", "per_second")):
        raise ValueError(
            f"--metric_for_best_model: {task} has no metric {metric}, only {', '.join(known)}.{did_you_mean(name, known)}"
        )


def check_log_level(training: Any) -> None:
    """Raises a ValueError if transformers has no such level; nothing if that is not known."""
    known = [*keys_of("transformers.utils.logging.log_levels"), "passive"]
    for name in ("log_level", "log_level_replica"):
        if len(known) > 1 and getattr(training, name) not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, not {getattr(training, name)}")


def check_report_to(names: Any) -> None:
    """Raises a ValueError if transformers can't report to one of these; nothing if that is not known."""
    names = names if isinstance(names, list) else [names]
    known = keys_of("transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK") if names != ["none"] else []
    for name in names:
        if known and isinstance(name, str) and name not in ("all", "none", *known):
            raise ValueError(f"--report_to: {name} is not supported, only {', '.join(known)} are supported.")


def check_as_trainer(training: Any) -> None:
    """Raises a ValueError for values that TrainingArguments refuses, as far as its source tells."""
    if training.eval_strategy == "steps" and not training.eval_steps:  # as TrainingArguments itself does
        training.eval_steps = training.logging_steps
    try:
        run_as_far_as_known(TRAINING_ARGUMENTS, "_validate_args", training)
        known = values_of("transformers.trainer_utils.FSDPOption")
        for option in training.fsdp.split() if isinstance(training.fsdp, str) else []:
            if option not in known and option.lower() not in ("true", "false"):
                raise ValueError(f"--fsdp: there is no option {option}, only {', '.join(known)}.")
        known = fields_of("transformers.trainer_pt_utils.AcceleratorConfig")
        for key in parsed_object(training.accelerator_config or "{}") or {}:
            if key not in known:
                raise ValueError(f"--accelerator_config: there is no {key}, only {', '.join(known)}.")
    except ValueError:
        raise
    except Exception:  # written in another way than expected
        return


def check_flags(command: str, name: str, flags: Sequence[str]) -> None:
    """
    Exits if the flags of a command are wrong, as far as that can be known without importing anything large: the command itself
    checks the rest.
    """
    parser = quick_parser(command, name)
    if parser is None or {"-h", "--help"} & set(flags):
        return
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(list(flags), True, look_for_args_file=False)
        if command in ("pretrain", "finetune"):
            check_values(parsed[-1])
            check_report_to(parsed[-1].report_to)
            check_log_level(parsed[-1])
            if name in METRICS:  # but multitask
                check_metric(name, parsed[-1].metric_for_best_model)
            check_as_trainer(parsed[-1])
    except ValueError as error:
        parser.error(str(error))
    if command != "reproduce":
        parser.refuse(rest)
        return
    for task in (source.partition("=")[0] for source in parsed[0].data):
        if task in TASKS:
            check_flags("finetune", task, ["--data", "…", *rest, "--output_dir", "…"])
