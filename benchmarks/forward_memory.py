"""
Peak memory of a forward pass for backbones of different depths, with adapters that read three states.

Only the states that are read are kept, so the peak must not grow with the number of layers. For comparison, the backbone is
run alone with `output_hidden_states=True`, which keeps all states. Each measurement runs in a separate process. The weights
are small and the batch is large, so that the states dominate.

    python benchmarks/forward_memory.py
"""

import argparse

from _common import in_fresh_process, print_table


MEASURE = """
import json, resource, sys
import torch
from transformers import RobertaConfig, RobertaModel
from kadapter_hf import KAdapterConfig, KAdapterModel, KnowledgeAdapterConfig
torch.set_num_threads(1)
depth, kind = int(sys.argv[1]), sys.argv[2]
sizes = dict(vocab_size=1000, hidden_size=256, num_attention_heads=4, intermediate_size=256)
backbone = RobertaModel(RobertaConfig(**sizes, num_hidden_layers=depth, type_vocab_size=1), add_pooling_layer=False)
model = backbone.eval()
if kind == "kadapter":
    adapter = KnowledgeAdapterConfig(
        backbone_layers=[0, 3, depth], num_hidden_layers=1, hidden_size=64, num_attention_heads=2, intermediate_size=64
    )
    config = KAdapterConfig(
        backbone_name_or_path=None, backbone_config=backbone.config, knowledge_adapters={"factual": adapter}
    )
    model = KAdapterModel(config, backbone).eval()
input_ids = torch.randint(5, 1000, (64, 256))
with torch.no_grad():
    model(input_ids[:1, :8])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model(input_ids, **({"output_hidden_states": True} if kind == "all" else {}))
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(json.dumps({"peak": peak, "state": 64 * 256 * 256 * 4}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24])
    depths = parser.parse_args().depths
    rows = []
    for depth in depths:
        found = {kind: in_fresh_process(MEASURE, str(depth), kind, memory=True) for kind in ("kadapter", "all")}
        rows.append([str(depth), *(f"{found[kind]['peak'] / 2**20:.0f}" for kind in ("kadapter", "all"))])
    print_table(["backbone layers", "K-Adapter, peak MiB", "backbone with all hidden states, peak MiB"], rows)


if __name__ == "__main__":
    main()
