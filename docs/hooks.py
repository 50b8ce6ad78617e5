"""
What `make docs` adds to the pages: those that are files elsewhere in the repository, and the reference, which is made from the
docstrings, the commands and their flags.
"""

import os
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
# Pages that are files outside of docs/.
ELSEWHERE = {
    "index.md": "README.md",
    "examples.md": "examples/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
# Code, in which nothing is a link, or a link to a file.
LINK = re.compile(
    r"^```.*?^```$|`[^`\n]+`|(!?)\[([^\[\]]*)\]\((?![a-z]+:|#)([^()\s#]+)(#[^()\s]*)?\)",
    flags=re.DOTALL | re.MULTILINE,
)
# Methods that are added to the models when the package is imported, by module.
ADDED = {
    "kadapter_hf.summary": ["knowledge_summary"],
    "kadapter_hf.hub": ["push_to_hub", "push_saved", "push_knowledge_adapter_to_hub"],
    "kadapter_hf.cards": ["write_model_card"],
}


def on_startup(command: str, dirty: bool) -> None:
    """
    Makes the package's installed layout, as mkdocstrings reads the files without importing them, and ignores folders that
    are missing at the start.
    """
    layout = ROOT / "build" / "docs" / "kadapter_hf"
    layout.mkdir(parents=True, exist_ok=True)
    for path in [*(ROOT / "kadapter_hf").iterdir(), ROOT / "conversion", ROOT / "modeling"]:
        link = layout / path.name
        if not link.exists():
            link.symlink_to(path)


def on_files(files: Files, config: MkDocsConfig) -> None:
    pages = {name: (ROOT / source).read_text(encoding="utf-8") for name, source in ELSEWHERE.items()}
    for name, content in (pages | reference()).items():
        files.append(File.generated(config, name, content=content))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links between files of the repository links between pages; one to a file that is no page becomes its text."""
    here = page.file.src_uri
    source = ELSEWHERE.get(here, f"docs/{here}")
    uris = {path: name for name, path in ELSEWHERE.items()}

    def replaced(link: re.Match) -> str:
        image, text, target, anchor = link.groups()
        if target is None:
            return link[0]
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        uri = uris.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if uri is None:
            return text
        return f"{image}[{text}]({os.path.relpath(uri, os.path.dirname(here) or '.')}{anchor or ''})"

    return LINK.sub(replaced, markdown)


# ---- The reference ---------------------------------------------------------------------------------------------------


def reference() -> dict[str, str]:
    """The pages of the reference, by name."""
    import kadapter_hf
    from kadapter_hf.modeling.modeling_kadapter import KAdapterPreTrainedModel

    names = {name: getattr(kadapter_hf, name) for name in kadapter_hf.__all__}
    models = [
        name for name, item in names.items() if isinstance(item, type) and issubclass(item, KAdapterPreTrainedModel)
    ]
    configs = [name for name in names if name.endswith("Config")]
    pipelines = [name for name in names if "Pipeline" in name or name == "draw_tree"]
    errors = [name for name, item in names.items() if isinstance(item, type) and issubclass(item, Exception)]
    heads = [name for name in models if name not in ("KAdapterPreTrainedModel", "HeadModel")]
    rest = [name for name in names if name not in {*heads, *configs, *pipelines, *errors}]
    added = "\n\n".join(documented(f"{module}.{name}") for module, found in ADDED.items() for name in found)
    # Named here, as importing the module needs Gradio.
    app = "\n\n".join(documented(f"kadapter_hf.app.{name}") for name in ("build", "write_space"))
    base = documented("kadapter_hf.modeling.modeling_kadapter.KAdapterPreTrainedModel")
    base += "\n    options:\n      inherited_members: true\n"  # most of its methods are in mixins
    return {
        "reference/models.md": f"# Models\n\n## Every model\n\n{base}\n\n## Methods added by the package\n\n"
        f"Models that are loaded with the code of their repository lack them.\n\n{added}\n\n## Classes\n\n{public(heads)}",
        "reference/configuration.md": f"# Configuration\n\n{public(configs)}",
        "reference/pipelines.md": f"# Pipelines\n\n{public(pipelines)}",
        "reference/extending.md": f"# Extending\n\n{public(rest)}\n\n## Errors\n\n{public(errors)}",
        "reference/modules.md": "# Modules\n\n"
        + "\n\n".join(map(module_part, kadapter_hf._SUBMODULES))
        + f"\n\n## kadapter_hf.app\n\n[The page](../app.md) of `kadapter app`; it needs the extra `app`.\n\n{app}",
        "reference/commands.md": commands(),
    }


def documented(path: str) -> str:
    return f"::: {path}"


def public(names: list[str]) -> str:
    return "\n\n".join(documented(f"kadapter_hf.{name}") for name in names)


def module_part(name: str) -> str:
    """The section of a public submodule: its docstring, then its classes and functions."""
    module = import_module(f"kadapter_hf.{name}")
    items = "\n\n".join(documented(f"{module.__name__}.{item}") for item in own_names(module))
    return f"## kadapter_hf.{name}\n\n{module.__doc__ or ''}\n\n{items}"


def own_names(module: ModuleType) -> list[str]:
    """What a module exports, or else its public classes and functions; of a package also those of its modules."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    inside = module.__name__ if hasattr(module, "__path__") else None
    return [
        name
        for name, item in vars(module).items()
        if not name.startswith("_")
        and callable(item)
        and (origin := getattr(item, "__module__", None))
        and (origin == module.__name__ or inside and origin.startswith(f"{inside}."))
    ]


# ---- Commands --------------------------------------------------------------------------------------------------------


def commands() -> str:
    """The commands and their flags, as the parsers have them."""
    from transformers import TrainingArguments
    from typer.main import get_command

    (script,) = entry_points(group="console_scripts", name="kadapter")
    parts = [
        "# Commands and flags",
        "[The command line](../command-line.md) has examples and what the commands print.",
        "Flags of `pretrain`, `finetune`, `reproduce` and `probe` may have hyphens in the place of underscores.",
    ]
    for words, command in leaves("kadapter", get_command(script.load())):
        parts += [f"## {words}", command.help or "", *typer_table(command)]
        parts += [part for dataclass in own_arguments(words) for part in dataclass_table(*dataclass)]
    parts += ["## Flags of TrainingArguments", "Those of `pretrain` and `finetune`, besides their own."]
    parts += dataclass_table("", TrainingArguments)
    return "\n\n".join(parts)


def leaves(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command below a group, with the words it is called by."""
    if not hasattr(command, "commands"):
        yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(f"{words} {name}", below)


def own_arguments(words: str) -> list[tuple[str, type]]:
    """The dataclasses of flags of the commands whose parser is transformers'."""
    from kadapter_hf.finetuning import FinetuningArguments
    from kadapter_hf.multitask import MultitaskArguments
    from kadapter_hf.pretraining import PretrainingArguments
    from kadapter_hf.probing import ProbingArguments
    from kadapter_hf.reproduction import ReproductionArguments
    from kadapter_hf.tasks import TASKS

    options: dict[type, list[str]] = {}
    for name, task in TASKS.items():
        options.setdefault(task.options, []).append(f"`{name}`")
    of_tasks = [(f"Further flags of {', '.join(names)}", kind) for kind, names in options.items()]
    found: dict[str, list[tuple[str, type]]] = {
        "kadapter pretrain": [("", PretrainingArguments), ("kadapter pretrain multitask", MultitaskArguments)],
        "kadapter finetune": [("", FinetuningArguments), *of_tasks],
        "kadapter reproduce": [("", ReproductionArguments)],
        "kadapter probe": [("", ProbingArguments)],
    }
    return found.get(words, [])


def typer_table(command: Any) -> list[str]:
    rows = []
    for parameter in command.params:
        name = ", ".join(parameter.opts + parameter.secondary_opts)
        if getattr(parameter, "param_type_name", "") == "argument":
            name = parameter.name.upper()
        shown = "" if parameter.required or parameter.default in (None, False) else parameter.default
        rows.append((name, shown, getattr(parameter, "help", None) or ""))
    return [table(rows)] if rows else []


def dataclass_table(title: str, dataclass: type) -> list[str]:
    from transformers import HfArgumentParser

    rows = []
    for action in HfArgumentParser(dataclass)._actions:
        if "--help" in action.option_strings:
            continue
        default = "" if action.required or action.default in (None, False, []) else action.default
        rows.append((action.option_strings[0], default, (action.help or "").replace("%%", "%")))
    return [*([f"### {title}"] if title else []), table(rows)] if rows else []


def table(rows: list[tuple[str, Any, str]]) -> str:
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for name, default, help in rows:
        text = " ".join(str(help).split()).replace("|", "\\|").replace("<", "&lt;")
        shown = f"`{getattr(default, 'value', default)}`" if default != "" else ""
        lines.append(f"| `{name}` | {shown} | {text} |")
    return "\n".join(lines)
