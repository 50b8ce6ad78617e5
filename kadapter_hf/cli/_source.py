"""Dataclasses read from the source of packages whose import takes seconds."""

import ast
import builtins
import importlib
import importlib.util
import sys
import typing
from contextlib import suppress
from dataclasses import field, make_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any


def flag(default: Any, text: str) -> Any:
    """A field of a dataclass, with its help."""
    return field(default=default, metadata={"help": str(text)})


def read_dataclass(place: str, checked: bool = False) -> type:
    """
    A dataclass with the fields of the one at `place`, which is its module and name, and if it is to be `checked`, its methods.
    What other files define is `Unknown` in it, but for base classes and enumerations; a check that depends on it ends there.

    Raises:
        Exception: the source is not as expected.
    """
    path, name = _split(place)
    methods = _methods(path, name) if checked else {}
    return make_dataclass(name, _fields(path, name).values(), namespace=methods)


def run_as_far_as_known(place: str, method: str, instance: Any) -> None:
    """
    Runs the statements of a method of the class at `place`, without those that depend on what other files define; up to the
    first of these that sets an attribute.
    """
    path, node = _find(*_split(place))  # type: ignore[misc]
    names = _Names(path)
    names["self"] = instance
    methods = (line for line in node.body if isinstance(line, ast.FunctionDef) and line.name == method)
    for statement in (statement for found in methods for statement in found.body):
        try:
            exec(ast.unparse(statement), names, names)
        except _NotKnown:
            attributes = (part for part in ast.walk(statement) if isinstance(part, ast.Attribute))
            if any(isinstance(attribute.ctx, ast.Store) for attribute in attributes):
                return  # what follows would be about values that it changes


def file_of(module: str) -> Path:
    """The file of a module, which is not imported."""
    package, *parts = module.split(".")
    folders = importlib.util.find_spec(package).submodule_search_locations  # type: ignore[union-attr]
    return Path(folders[0], *parts).with_suffix(".py")  # type: ignore[index]


def keys_of(place: str) -> list[str]:
    """The keys of the dict at `place`, which is its module and name; empty if it can't be found."""
    path, name = _split(place)
    for line in _statements(path):
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name and isinstance(line.value, ast.Dict):
            return [str(key.value) for key in line.value.keys if isinstance(key, ast.Constant)]
    return []


def fields_of(place: str) -> list[str]:
    """The fields of the dataclass at `place`."""
    return list(_fields(*_split(place)))


def values_of(place: str) -> list[str]:
    """The values of the enumeration at `place`."""
    path, name = _split(place)
    return [member.value for member in _Names(path)[name]]


def _split(place: str) -> tuple[Path, str]:
    """The file and the name of what is at `place`."""
    module, _, name = place.rpartition(".")
    return file_of(module), name


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


def _methods(path: Path, name: str) -> dict[str, Any]:
    path, node = _find(path, name)  # type: ignore[misc]
    found = {key: method for base in node.bases for key, method in _methods(path, ast.unparse(base)).items()}
    names, methods = _Names(path), [line for line in node.body if isinstance(line, ast.FunctionDef)]
    exec("\n".join(map(ast.unparse, methods)), names, names)
    found |= {method.name: names[method.name] for method in methods}
    if check := found.get("__post_init__"):

        def as_far_as_known(self: Any) -> None:
            with suppress(_NotKnown):
                check(self)

        found["__post_init__"] = as_far_as_known
    return found


class _Names(dict[str, Any]):
    """The values of the names in the source of a dataclass."""

    def __init__(self, path: Path):
        super().__init__(vars(builtins) | vars(typing) | {"field": _field, "flag": flag})
        self.path = path

    def __missing__(self, name: str) -> Any:
        for line in _statements(self.path):
            if isinstance(line, ast.ImportFrom) and not line.level and name in [alias.name for alias in line.names]:
                if str(line.module).partition(".")[0] in (*sys.stdlib_module_names, "kadapter_cli"):
                    return getattr(importlib.import_module(str(line.module)), name)
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name:
                return ast.literal_eval(line.value) if isinstance(line.value, ast.Constant) else Unknown
        _, node = _find(self.path, name) or (None, None)
        if node is None or not any("Enum" in ast.unparse(base) for base in node.bases):
            return Unknown
        lines = [line for line in node.body if isinstance(line, ast.Assign)]
        values = [(ast.unparse(line.targets[0]), ast.literal_eval(line.value)) for line in lines]
        return Enum(name, values, type=str)  # as transformers' ExplicitEnum


class _NotKnown(Exception):
    """Something depends on what the source alone does not tell."""


class _UnknownType(type):
    """The class of `Unknown`: whatever is done with that gives the same again, but it decides nothing."""

    def _decides(cls, *args: Any) -> Any:
        raise _NotKnown

    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __iter__ = __len__ = _decides

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls

    def __str__(cls) -> str:
        return "…"


class Unknown(metaclass=_UnknownType):
    """What another file defines, and what is made of it. As the type of a flag, it accepts every value."""


def _field(metadata: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """`field` without unknown metadata."""
    known = {key: value for key, value in (metadata or {}).items() if value is not Unknown}
    return field(metadata=known, **kwargs)
