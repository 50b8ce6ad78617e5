"""Adapters and fusions as they are named on the command line: SOURCE or NAME=SOURCE; a kind and JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kadapter_cli._flags import fusion_values

from .modeling.configuration_kadapter import KnowledgeAdapterConfig
from .modeling.format_kadapter import KAdapterConfigError, check_adapter_name
from .modeling.fusion_kadapter import check_fusion
from .modeling.reading_kadapter import adapter_names, read_adapter_metadata, read_tensors
from .modeling.sources_kadapter import adapter_file, repository_folder


def named_adapters(arguments: Sequence[str]) -> dict[str, tuple[str, KnowledgeAdapterConfig]]:
    """
    The source and the configuration of each adapter, by name. A SOURCE with several adapters stands for all of them. Their
    weights are checked when they are loaded.

    Raises:
        KAdapterLoadError: an adapter can't be found or read.
        KAdapterConfigError: two have the same name.
    """
    found: dict[str, tuple[str, KnowledgeAdapterConfig]] = {}
    for argument in arguments:
        name, source = split_name(argument)
        for chosen in [name] if name else _names_in(source):
            path = adapter_file(source, chosen)
            _, metadata = read_tensors(path)  # the tensors are memory-mapped, and not read
            saved, config, _ = read_adapter_metadata(metadata, path)
            name = chosen or saved
            if name in found:
                raise KAdapterConfigError(
                    f"'{found[name][0]}' and '{source}' both have an adapter named '{name}': rename one with NAME=SOURCE, "
                    f"e.g. {name}2={source}."
                )
            found[name] = (source, config)
    return found


def _names_in(source: str) -> Sequence[str | None]:
    """The names of the adapters in a folder or repository; None for the one in a file."""
    path = Path(source)
    if path.is_file() or path.suffix == ".safetensors":
        return [None]
    return adapter_names(repository_folder(source)) or [None]


def split_name(argument: str) -> tuple[str | None, str]:
    """
    The name, if there is one, and the source of `NAME=SOURCE`. Raises a `KAdapterConfigError` if no adapter can have the name.
    """
    name, _, source = argument.partition("=")
    if not source or Path(argument).exists():
        return None, argument
    try:
        return check_adapter_name(name), source
    except KAdapterConfigError as error:
        raise KAdapterConfigError(f"there is no '{argument}', and {error}") from None


def fusion_config(kind: str, text: str | None) -> dict[str, Any]:
    """
    The configuration of a fusion from JSON.

    Raises:
        KAdapterConfigError: there is no fusion of this kind, or it doesn't take these values.
    """
    values = fusion_values(kind, text)
    check_fusion(kind, values)
    return values
