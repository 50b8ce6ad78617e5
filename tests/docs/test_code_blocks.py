"""
Every code block of the documentation runs as printed, with tiny models and data under the names that it uses.

`python` and `bash` blocks run, `console` blocks also print what is below their commands; the others are not code. The blocks
of a page run in order, in one folder, in a process whose Hub is that of the tests.
"""

import copy
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from configparser import ConfigParser
from pathlib import Path

import pytest
from blocks import NOT_RUN, ROOT, RUN, blocks_of, commands_of, matches, normalised, pages, run_page
from stand_ins import save_backbones, save_models
from typer.main import get_command

from kadapter_cli import app


sys.path.append(str(ROOT / "tests" / "hub"))
from hub_server import HubServer  # noqa: E402


# Pages whose blocks take more than a few seconds.
SLOW = {
    "docs/command-line.md",
    "docs/export.md",
    "docs/extend.md",
    "docs/finetuning.md",
    "docs/lama.md",
    "docs/migrate.md",
    "docs/reproduction.md",
    "examples/README.md",
}


def of_page(page: str):
    return pytest.param(page, marks=[pytest.mark.slow] if page in SLOW or page.startswith("docs/tasks/") else [])


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server
    assert not server.errors


@pytest.fixture(scope="module")
def reader(hub, tmp_path_factory):
    """`reader(blocks)`: runs a page in the process of someone who follows it."""
    folder = tmp_path_factory.mktemp("documentation")
    for name, backbone in save_backbones(folder).items():
        hub.put(name, {path.name: path.read_bytes() for path in backbone.iterdir()})
    scripts = Path(sys.executable).parent
    environment = hub.environment(folder / "cache", "token") | {"COLUMNS": "100", "TERMINAL_WIDTH": "100"}
    environment |= {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - environment.keys():
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(save_models, str(folder)).result()  # starts the process, which keeps this environment
    repositories = copy.deepcopy(hub.repositories)

    def read(page: str) -> None:
        hub.repositories = copy.deepcopy(repositories)
        place = folder / "pages" / re.sub(r"\W", "-", page)
        place.mkdir(parents=True)
        (place / "examples").symlink_to(ROOT / "examples")
        blocks = [block for block in blocks_of(page) if block.language in RUN]
        pool.submit(run_page, blocks, str(place), str(folder)).result()

    yield read
    pool.shutdown()


@pytest.mark.parametrize(
    "page", [of_page(page) for page in pages() if any(b.language in RUN for b in blocks_of(page))]
)
def test_the_blocks_of_a_page_run(page, reader):
    reader(page)


def test_every_command_is_run_with_its_output_on_the_page_of_commands():
    blocks = [block for block in blocks_of("docs/command-line.md") if block.language == "console"]
    run = {command.split()[1] for block in blocks for command, output in commands_of(block) if output.strip()}
    assert get_command(app).commands.keys() <= run


@pytest.mark.parametrize("page", pages())
def test_every_block_says_what_it_is(page):
    unknown = [
        f"{block.place}: '{block.language}'" for block in blocks_of(page) if block.language not in (*RUN, *NOT_RUN)
    ]
    assert not unknown, f"the language of a block is one of {', '.join((*RUN, *NOT_RUN))}, and not as in {unknown}"


@pytest.mark.parametrize("page", pages())
def test_every_extra_that_a_page_installs_exists(page):
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    known = set(setup["options.extras_require"])
    wanted = re.findall(r"kadapter-hf\[([\w,]+)\]", (ROOT / page).read_text(encoding="utf-8"))
    assert {extra for extras in wanted for extra in extras.split(",")} <= known


def test_output_is_compared_without_what_varies():
    page = normalised("┏━━━━━┓\n3 rows of 1,200  in data/fewrel (12.5 MB), commit 8d3c91ab…\n…\nend")
    assert matches(page, normalised("┏━━┓\n4 rows of 7 in /tmp/x/data/fewrel (900 kB), commit 77ab00ff00\na\nb\nend"))
    assert matches(page, normalised("┏━━┓\n4 rows of 7 in fewrel (1 kB), commit 77ab00ff00\nend"))
    assert not matches(page, normalised("┏━━┓\n4 rows of 7 in trex (9 kB), commit 77ab00ff00\na\nend"))
