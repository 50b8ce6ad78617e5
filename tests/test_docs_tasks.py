"""The programs in docs/finetuning.md and docs/inference.md run as printed, with tiny models under the names they use."""

import re
import sys
from pathlib import Path

import pytest
from conftest import batch, small_adapter

from kadapter_hf import (
    KAdapterForDependencyParsing,
    KAdapterForEntityTyping,
    KAdapterForQuestionAnswering,
    KAdapterForRelationClassification,
    KAdapterModel,
)


DOCS = Path(__file__).parents[1] / "docs"
sys.path.append(str(Path(__file__).parent / "tasks"))
from samples import write_sample  # noqa: E402


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, backbone, tokenizer, monkeypatch):
    """The current folder, with the files and models of the pages."""
    monkeypatch.chdir(tmp_path)
    write_sample("open-entity", tmp_path / "OpenEntity")
    models = {
        "factual-adapter": (KAdapterModel, None),
        "linguistic-adapter": (KAdapterForDependencyParsing, None),
        "open-entity-model": (KAdapterForEntityTyping, "open-entity"),
        "tacred-model": (KAdapterForRelationClassification, "tacred"),
        "search-qa-model": (KAdapterForQuestionAnswering, "search-qa"),
    }
    for name, (model_class, task) in models.items():
        adapter = name.removesuffix("-adapter") if task is None else "factual"
        model = model_class.from_backbone(backbone, {adapter: small_adapter()}, task=task and {"name": task})
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    return tmp_path


@pytest.mark.parametrize(
    "page, number",
    [(page, number) for page in ("finetuning.md", "inference.md") for number in range(len(programs(page)))],
)
def test_a_program_runs_as_printed(page, number, folder, backbone):
    program = programs(page)[number].replace("FacebookAI/roberta-large", backbone)
    if "Trainer(" in program:
        program = program.replace('"out", ', '"out", max_steps=1, use_cpu=True, report_to="none", ')
    adapters = {"factual": small_adapter(), "linguistic": small_adapter()}
    model = KAdapterModel.from_backbone(backbone, adapters, fusion="attention")
    exec(program, {"model": model, "inputs": batch(), "batch": batch()})  # which some programs don't make
