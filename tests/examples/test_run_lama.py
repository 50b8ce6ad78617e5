"""The example of the LAMA experiment, on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

from conftest import small_adapter

from kadapter_hf import KAdapterForMaskedLM


SCRIPT = Path(__file__).parents[2] / "examples" / "run_lama.py"


def test_a_new_head_is_trained_for_backbone_and_kadapter_and_both_are_probed(
    backbone, tmp_path, monkeypatch, capsys, write_file
):
    KAdapterForMaskedLM.from_backbone(backbone, {"factual": small_adapter()}, "add").save_pretrained(
        tmp_path / "model"
    )
    write_file('{"relation": "P36", "template": "the capital of [X] is [Y] ."}\n', "lama/relations.jsonl")
    write_file('{"sub_label": "italy", "obj_label": "rome"}\n', "lama/TREx/P36.jsonl")
    text = write_file("the capital of france is paris .\nthe cat sat on the mat .\n", "text.txt")
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "lama", "--train_text", text, "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", list(map(str, [SCRIPT, *flags, "--output_dir", tmp_path / "out"])))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert results["training"].keys() == {"backbone", "kadapter"} and results["facts"] == 1
    assert "P36" in capsys.readouterr().out
