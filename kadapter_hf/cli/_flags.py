"""
The flags of `kadapter pretrain`, `finetune`, `reproduce` and `probe`.

They are the fields of dataclasses, most of them of transformers' TrainingArguments, whose import takes seconds. So that wrong
flags are reported and flags completed at once, the fields are read from the source.
"""

import argparse
import ast
import builtins
import importlib.util
import shlex
import typing
from collections.abc import Sequence
from dataclasses import field, make_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from ._names import TASKS, did_you_mean, one_line


def flag(default: Any, text: str) -> Any:
    """A field of a dataclass, with its help."""
    return field(default=default, metadata={"help": str(text)})


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
        # The file of transformers' parser imports nothing of transformers.
        spec = importlib.util.spec_from_file_location("hf_argparser", _file("transformers.hf_argparser"))
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        kind = type("QuickParser", (FlagParser, module.HfArgumentParser), {})
        parts = [place.rpartition(".")[::2] for place in places[command]]
        dataclasses = [make_dataclass(cls, _fields(_file(file), cls).values()) for file, cls in parts]
        return kind(dataclasses, prog=f"kadapter {command} {name}".rstrip())
    except Exception:
        return None


def check_flags(command: str, name: str, flags: Sequence[str]) -> None:
    """Exits if the flags of a command can't be parsed, without importing anything large. What they mean is not checked."""
    parser = quick_parser(command, name)
    if parser is None or {"-h", "--help"} & set(flags):
        return
    arguments, rest = parser.parse_known_args(flags)
    if command != "reproduce":
        parser.refuse(rest)
        return
    for task in {source.partition("=")[0] for source in arguments.data} & TASKS.keys():
        check_flags("finetune", task, ["--data", "…", *rest, "--output_dir", "…"])


# ---- Source ---------------------------------------------------------------------------------------------------------


def _file(module: str) -> Path:
    package, *parts = module.split(".")
    folders = importlib.util.find_spec(package).submodule_search_locations  # type: ignore[union-attr]
    return Path(folders[0], *parts).with_suffix(".py")  # type: ignore[index]


@cache
def _statements(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_bytes()).body


def _find(path: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
    """The definition of a class in a file, or in another one of the package, from which the file imports it."""
    for node in _statements(path) if path.is_file() else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, node
        if isinstance(node, ast.ImportFrom) and node.level and name in [alias.name for alias in node.names]:
            return _find(path.parents[node.level - 1].joinpath(*str(node.module).split(".")).with_suffix(".py"), name)
    return None


def _fields(path: Path, name: str) -> dict[str, tuple[Any, ...]]:
    """What `make_dataclass` takes for the fields of a dataclass, by name."""
    path, node = _find(path, name)  # type: ignore[misc]
    names, found = _Names(path), dict[str, tuple[Any, ...]]()
    for base in node.bases:
        found |= _fields(path, ast.unparse(base))
    for line in node.body:
        if isinstance(line, ast.AnnAssign):
            parts = [eval(ast.unparse(part), names) for part in (line.annotation, line.value) if part]
            found[line.target.id] = (line.target.id, *parts)  # type: ignore[union-attr]
    return found


class _Names(dict[str, Any]):
    """The names in the source of the fields."""

    def __init__(self, path: Path):
        super().__init__(vars(builtins) | vars(typing) | {"field": _field, "flag": flag})
        self.path = path

    def __missing__(self, name: str) -> Any:
        _, node = _find(self.path, name) or (None, None)
        if node is None or not any("Enum" in ast.unparse(base) for base in node.bases):
            return Unknown
        lines = [line for line in node.body if isinstance(line, ast.Assign)]
        return Enum(name, [(ast.unparse(line.targets[0]), ast.literal_eval(line.value)) for line in lines])


class _Unknown(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls

    def __str__(cls) -> str:
        return "…"


class Unknown(metaclass=_Unknown):
    """What another file defines, and what is made of it. As the type of a flag, it takes every value."""


def _field(metadata: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """`field` without unknown metadata."""
    known = {key: value for key, value in (metadata or {}).items() if value is not Unknown}
    return field(metadata=known, **kwargs)
