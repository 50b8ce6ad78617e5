"""`kadapter export`: the ONNX file on ONNX Runtime against the model in PyTorch."""

import json
import os
import sys

import pytest
import torch
from conftest import ALL_CLASSES, inputs_for
from packaging import version
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

from kadapter_cli import app
from kadapter_cli.export import show
from kadapter_hf import KAdapterForEntityTyping, KAdapterForQuestionAnswering, export
from kadapter_hf.modeling.format_kadapter import KAdapterLoadError


onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.skipif(
    version.parse(torch.__version__) < version.parse("2.9"), reason="the exporter of older versions is not supported"
)


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)], env={"COLUMNS": "500"}, prog_name="kadapter")


def on_runtime(path, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batch = {"token_type_ids": torch.zeros_like(batch["input_ids"])} | batch
    found = session.run(None, {entry.name: batch[entry.name].numpy() for entry in session.get_inputs()})
    return {entry.name: torch.from_numpy(value) for entry, value in zip(session.get_outputs(), found, strict=True)}


def assert_as_in_torch(model, path) -> None:
    """On numbers of rows and lengths of which none was exported, with padding, and on the outputs that the model has."""
    for rows, length, padding in ((1, 8, 0), (3, 21, 12), (6, 64, 1)):
        choices = 2 if "MultipleChoice" in type(model).__name__ else 1
        batch = inputs_for(type(model), rows * choices, length=length, padding=padding)
        found = on_runtime(path, batch)
        with torch.no_grad():
            wanted = {name: value for name, value in model(**batch).items() if torch.is_tensor(value)}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_every_class_computes_on_onnx_runtime_what_it_does_in_torch(model_class, build, tokenizer, tmp_path):
    model = build(model_class)
    export.export_onnx(model, tokenizer, tmp_path / "onnx")
    assert_as_in_torch(model, tmp_path / "onnx" / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs", [{"fusion": "add"}, {"fusion": "gate"}, {"fusion": "attention"}, {"adapters": ()}], ids=str
)
def test_every_fusion_is_exported(kwargs, build, tokenizer, tmp_path):
    model = build(KAdapterForQuestionAnswering, **kwargs)
    export.export_onnx(model, tokenizer, tmp_path / "onnx")
    assert_as_in_torch(model, tmp_path / "onnx" / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta", "electra", "deberta-v2", "distilbert", "modernbert"])
def test_every_kind_of_backbone_is_exported(model_type, build, backbones, tokenizer, tmp_path):
    model = build(KAdapterForEntityTyping, backbone=backbones[model_type])
    export.export_onnx(model, tokenizer, tmp_path / "onnx")
    assert_as_in_torch(model, tmp_path / "onnx" / "model.onnx")


@pytest.mark.slow
def test_only_active_adapters_are_exported_also_those_that_attend_to_padding(build, tokenizer, tmp_path):
    model = build(KAdapterForEntityTyping, adapters=("factual", "linguistic"))
    model.adapters["factual"].config.attend_to_padding = True
    model.set_active_knowledge_adapters("factual")
    model.adapters["linguistic"].layers[0].up_project.bias.data.fill_(torch.nan)
    export.export_onnx(model, tokenizer, tmp_path / "onnx")
    assert_as_in_torch(model, tmp_path / "onnx" / "model.onnx")


def test_the_command_compares_measures_and_leaves_a_usable_folder(build, tokenizer, tmp_path, write_file):
    labels = ["person", "place"]
    model = build(
        KAdapterForEntityTyping,
        adapters=["factual"],
        id2label=dict(enumerate(labels)),
        task={"name": "typing", "marker": "@"},
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = write_file(
        "".join(json.dumps({"text": f"{word} is old", "entity": [0, 4]}) + "\n" for word in ("rome", "dante"))
    )
    result = run(
        tmp_path / "model", "--output", tmp_path / "onnx", "--quantize", "--data", rows.rename(tmp_path / "rows.jsonl")
    )
    assert result.exit_code == 0, result.stderr
    lines = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if "│" in line}
    assert {"torch", "model.onnx", "model_quantized.onnx"} <= lines.keys()
    assert "100.00%" in lines["model.onnx"]
    assert sorted(path.name for path in tmp_path.glob("onnx/*.onnx*")) == ["model.onnx", "model_quantized.onnx"]
    assert AutoConfig.from_pretrained(tmp_path / "onnx").id2label == dict(enumerate(labels))
    assert AutoTokenizer.from_pretrained(tmp_path / "onnx").get_vocab() == tokenizer.get_vocab()
    assert_as_in_torch(model, tmp_path / "onnx" / "model.onnx")
    # What is quantised differs a little, and not at all from what the table says.
    batch = inputs_for(KAdapterForEntityTyping)
    with torch.no_grad():
        difference = (
            (on_runtime(tmp_path / "onnx" / "model_quantized.onnx", batch)["logits"] - model(**batch).logits)
            .abs()
            .max()
        )
    assert 1e-6 < difference < 0.3
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.slow
def test_weights_of_more_than_2_gb_are_in_files_beside(build, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_FILE", 0)
    model = build(KAdapterForEntityTyping)
    found = export.export_onnx(model, tokenizer, tmp_path / "onnx", quantize=True)
    for name in ("model.onnx", "model_quantized.onnx"):
        files = [path.stat() for path in tmp_path.glob(f"onnx/{name}*")]
        assert len(files) == 2 and found["files"][name]["bytes"] == sum(file.st_size for file in files)
        assert files[0].st_mode == files[1].st_mode
    assert_as_in_torch(model, (tmp_path / "onnx").rename(tmp_path / "elsewhere") / "model.onnx")
    assert on_runtime(tmp_path / "elsewhere" / "model_quantized.onnx", inputs_for(KAdapterForEntityTyping))


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_kept(build, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match="differs from the model by .* it is not kept"):
        export.export_onnx(build(), tokenizer, tmp_path / "new" / "onnx")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="it is not kept"):
        export.export_onnx(build(), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("output", [".", "link"])
def test_an_empty_folder_that_can_not_be_replaced_is_filled(output, build, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if output != "link" else tmp_path / "here")
    export.export_onnx(build(), tokenizer, output)
    files = {"config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "empty").iterdir()} == files


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_without_a_library_the_error_says_what_to_install(library, build, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"an export to ONNX needs {library}: pip install 'kadapter-hf\[export\]'"):
        export.export_onnx(build(), tokenizer, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_folder_that_is_not_empty_is_left_as_it_is(build, tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(KAdapterLoadError, match="exists and is not empty"):
        export.export_onnx(build(), tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("notes.txt", "notes.txt' is a file; choose another folder."),
        ("notes.txt/onnx", "notes.txt' is a file; choose another folder."),
        ("full/", "full' exists and is not empty; choose another folder."),
        pytest.param(
            "locked/new/onnx",
            "locked' can't be written to; choose another folder.",
            marks=pytest.mark.skipif(os.access("/", os.W_OK), reason="root may write everywhere"),
        ),
    ],
)
def test_an_output_that_can_not_be_a_new_folder_is_refused_before_the_model_is_loaded(output, message, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "locked").mkdir(mode=0o500)
    before = sorted(tmp_path.rglob("*"))
    result = run("no-model", "--output", f"{tmp_path}/{output}")
    assert (result.exit_code, result.stdout) == (1, "") and result.stderr.endswith(f"{message}\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_k_adapter_is_refused_in_a_sentence(backbone, tmp_path):
    result = run(backbone, "--output", tmp_path / "onnx")
    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and "is no K-Adapter" in result.stderr
    assert not (tmp_path / "onnx").exists()


def test_data_for_a_model_without_a_recorded_task_is_refused_with_the_way_out(build, tokenizer, tmp_path, write_file):
    build(KAdapterForEntityTyping).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = write_file('{"text": "rome", "entity": [0, 4]}\n')
    result = run(tmp_path / "model", "--output", tmp_path / "onnx", "--quantize", "--data", rows)
    assert result.exit_code == 1 and "fine-tuned on: leave out --data." in result.stderr
    assert not (tmp_path / "onnx").exists()


def test_the_table_fits_into_80_columns_with_its_heads(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    measured = {"bytes": 2.4e9, "milliseconds": {"1×32": 122.1, "8×128": 3450.1}}
    compared = measured | {"largest_difference": 0.15, "same_predictions": 1.0}
    files = {"torch": measured, "model.onnx": compared, "model_quantized.onnx": compared}
    show({"files": files, "inputs": ["input_ids"], "outputs": ["logits"], "output": "onnx", "opset": 20})
    table = capsys.readouterr().out
    assert "…" not in table and max(map(len, table.splitlines())) <= 80
    assert {"largest", "difference", "same", "predictions", "8×128", "100.00%"} <= set(table.split())


def test_data_without_quantisation_is_refused_as_it_would_not_be_used(write_file, tmp_path):
    result = run("model", "--output", tmp_path / "onnx", "--data", write_file("rows.csv", "text,label"))
    assert result.exit_code == 2 and "only --quantize measures on it" in result.stderr


def test_a_model_without_a_tokenizer_is_refused_in_a_sentence(build, tmp_path):
    build(KAdapterForEntityTyping).save_pretrained(tmp_path / "model")
    result = run(tmp_path / "model", "--output", tmp_path / "onnx")
    assert result.exit_code == 1 and "model' has no tokenizer: save one there" in " ".join(result.stderr.split())
