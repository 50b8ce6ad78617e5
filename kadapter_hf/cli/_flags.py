"""
The flags of `kadapter pretrain`, `finetune`, `reproduce` and `probe`.

They are the fields of dataclasses, most of them of transformers' TrainingArguments, whose import takes seconds. So that wrong
flags are reported and flags completed at once, the fields are read from the source.
"""

import argparse
import importlib.util
import shlex
from collections.abc import Sequence
from typing import Any, NoReturn

from ._names import TASKS, did_you_mean, one_line
from ._source import file_of, read_dataclass


class FlagParser(argparse.ArgumentParser):
    """What the parsers have in common: wrong usage is reported without the list of all flags, and with exit code 2."""

    dataclass_types: Any

    def __init__(self, dataclasses: Any, **kwargs: Any):
        super().__init__(dataclasses, allow_abbrev=False, **kwargs)
        if "TrainingArguments" in [one.__name__ for one in self.dataclass_types]:
            # transformers' default is a folder in the current one.
            (action,) = (action for action in self._actions if action.dest == "output_dir")
            action.required, action.help = True, "The output folder, also for checkpoints."

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {one_line(message)}\nTry '{self.prog} --help' for help.\n")

    def refuse(self, rest: Sequence[str]) -> None:
        """Exits if there are arguments that were not used."""
        for word in rest:
            flag = word.partition("=")[0]
            if flag.startswith("--"):
                self.error(f"there is no flag {flag}.{did_you_mean(flag, self._option_string_actions)}")
        if rest:
            self.error(f"unexpected arguments: {shlex.join(rest)}")


def quick_parser(command: str, name: str = "") -> FlagParser | None:
    """
    The parser of a command, for an objective or task if it has one, without the defaults that depend on that or on other flags.
    None if the installed version of transformers is written in another way.
    """
    of_trainer = ["transformers.training_args.TrainingArguments"]
    of_pretraining = "multitask.MultitaskArguments" if name == "multitask" else "pretraining.PretrainingArguments"
    of_task = TASKS.get(name, "task.Options")
    places = {
        "pretrain": [f"kadapter_hf.{of_pretraining}", *of_trainer],
        "finetune": ["kadapter_hf.finetuning.FinetuningArguments", f"kadapter_hf.tasks.{of_task}", *of_trainer],
        "reproduce": ["kadapter_hf.reproduction.ReproductionArguments"],
        "probe": ["kadapter_hf.probing.ProbingArguments"],
    }
    try:
        # The parser of transformers is in a file that imports nothing else of transformers.
        spec = importlib.util.spec_from_file_location("hf_argparser", file_of("transformers.hf_argparser"))
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        kind = type("QuickParser", (FlagParser, module.HfArgumentParser), {})
        return kind([read_dataclass(place) for place in places[command]], prog=f"kadapter {command} {name}".rstrip())
    except Exception:
        return None


def check_flags(command: str, name: str, flags: Sequence[str]) -> None:
    """
    Exits if the flags of a command can't be parsed, without importing anything large. Whether their values make sense, the
    command checks.
    """
    parser = quick_parser(command, name)
    if parser is None or {"-h", "--help"} & set(flags):
        return
    arguments, rest = parser.parse_known_args(flags)
    if command != "reproduce":
        parser.refuse(rest)
        return
    for task in (source.partition("=")[0] for source in arguments.data):
        if task in TASKS:
            check_flags("finetune", task, ["--data", "…", *rest, "--output_dir", "…"])
