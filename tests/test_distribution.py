"""What `make dist` builds, installed in an environment that has the package's requirements and none of its extras."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
COMMANDS = (
    "prepare pretrain finetune reproduce probe evaluate predict export combine convert info push pull app".split()
)
CORPORA = "trex fewrel docred tacred semeval conllu".split()
# Each of these needs an extra: the arguments of the command, the library that is missing, and the extra.
NEEDS_EXTRA = {
    "app model": ("Gradio", "app"),
    "export model --output exported": ("onnx", "export"),
    "prepare conllu trees.conllu --output prepared": ("conllu", "knowledge"),
    "prepare trex documents --output prepared": ("msgspec", "knowledge"),
}


def run(*command: str | Path, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **kwargs)


def required(
    name: str, extras: frozenset[str] = frozenset(), seen: set | None = None
) -> Iterator[metadata.Distribution]:
    """The installed distributions that one requires, directly or not, and itself."""
    seen = set() if seen is None else seen
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    found = metadata.distribution(name)
    yield found
    for text in found.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
            yield from required(requirement.name, frozenset(requirement.extras), seen)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with the source distribution and the wheel made from it."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--outdir", folder, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def linked(folder: Path, *distributions: metadata.Distribution) -> Path:
    """The programs of a new environment with distributions that are installed here, as links."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for distribution in {found.name: found for found in distributions if found.name != "kadapter-hf"}.values():
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder / "bin"


@pytest.fixture(scope="module")
def clean(built, tmp_path_factory) -> Path:
    """The programs of an environment with the wheel and what it requires."""
    programs = linked(tmp_path_factory.mktemp("clean"), *required("kadapter-hf"))
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", programs / "python"]
    done = run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel)
    assert done.returncode == 0, done.stderr
    assert "which is not installed" not in run(*pip, "check").stdout
    return programs


@pytest.fixture
def command(clean, tmp_path):
    """`command("info", …)`: runs `kadapter` there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "500"}

    def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return run(clean / "kadapter", *arguments, cwd=tmp_path, env=environment)

    return command


def test_twine_accepts_both(built):
    done = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_the_wheel_has_every_module_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    places = {"kadapter_hf": "kadapter_hf", "modeling": "kadapter_hf/modeling", "conversion": "kadapter_hf/conversion"}
    wanted = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}".replace("kadapter_hf/cli/", "kadapter_cli/")
        for folder, place in places.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".typed")
    }
    assert found == wanted


def test_the_source_distribution_has_what_it_is_built_from_and_no_data(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "modeling/heads_kadapter.py"} <= names
    assert archive.stat().st_size < 1_000_000


def test_the_package_is_imported_without_its_extras(clean, tmp_path):
    code = (
        "import kadapter_hf, importlib, kadapter_hf.metrics, kadapter_hf.finetuning, sys\n"
        "print(kadapter_hf.__file__, kadapter_hf.__version__)\n"
        "for name in ('peft', 'sklearn', 'spacy', 'conllu', 'datatrove', 'matplotlib', 'onnx'):\n"
        "    assert importlib.util.find_spec(name) is None, name"
    )
    done = run(clean / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(clean.parent) in done.stdout and metadata.version("kadapter-hf") in done.stdout


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS), *(["prepare", name] for name in CORPORA)])
def test_every_command_has_its_help(command, arguments):
    done = command(*arguments, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: kadapter" in done.stdout or "usage: kadapter" in done.stdout


@pytest.mark.parametrize("arguments", NEEDS_EXTRA)
def test_a_command_that_needs_an_extra_says_which(command, tmp_path, arguments, build, tokenizer):
    library, extra = NEEDS_EXTRA[arguments]
    build().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "trees.conllu").write_text("1\tRome\t_\t_\t_\t_\t0\troot\t_\t_\n")
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "one.json").write_text("[]")
    done = command(*arguments.split())
    assert done.returncode == 1
    assert re.fullmatch(rf"Error: .* needs {library}: pip install 'kadapter-hf\[{extra}\]'\n", done.stderr), (
        done.stderr
    )
    assert not {"exported", "prepared"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_a_notebook_runs_alone_where_the_package_is_not_installed_as_on_colab(notebook, built, tmp_path_factory):
    pytest.importorskip("nbclient", reason="the extra notebooks is not installed")
    wanted = [*required("kadapter-hf", frozenset({"demo", "knowledge"}))]
    for name in ("ipykernel", "nbclient", "pip"):
        wanted += required(name)
    programs = linked(tmp_path_factory.mktemp("colab"), *wanted)
    assert run(programs / "python", "-c", "import kadapter_hf", cwd=programs).returncode == 1
    folder = tmp_path_factory.mktemp("notebook")
    shutil.copy(notebook, folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(built)}
    execute = "from nbclient.cli import main; main()"
    done = run(programs / "python", "-c", execute, notebook.name, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
