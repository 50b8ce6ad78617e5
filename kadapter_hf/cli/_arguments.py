"""Arguments that several commands have, and their checks."""

import re
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperCommand

from ._flags import quick_parser
from ._names import (
    TASKS,
    data_problem,
    did_you_mean,
    is_repo_id,
    one_line,
    output_problem,
    source_problem,
)
from ._output import fail


Split = Literal["train", "validation", "test"]


def check_new(output: Path) -> None:
    """Exits unless `output` is an empty folder, or can be created."""
    problem = output_problem(output)
    if problem is not None:
        fail(problem)


def check_name(name: str, known: Collection[str], argument: str | None = None) -> None:
    """Exits if `name` is not one of the known names; `argument` is what --help calls it."""
    if name not in known:
        message = f"'{name}' is not one of {', '.join(known)}.{did_you_mean(name, known)}"
        if name.startswith("-") and argument is not None:
            message = f"the {argument} comes before all flags: `{next(iter(known))} {name} …`."
        raise typer.BadParameter(message, param_hint=argument)


Source = TypeVar("Source", str, list[str], None)


def existing(source: Source) -> Source:
    """Refuses what can't be the place of a model or an adapter; of several, each may be NAME=SOURCE."""
    return _checked(source, source_problem)


def existing_data(source: str) -> str:
    """Refuses what can't be the place of data."""
    return _checked(source, data_problem)


def _checked(source: Source, problem_of: Callable[[str], str | None]) -> Source:
    sources: list[str] = [source] if isinstance(source, str) else source or []
    for one in sources:
        if not one:  # as a shell variable that is not set; it would be taken for the current folder
            raise typer.BadParameter("it is empty.")
        if problem := problem_of(one):
            fail(problem)
    return source


def starting(known: Collection[str]) -> Callable[[str], list[str]]:
    """The shell completion of an argument whose value is one of these names."""
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


class FlagCommand(TyperCommand):
    """A command whose flags are those of `quick_parser`: the shell completes them, too."""

    def shell_complete(self, ctx: typer.Context, incomplete: str) -> list[Any]:  # type: ignore[override]
        found: list[Any] = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            command, name = str(self.name), ctx.params.get("objective") or ctx.params.get("task") or ""
            parsers = [quick_parser(command, name), quick_parser("finetune") if command == "reproduce" else None]
            actions = {action.option_strings[0]: action for parser in parsers if parser for action in parser._actions}
            for action in actions.values():
                # Flags can be written with underscores or hyphens; one of both is enough.
                flag = next((flag for flag in action.option_strings if flag.startswith(incomplete)), None)
                if flag is not None:
                    first, _, _ = one_line(action.help or "").partition(". ")
                    found.append(SimpleNamespace(value=flag, type="plain", help=first))
        return found


def checked_task(task: str | None) -> str | None:
    if task is not None:
        check_name(task, TASKS)
    return task


def _checked_repo(repo: str) -> str:
    if not is_repo_id(repo):
        raise typer.BadParameter(f"'{repo}' is not a valid name of a repository on the Hub (owner/name).")
    return repo


def _checked_token(token: str | None) -> str | None:
    # The HTTP client would reject it too, but print the token.
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise typer.BadParameter("not a valid token: it is empty, or contains a space or another invalid character.")
    return token


Repo = Annotated[
    str, typer.Argument(callback=_checked_repo, show_default=False, help="A repository on the Hub, owner/name.")
]
Revision = Annotated[
    str | None, typer.Option(show_default=False, help="A branch, tag or commit of the repository on the Hub.")
]
Token = Annotated[
    str | None,
    typer.Option(
        callback=_checked_token,
        show_default=False,
        help="Access token for the Hub. Default: HF_TOKEN or the token of `hf auth login`.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
