"""Output of the commands: results, errors, logs and progress, according to --quiet, --verbose and --log_file."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from ._names import one_line


if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# What the commands print is logged here too, for --log_file.
logger = logging.getLogger("kadapter")
# A warning that says nothing about the run: how transformers will order checkpoints.
USELESS = "mtime may not be reliable on this filesystem"
LIBRARIES = ("datasets", "huggingface_hub", "transformers")


@dataclass
class Settings:
    """The options of `kadapter` itself, which are set before a command runs."""

    quiet: bool = False
    verbose: bool = False
    log_file: Path | None = None


settings = Settings()


# ---- Results --------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Prints a line that --quiet leaves out."""
    logger.info(text)
    if not settings.quiet:
        typer.echo(text)


def conclude(text: str) -> None:
    """Prints the last line: what was written, and what to do next."""
    logger.info(text)
    typer.echo(text)


def print_table(table: "RenderableType") -> None:
    """Prints a table, which --quiet leaves out."""
    from rich.console import Console

    if not settings.quiet:
        console = Console(record=True)
        console.print(table)
        logger.info(f"\n{console.export_text()}")


def print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=2))


def print_rows(console: "Console", title: str, rows: Mapping[str, str | None]) -> None:
    """Prints a table of labels and values; the rows without a value are left out."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", title=Text(one_line(title)), title_justify="left", show_header=False)
    table.columns[1].overflow = "fold"
    for label, value in rows.items():
        if value:
            table.add_row(Text(one_line(label)), Text(one_line(value)))
    console.print(table)


# ---- Errors ---------------------------------------------------------------------------------------------------------


def fail(message: str, code: int = 1) -> NoReturn:
    """Exits with a one-sentence message."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(f"Error: {message}", markup=False, highlight=False)
    raise typer.Exit(code)


@contextmanager
def plain_errors(repo: str | None = None) -> Iterator[None]:
    """
    Exits with a one-sentence message: with code 1 if an error is caused by the data, the machine or the Hub, and with 2 if
    the value of an argument is impossible.

    Args:
        repo: the repository that errors from the Hub are about.
    """
    try:
        yield
    except BrokenPipeError:  # e.g. output piped to `head`
        raise
    except Exception as error:
        if not _is_fault(error):
            raise
        from kadapter_hf.messages import sentence
        from kadapter_hf.modeling.format_kadapter import KAdapterConfigError, SavedConfigError

        usage = isinstance(error, KAdapterConfigError) and not isinstance(error, SavedConfigError)
        message = sentence(error, repo)
    else:
        return
    fail(message, 2 if usage else 1)


def _is_fault(error: Exception) -> bool:
    """Whether the data, the machine or the Hub has caused an error. Many errors of ours and of the Hub are OSErrors."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError, SafetensorsParsingError  # HTTPError is the HTTP client's
    from torch import OutOfMemoryError

    faults = (ValueError, OSError, ImportError, MemoryError)
    return isinstance(error, (*faults, OutOfMemoryError, HTTPError, SafetensorsParsingError, DatasetsError))


# ---- Logs and progress ----------------------------------------------------------------------------------------------


@contextmanager
def running(repo: str | None = None) -> Iterator[None]:
    """
    The context in which a command does its work: errors are sentences (see `plain_errors`), Ctrl-C exits with code 130, and
    logs and progress bars follow the options.
    """
    try:
        with plain_errors(repo), _logs():
            yield
    except KeyboardInterrupt as stop:
        typer.echo(str(stop) or "Stopped.", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _logs() -> Iterator[None]:
    import datasets
    from transformers.utils import logging as transformers_logging

    handlers: list[logging.Handler] = [_ConsoleHandler()]
    if settings.log_file is not None:
        handlers.append(logging.FileHandler(settings.log_file, encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours = logging.DEBUG if settings.log_file else logging.INFO
    theirs = logging.INFO if settings.verbose or settings.log_file else logging.WARNING
    levels = dict.fromkeys(LIBRARIES, theirs) | {"kadapter_hf": ours, logger.name: ours}
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in levels]
    before = [(one.level, one.propagate, one.handlers) for one in loggers]
    for one, level in zip(loggers, levels.values(), strict=True):
        one.setLevel(level)
        one.propagate, one.handlers = True, []
    for handler in handlers:
        root.addHandler(handler)
    logging.captureWarnings(True)
    # In a log file or a pipe, each update of a bar would be a line.
    hides = transformers_logging.is_progress_bar_enabled() and (settings.quiet or not sys.stderr.isatty())
    if hides:
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        yield
    except Exception:
        logger.debug("The command failed.", exc_info=True)
        raise
    finally:
        if hides:
            transformers_logging.enable_progress_bar()
            datasets.enable_progress_bars()
        logging.captureWarnings(False)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        for one, (level, propagate, theirs_before) in zip(loggers, before, strict=True):
            one.setLevel(level)
            one.propagate, one.handlers = propagate, theirs_before


class _ConsoleHandler(logging.StreamHandler):
    """Prints the records that --quiet and --verbose don't leave out, above progress bars."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == logger.name:
            return False  # is printed as it is
        if settings.quiet:
            return record.levelno >= logging.ERROR
        if settings.verbose:
            return record.levelno >= logging.INFO
        if record.name.startswith("kadapter_hf"):
            return record.levelno >= logging.INFO
        if record.name == "py.warnings" or USELESS in record.getMessage():
            return False
        return record.levelno >= logging.WARNING

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
