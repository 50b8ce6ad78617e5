"""The code blocks of the documentation, and how each kind is run."""

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
import traceback
from dataclasses import dataclass, replace
from pathlib import Path


ROOT = Path(__file__).parents[2]
RUN = ("python", "bash", "console")
NOT_RUN = ("text", "json", "csv", "dockerfile", "toml", "yaml")
FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,})(?P<language>[^`\s]*)[^`]*")
# What makes the programs short, put before the flags of the page, so that these win; but for the number of steps.
SHORT = "--max_steps 1 --use_cpu true --report_to none "
SMALL = "--adapter_hidden_size 16 --adapter_num_attention_heads 2 --adapter_intermediate_size 24 "
FLAGS = (
    (r"\bkadapter pretrain multitask ", SHORT),
    (r"\bkadapter pretrain (?!multitask|--help)[\w-]+ ", SHORT + SMALL),
    (r"\bkadapter finetune (?!--help)[\w-]+ ", SHORT),
    (r"\bkadapter reproduce (?!--help)", "--models backbone untrained "),
    (r"\bkadapter reproduce (?!--help)(?=[^\n]*--data (?!lama))", SHORT + "--max_length 64 "),
    (r"\bpython examples/(run_(?!lama)\w+|search_hyperparameters)\.py ", SHORT),
    (r"\bpython examples/search_hyperparameters\.py ", "--trials 1 "),
    (r"\bpython examples/demo\.py ?", "--max_steps 1 --seeds 1 "),
    (r"\bkadapter convert ", "--backbone backbone "),  # roberta-large's configuration is part of the package
)
TRAINING = 'max_steps=1, use_cpu=True, report_to="none"'
SMALL_CONFIG = "hidden_size=16, num_attention_heads=2, intermediate_size=24"


@dataclass(frozen=True)
class Block:
    """A code block; `line` is that of its first line of code in the page."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Every page, relative to the repository."""
    docs = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", "CONTRIBUTING.md", "examples/README.md", *docs]


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in order; also those in lists, whose lines are indented."""
    blocks, opened, content = [], None, []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        found = FENCE.fullmatch(line)
        if opened is None and found:
            opened, first, content = found, number + 1, []
        elif opened is not None and line.strip() == opened["fence"]:
            blocks.append(Block(page, first, opened["language"], textwrap.dedent("\n".join(content)) + "\n"))
            opened = None
        elif opened is not None:
            content.append(line)
    assert opened is None, f"{page}: the code block in line {first - 1} does not end"
    return blocks


# ---- Running, in a process whose Hub is that of the tests ------------------------------------------------------------


def run_page(blocks: list[Block], folder: str, made: str) -> None:
    """
    Runs the blocks of a page in order, in one folder and with one set of variables.

    Args:
        made: the folder with the models that stand in for those of the page.

    Raises:
        AssertionError: a block failed; the message has its page and line.
    """
    import torch
    from stand_ins import provide

    from kadapter_hf.modeling.fusion_kadapter import FUSIONS
    from kadapter_hf.modeling.registry_kadapter import HEADS
    from kadapter_hf.objectives import OBJECTIVES
    from kadapter_hf.tasks import TASKS

    registries = [(registry, dict(registry)) for registry in (HEADS, FUSIONS, OBJECTIVES, TASKS)]
    modules, path, before = set(sys.modules), list(sys.path), os.getcwd()
    os.chdir(folder)
    sys.path.insert(0, folder)
    torch.manual_seed(0)
    variables, placed = {"__name__": "__main__"}, set()
    try:
        for block in map(shortened, blocks):
            provide(block, Path(folder), Path(made), placed)
            run(block, variables)
    finally:
        os.chdir(before)
        sys.path[:] = path
        for registry, content in registries:
            registry.clear()
            registry.update(content)
        for name in set(sys.modules) - modules:
            if (Path(folder) / f"{name}.py").exists():
                del sys.modules[name]


def shortened(block: Block) -> Block:
    """The same program with little to do."""
    text = block.text
    if block.language == "python":
        text = re.sub(r"\bTrainingArguments\(\s*([^,()]+)", rf"TrainingArguments(\1, {TRAINING}", text)
        text = text.replace("KnowledgeAdapterConfig()", f"KnowledgeAdapterConfig({SMALL_CONFIG})")
    elif block.language == "console":  # only its commands, as the output may name others
        text = re.sub(r"^\$ (?:.*\\\n)*.*", lambda found: shortened_commands(found[0]), text, flags=re.MULTILINE)
    else:
        text = shortened_commands(text)
    return replace(block, text=text)


def shortened_commands(text: str) -> str:
    text = re.sub(r"--max_steps \d+|(?<=--seeds 1)( \d+)+|\\\n", " ", text)
    for pattern, flags in FLAGS:
        text = re.sub(pattern, lambda found, flags=flags: found[0] + flags, text)
    return text


def run(block: Block, variables: dict) -> None:
    if block.language == "python":
        run_python(block, variables)
    elif block.language == "bash":
        run_bash(block)
    elif block.language == "console":
        for command, expected in commands_of(block):
            code, output, errors = run_command(command)
            found = normalised(output if code == 0 else output + errors)
            assert matches(normalised(expected), found), (
                f"{block.place}: $ {command}\n--- the page\n{normalised(expected)}\n--- is\n{found}\n--- stderr\n{errors}"
            )


def run_python(block: Block, variables: dict) -> None:
    """A block whose first line is `# name.py` is that file, which is imported; others run in the page's variables."""
    file = re.match(r"# (\w+)\.py\n", block.text)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            if file:
                Path(f"{file[1]}.py").write_text(block.text, encoding="utf-8")
                importlib.invalidate_caches()
                importlib.import_module(file[1])
            else:
                # The lines before make those of a traceback the page's.
                exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), variables)
    except BaseException:
        raise AssertionError(f"{block.place}:\n{output.getvalue()}\n{traceback.format_exc()}") from None


