"""The example of a custom objective, on a tiny backbone."""

import json
import runpy
import sys
from pathlib import Path

from kadapter_hf import KAdapterForMaskedLM
from kadapter_hf.objectives import OBJECTIVES


SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_domain_adapter.py"
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}


def test_a_domain_adapter_is_trained_beside_the_backbones_own_language_model_head(backbone, tmp_path, monkeypatch):
    texts = [
        f"the {kind} {place} is in the old city ." for kind in ("big", "new") for place in ("river", "book", "mat")
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = [
        "--data",
        tmp_path / "texts.jsonl",
        "--backbone",
        backbone,
        "--output_dir",
        tmp_path / "out",
        "--use_cpu",
        "true",
    ]
    flags += [part for name, value in SMALL.items() for part in (f"--adapter_{name}", str(value))]
    command = [SCRIPT, *flags, "--max_steps", "2", "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    monkeypatch.setitem(OBJECTIVES, "domain", None)  # what the program puts there is gone afterwards
    del OBJECTIVES["domain"]
    runpy.run_path(str(SCRIPT), run_name="__main__")
    model = KAdapterForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.config.knowledge_adapters["domain"].provenance["metrics"].keys() == {"eval_loss"}
