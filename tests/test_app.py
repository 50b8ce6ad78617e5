"""The web page of `kadapter app`, in a headless browser."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import disturb, free_port, set_seed, small_adapter
from transformers import AutoModelForMaskedLM
from typer.testing import CliRunner

from kadapter_hf import (
    KAdapterConfigError,
    KAdapterForDependencyParsing,
    KAdapterForEntityTyping,
    KAdapterForMaskedLM,
    KAdapterForQuestionAnswering,
    KAdapterForRelationClassification,
    KAdapterLoadError,
)


pytestmark = pytest.mark.slow
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
LABELS = {
    "typing": ["person", "place", "work"],
    "relation": ["capital of", "country", "none"],
    "parser": ["det", "nsubj", "root"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, backbones, tokenizer) -> dict[str, str]:
    """A model for each tab, whose predictions depend on its adapters."""
    folder = tmp_path_factory.mktemp("models")
    set_seed(0)
    adapters = {"factual": small_adapter(), "linguistic": small_adapter()}
    classes = {
        "typing": (KAdapterForEntityTyping, "gate"),
        "relation": (KAdapterForRelationClassification, "attention"),
        "lm": (KAdapterForMaskedLM, "add"),
        "parser": (KAdapterForDependencyParsing, "concat"),
        "answers": (KAdapterForQuestionAnswering, "concat"),
    }
    for name, (model_class, fusion) in classes.items():
        labels = LABELS.get(name)
        names = {} if labels is None else {"id2label": dict(enumerate(labels)), "num_labels": len(labels)}
        model = model_class.from_backbone(backbones["roberta"], adapters, fusion=fusion, **names)
        disturb(model.adapters)
        with torch.no_grad():
            for parameter in model.head_parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in classes}


@pytest.fixture(scope="module")
def page(models) -> Iterator:
    """The page in Chromium, with a tab for each model."""
    from playwright.sync_api import sync_playwright

    from kadapter_hf.app import build

    chromium = shutil.which("chromium")
    assert chromium, "these tests need Chromium: apt-get install chromium"
    shown = build([models[name] for name in ("typing", "relation", "lm", "parser")])
    _, url, _ = shown.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1200, "height": 1400})
        opened.set_default_timeout(20_000)
        opened.goto(url)
        yield opened
        browser.close()
    shown.close()


class Tab:
    """A tab of the page, as a user sees it."""

    def __init__(self, page, name: str):
        self.page = page
        page.get_by_role("tab", name=name).click()
        self.panel = page.get_by_role("tabpanel").locator("visible=true")

    def predict(self, text: str | None = None) -> None:
        if text is not None:
            self.panel.get_by_label("Sentence").fill(text)
        self.panel.get_by_role("button", name="Predict").click()

    def scores(self, which: str) -> dict[str, str]:
        """The labels with their percentages in the box of this title."""
        box = self.panel.locator(".block", has=self.page.get_by_text(f": {which}", exact=False)).last
        box.locator("dl, .confidence-set").first.wait_for()
        lines = [line.strip() for line in box.inner_text().splitlines() if line.strip()]
        return {lines[place - 1]: line for place, line in enumerate(lines) if line.endswith("%") and place}

    def rows(self) -> list[str]:
        """The names in the table of contributions."""
        self.page.wait_for_timeout(1500)
        return [text for text in ("factual", "linguistic") if self.panel.get_by_role("gridcell", name=text).count()]


def test_types_of_the_marked_entity_are_those_of_the_pipeline(page, models):
    from transformers import pipeline

    text = "the capital of italy is rome"
    tab = Tab(page, "typing")
    tab.predict("the capital of italy is [rome]")
    pipe = pipeline("entity-typing", models["typing"])
    expected = pipe({"text": text, "entity": [24, 28]}, threshold=-1.0, top_k=5)
    assert tab.scores("with these adapters") == {found["label"]: f"{found['score']:.0%}" for found in expected}
    alone = pipe({"text": text, "entity": [24, 28]}, threshold=-1.0, top_k=5, knowledge_adapters=[])
    assert tab.scores("backbone alone") == {found["label"]: f"{found['score']:.0%}" for found in alone}


def test_adapter_that_is_switched_off_no_longer_takes_part(page, models):
    tab = Tab(page, "typing")
    tab.predict("the river of [rome]")
    assert tab.rows() == ["factual", "linguistic"]
    tab.panel.get_by_label("linguistic").uncheck()
    page.wait_for_timeout(1500)
    assert tab.rows() == ["factual"]
    tab.panel.get_by_label("factual").uncheck()
    page.wait_for_timeout(1500)
    assert tab.rows() == [] and tab.scores("with these adapters") == tab.scores("backbone alone")
    for name in ("factual", "linguistic"):
        tab.panel.get_by_label(name).check()


def test_relations_words_and_trees_are_shown_beside_the_backbones(page, models):
    from transformers import pipeline

    tab = Tab(page, "relation")
    tab.predict("[rome] is the capital of [italy]")
    assert set(tab.scores("with these adapters")) == set(LABELS["relation"]) == set(tab.scores("backbone alone"))
    tab = Tab(page, "lm")
    tab.predict("rome is the <mask> of italy")
    pipe = pipeline("fill-mask", models["lm"])
    expected = {found["token_str"] or f"token {found['token']}" for found in pipe("rome is the <mask> of italy")}
    assert set(tab.scores("with these adapters")) == expected
    tab = Tab(page, "parser")
    tab.predict("the danube ran to vienna .")
    tab.panel.locator("svg.displacy").nth(1).wait_for()
    assert tab.panel.locator("svg.displacy").count() == 2


def test_long_tree_is_as_wide_as_its_column_and_has_a_title(page):
    tab = Tab(page, "parser")
    tab.predict("the danube ran to vienna and " * 4 + ".")
    drawing = tab.panel.locator("svg.displacy", has_text="and").first
    drawing.wait_for()
    tree, column = drawing.bounding_box(), drawing.locator("xpath=..").bounding_box()
    assert tree["width"] <= column["width"] and tree["height"] < tree["width"]
    for which in ("with these adapters", "backbone alone"):
        assert tab.panel.get_by_text(f"Dependency tree: {which}").is_visible()


@pytest.mark.parametrize(
    ("tab", "text", "message"),
    [
        ("typing", "no entity", "Put one entity in brackets, as in: We saw"),
        ("typing", "[one] and [two]", "Put one entity in brackets"),
        ("relation", "[rome] alone", "Put 2 entities in brackets"),
        ("lm", "no mask", "Put one <mask> where a word is to be filled in"),
        ("parser", "  ", "Type a sentence first"),
        ("lm", "<mask> " + "cat " * 200, "The text has more than 64 tokens, which is the most that the model takes"),
        ("parser", "cat " * 200, "The text has more than 64 tokens"),
        ("typing", "[the] " + "cat " * 200, None),  # longer than the model takes: the pipeline keeps the entity's part
    ],
)
def test_bad_input_is_an_error_in_one_sentence(tab, text, message, page):
    Tab(page, tab).predict(text)
    if message is None:
        page.wait_for_timeout(1500)
        assert page.get_by_test_id("toast-body").count() == 0
        return
    page.get_by_text(message).first.wait_for()
    for close in page.get_by_test_id("toast-close").all():
        close.click()


def test_error_leaves_no_earlier_prediction(page):
    tab = Tab(page, "typing")
    tab.predict("[rome] is old")
    assert tab.scores("with these adapters") and tab.rows()
    tab.predict("no entity")
    page.get_by_text("Put one entity in brackets").first.wait_for()
    assert tab.rows() == [] and "%" not in tab.panel.inner_text()
    page.get_by_test_id("toast-close").first.click()


def test_page_can_be_used_with_the_keyboard_alone(page):
    tab = Tab(page, "typing")
    box = tab.panel.get_by_label("Sentence")
    box.focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("[vienna] is old")
    page.keyboard.press("Enter")
    tab.scores("with these adapters")
    focused = []
    for _ in range(3):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.closest('label, button')?.innerText.trim()"))
    assert focused == ["factual", "linguistic", "Predict"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    page.wait_for_timeout(1500)
    assert tab.rows() == ["factual"]
    page.keyboard.press("Space")


@pytest.mark.parametrize(
    ("text", "subject", "object_"),
    [
        ("[Vienna] is in [Austria].", [0, 6], [13, 20]),
        ("[2: Austria] has [1: Vienna].", [12, 18], [0, 7]),
        ("[ Wien ]\N{GRINNING FACE}[Österreich]", [0, 4], [5, 15]),
    ],
)
def test_brackets_are_spans_of_the_text_without_them(text, subject, object_):
    from kadapter_hf.app import VIEWS, unbracketed

    found = unbracketed(text, VIEWS["KAdapterForRelationClassification"])
    assert "[" not in found["text"] and (found["subject"], found["object"]) == (subject, object_)


@pytest.mark.parametrize("text", ["[a] [b] [c]", "[a] b]", "[] [b]", "[1: a] [1: b]", "[1: a] [3: b]", "[[a] [b]"])
def test_brackets_that_are_not_two_entities_are_refused(text):
    from kadapter_hf.app import VIEWS, unbracketed

    with pytest.raises(ValueError, match="Put 2 entities in brackets"):
        unbracketed(text, VIEWS["KAdapterForRelationClassification"])


@pytest.mark.parametrize("text", ["[1: a] [b]", "[a] [2: b]"])
def test_brackets_of_which_one_is_numbered_are_refused(text):
    from kadapter_hf.app import VIEWS, unbracketed

    with pytest.raises(ValueError, match=r"Number both entities, \[1: …\] and \[2: …\], or neither."):
        unbracketed(text, VIEWS["KAdapterForRelationClassification"])


def test_models_that_the_page_can_not_show_are_refused(models, backbones, tmp_path):
    from kadapter_hf.app import build

    with pytest.raises(KAdapterLoadError, match="is a KAdapterForQuestionAnswering; the app shows"):
        build(models["answers"])
    AutoModelForMaskedLM.from_pretrained(backbones["roberta"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no K-Adapter, but a model of the type roberta"):
        build(str(tmp_path))


def test_models_can_be_paths_and_one_is_needed(models, tmp_path):
    from kadapter_hf.app import build, write_space

    for sources in (Path(models["typing"]), [Path(models["typing"])]):
        assert {block.label for block in build(sources).blocks.values() if type(block).__name__ == "Tab"} == {"typing"}
    for make in (build, lambda sources: write_space(sources, tmp_path / "space")):
        with pytest.raises(KAdapterConfigError, match="needs a model: name a folder or a repository"):
            make([])
    write_space("user/typing", str(tmp_path / "space"))
    assert "build(['user/typing'])" in (tmp_path / "space" / "app.py").read_text()
    with pytest.raises(KAdapterLoadError, match="exists and is not empty"):
        write_space("user/relation", tmp_path / "space")


def test_space_has_the_files_that_the_hub_runs(tmp_path):
    from kadapter_cli import app

    folder = tmp_path / "space"
    done = CliRunner().invoke(app, ["app", "user/typing", "user/relation", "--space", str(folder)])
    assert done.exit_code == 0 and "hf upload" in done.output
    program = ast.parse((folder / "app.py").read_text())
    assert "build(['user/typing', 'user/relation']).launch()" in ast.unparse(program)
    card = (folder / "README.md").read_text()
    assert "sdk: gradio" in card and "app_file: app.py" in card and "- user/typing" in card


@pytest.mark.parametrize(
    ("version", "required"), [("1.2.0", "kadapter-hf[app]==1.2.0\n"), ("1.2.0.dev0", "kadapter-hf[app]\n")]
)
def test_space_requires_the_version_that_made_it_if_that_is_released(version, required, monkeypatch, tmp_path):
    from kadapter_hf import app

    monkeypatch.setattr(app, "__version__", version)
    app.write_space("user/typing", tmp_path / "space")
    assert (tmp_path / "space" / "requirements.txt").read_text() == required


def test_space_of_what_is_no_repository_is_refused(models, tmp_path):
    from kadapter_hf.app import write_space

    for source in (models["typing"], "notarepo", "missing/folder/of-a-model"):
        with pytest.raises(KAdapterConfigError, match=r"is no repository there \(owner/name\): push it first"):
            write_space([source], tmp_path / "space")
    assert not Path(tmp_path, "space").exists()