def run_bash(block: Block) -> None:
    # Several commands share a shell only if one of them sets something for the others.
    as_one = re.search(r"[$]|<<|^ *(?:cd|export|for|if|while)\b|^ *\w+=", block.text, flags=re.MULTILINE)
    for command in [block.text] if as_one else logical_lines(block.text):
        code, output, errors = run_command(command)
        assert code == 0, f"{block.place}: {command}\nended with {code}:\n{output}\n{errors}"


def run_command(command: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of shell code."""
    if in_process(command):
        from typer.testing import CliRunner

        from kadapter_cli import app

        result = CliRunner().invoke(app, shlex.split(command, comments=True)[1:], prog_name="kadapter")
        crashed = result.exception is not None and not isinstance(result.exception, SystemExit)
        report = "".join(traceback.format_exception(result.exception)) if crashed else ""
        return result.exit_code, result.stdout, result.stderr + report
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def logical_lines(text: str) -> list[str]:
    """The commands of shell code, one a line; lines that end in a backslash are continued."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def in_process(command: str) -> bool:
    """Whether it is one `kadapter` command that uses nothing of the shell's."""
    try:
        words = shlex.split(command, comments=True)
        symbols = shlex.shlex(command, posix=True, punctuation_chars=True)
        symbols.whitespace_split = True
        parts = list(symbols)
    except ValueError:  # an open quotation mark
        return False
    shell = any(set(part) <= set("();<>|&") for part in parts) or any(set(word) & set("$`*") for word in words)
    return words[:1] == ["kadapter"] and not shell and len(logical_lines(command)) == 1


# ---- The output of commands ------------------------------------------------------------------------------------------


def commands_of(block: Block) -> list[tuple[str, str]]:
    """The commands of a `console` block, each with the output below it."""
    parts = re.split(r"^\$ ", block.text.replace("\\\n", " "), flags=re.MULTILINE)
    assert not parts[0].strip() and len(parts) > 1, f"{block.place}: a console block starts with `$ command`"
    return [part.partition("\n")[::2] for part in parts[1:]]


def normalised(text: str) -> str:
    """Output without what varies: numbers and hashes, the folders of paths, spaces, and the widths of tables."""
    text = re.sub(r"[\w.~+-]*/(?:[\w.+-]+/)*", "", text)
    text = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{7,64}\b…?", "HASH", text)
    text = re.sub(r"\d[\d.,:]*(e[+-]?\d+)?(?<![.,:])", "0", text)
    text = re.sub(r"\b0 ?(bytes|[kKMGT]i?B)\b", "0 B", text)
    text = re.sub(r"([━─═-])\1+", r"\1\1", text)
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def matches(expected: str, found: str) -> bool:
    """Whether they are equal; a line `…` stands for any lines."""
    lines = (r"(?:.*\n)*?" if line == "…" else re.escape(f"{line}\n") for line in expected.splitlines())
    return re.fullmatch("".join(lines), f"{found}\n" if found else "") is not None
