"""
Time and memory needed to load a K-Adapter of roberta-large's size with two default adapters.

The baseline is the unavoidable part: loading its backbone with `AutoModel` and reading the adapter files with safetensors.
Each measurement runs in a separate process, with the files in the page cache; the two kinds alternate. The ratios are those
of the medians and of the fastest runs.

    python benchmarks/loading.py [--runs 5]
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from _common import in_fresh_process, print_table


PREPARE = """
import json, sys
from transformers import RobertaConfig, RobertaModel
from kadapter_hf import KAdapterConfig, KAdapterModel, KnowledgeAdapterConfig
folder = sys.argv[1]
RobertaModel(KAdapterConfig().backbone_config, add_pooling_layer=False).save_pretrained(folder + "/backbone")
adapters = {"factual": KnowledgeAdapterConfig(), "linguistic": KnowledgeAdapterConfig()}
KAdapterModel.from_backbone(folder + "/backbone", adapters=adapters).save_pretrained(folder + "/kadapter")
print(json.dumps({}))
"""

MEASURE = """
import json, sys, time, resource
from pathlib import Path
import torch, transformers
from transformers import AutoModel
from safetensors.torch import load_file
import transformers.models.roberta.modeling_roberta
import kadapter_hf
folder, kind = sys.argv[1:]
for path in Path(folder).rglob("*.safetensors"):  # into the page cache, for both kinds
    with open(path, "rb") as file:
        while file.read(2**20):
            pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
if kind == "floor":
    model = AutoModel.from_pretrained(folder + "/backbone")
    adapters = [load_file(f"{folder}/kadapter/adapters/{name}.safetensors") for name in ("factual", "linguistic")]
    loaded = list(model.state_dict().values()) + [t for file in adapters for t in file.values()]
else:
    model = kadapter_hf.KAdapterModel.from_pretrained(folder + "/kadapter")
    loaded = list(model.state_dict().values())
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
size = sum(t.numel() * t.element_size() for t in loaded)
if kind == "touched":
    sum(float(t.sum()) for t in loaded)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"seconds": seconds, "peak": peak * 1024, "size": size}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="pairs of measurements (after a warm-up)")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(PREPARE, folder)
        pairs = [[in_fresh_process(MEASURE, folder, kind) for kind in ("floor", "kadapter")] for _ in range(runs + 1)]
        touched = in_fresh_process(MEASURE, folder, "touched", memory=True)
        stored = sum(path.stat().st_size for path in Path(folder, "kadapter").rglob("*.safetensors"))
    pairs = pairs[1:]
    floor, ours = ([pair[kind]["seconds"] for pair in pairs] for kind in (0, 1))
    ratios = [of(ours) / of(floor) for of in (statistics.median, min)]
    peak = touched["peak"] / touched["size"]
    print_table(
        ["loading, roberta-large size, two default adapters", "median", "fastest"],
        [
            ["AutoModel + safetensors, s", f"{statistics.median(floor):.3f}", f"{min(floor):.3f}"],
            ["KAdapterModel.from_pretrained, s", f"{statistics.median(ours):.3f}", f"{min(ours):.3f}"],
            ["ratio", f"{ratios[0]:.2f}", f"{ratios[1]:.2f}"],
            ["peak memory / size of the weights, all weights read", f"{peak:.2f}", ""],
            ["weights loaded, MB", f"{touched['size'] / 1e6:.0f}", ""],
            ["of which stored in the K-Adapter's folder, MB", f"{stored / 1e6:.0f}", ""],
        ],
    )


if __name__ == "__main__":
    main()
