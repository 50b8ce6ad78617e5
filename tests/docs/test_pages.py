"""What the pages and the site must contain, and that the site is built without a network."""

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import ROOT
from conftest import load_script

import kadapter_hf


ERRORS = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
SOURCES = [path for folder in ("kadapter_hf", "modeling", "conversion") for path in (ROOT / folder).rglob("*.py")]


def error_classes() -> list[str]:
    """The public exception classes that the package defines."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES)
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found, bases = (
        set(),
        {"Exception", "BaseException", "ValueError", "OSError", "ImportError", "RuntimeError", "TypeError"},
    )
    while True:
        names = {node.name for node in classes for base in node.bases if ast.unparse(base) in bases | found}
        if names <= found:
            return sorted(name for name in found if not name.startswith("_"))
        found |= names


def test_every_error_class_has_an_entry():
    entries = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", ERRORS, flags=re.DOTALL | re.MULTILINE))
    names = error_classes()
    assert names and not [name for name in names if "**Cure:**" not in entries.get(name, "")]


def messages() -> str:
    """All texts of the package, a line each, with … for what is filled in."""
    lines = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                lines.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
    return "\n".join(" ".join(line.split()) for line in lines)


def excerpts() -> list[str]:
    rows = re.findall(r"^\| (?:warning: )?((?:`[^`]+`(?:, | / )?)+) \|", ERRORS, flags=re.MULTILINE)
    return [excerpt for row in rows for excerpt in re.findall(r"`([^`]+)`", row)]


def test_the_messages_that_are_explained_are_those_of_the_package():
    texts, unknown = messages(), []
    for excerpt in excerpts():
        # Names and numbers in an excerpt are examples of what is filled in.
        parts = [part for part in re.split(r"…|'[^']*'|\d+|\([^)]*\)", excerpt) if part.strip()]
        pattern = "[^\n]*".join(re.escape(part.strip()) for part in parts)
        if not re.search(pattern, texts):
            unknown.append(excerpt)
    assert len(excerpts()) > 30 and not unknown


def test_the_picture_is_what_its_script_draws():
    script = load_script(ROOT / "docs" / "architecture.py")
    assert (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8") == script.drawing()


def test_the_readme_on_pypi_refers_to_no_file_of_the_repository():
    command = [sys.executable, "setup.py", "-q", "--long-description"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pip install" in text and re.findall(r"\]\((?!https?:)", text) == []


def test_notebooks_have_no_outputs():
    for path in (ROOT / "examples" / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site. Any connection is an error while it is built."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    program = (
        "import socket, sys\n"
        "def refused(*address): raise OSError(f'no network: {address}')\n"
        "socket.socket.connect = socket.getaddrinfo = refused\n"
        "from mkdocs.__main__ import cli\n"
        f"cli(['build', '--strict', '--quiet', '--site-dir', {str(folder)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(https?://[^\"'>\s]+)", text)
        loaded += re.findall(r"<link[^>]*\shref=[\"']?(https?://[^\"'>\s]+)[^>]*rel=[\"']?stylesheet", text)
        assert not loaded, page


@pytest.mark.slow
def test_every_page_is_in_the_navigation(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    pages = [path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "404.html"]
    missing = [page for page in pages if page != "index.html" and not re.search(rf'href="?{re.escape(page)}', home)]
    assert not missing


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    reference = "\n".join(path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html"))
    anchors = set(re.findall(r'\bid="?(kadapter_hf[\w.]*)', reference))
    wanted = {f"kadapter_hf.{name}" for name in kadapter_hf.__all__} | {
        "kadapter_hf.app.build",
        "kadapter_hf.app.write_space",
    }
    for name in set(dir(kadapter_hf)) - {*kadapter_hf.__all__, "__version__"}:
        module = importlib.import_module(f"kadapter_hf.{name}")
        own = [item for item, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        public = getattr(module, "__all__", [item for item in own if not item.startswith("_")])
        wanted |= {f"{module.__name__}.{item}" for item in public}
    fields = kadapter_hf.KnowledgeAdapterConfig.__dataclass_fields__.keys() - {"newer_fields"}
    text = re.sub(r"<[^>]+>", "", reference)
    assert not {name for name in fields if not re.search(rf"\b{name}\b", text)}
    assert not wanted - anchors


@pytest.mark.slow
def test_every_command_and_flag_is_in_the_reference(site):
    from transformers import HfArgumentParser

    from kadapter_hf.finetuning import FinetuningArguments
    from kadapter_hf.pretraining import PretrainingArguments

    text = re.sub(r"<[^>]+>", "", (site / "reference" / "commands.html").read_text(encoding="utf-8"))
    commands = [module.name for module in pkgutil.iter_modules([str(ROOT / "kadapter_hf" / "cli")])]
    assert not [name for name in commands if not name.startswith("_") and f"kadapter {name}" not in text]
    for dataclass in (FinetuningArguments, PretrainingArguments):
        flags = [action.option_strings[0] for action in HfArgumentParser(dataclass)._actions]
        assert not [flag for flag in flags if flag != "-h" and flag not in text]
