"""
Loads and saves K-Adapters with the code in their folders. Run in a separate process by test_remote_code.py:

    remote_code.py SOURCE TARGET blocked|installed

SOURCE has a folder with a model for each class, and a .safetensors file with inputs and the expected output.
Prints the results as JSON.
"""

import importlib.abc
import json
import sys
from pathlib import Path


class Blocked(importlib.abc.MetaPathFinder):
    """The package can't be imported, wherever it is installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "kadapter_hf":
            raise ModuleNotFoundError(f"No module named '{fullname}'", name=fullname)
        return None


SOURCE, TARGET, MODE = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if MODE == "blocked":
    sys.meta_path.insert(0, Blocked())

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402


def same_output(model, inputs, expected) -> bool:
    with torch.no_grad():
        return torch.equal(model(**inputs).to_tuple()[0], expected)


def auto_class_of(folder: Path) -> type:
    """The Auto class for a folder, or the model class if transformers has none."""
    known = json.loads((SOURCE / "auto_classes.json").read_text())
    if folder.name in known:
        return getattr(transformers, known[folder.name])
    reference = json.loads((folder / "config.json").read_text())["auto_map"][folder.name]
    return get_class_from_dynamic_module(reference, folder)


def examine(folder: Path) -> dict:
    tensors = load_file(SOURCE / f"{folder.name}.safetensors")
    expected = tensors.pop("expected")
    auto_class = auto_class_of(folder)
    found = {}
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    found["config"] = [type(config).__name__, type(config).__module__.split(".")[0]]
    model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    found["model"] = [type(model).__name__, type(model).__module__.split(".")[0]]
    found["loading_info"] = [sorted(map(str, problems)) for problems in info.values()]
    found["same"] = same_output(model, tensors, expected)
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    found["base"] = type(base).__name__
    model.save_pretrained(TARGET / folder.name)
    return found


def change_and_save(folder: Path) -> dict:
    """All that the code can do, without the package: new adapters, adapters of others, training, saving."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    module = sys.modules[type(model).__module__]
    inputs = load_file(SOURCE / f"{folder.name}.safetensors")
    inputs.pop("expected")
    model.delete_knowledge_adapter("linguistic")
    model.load_knowledge_adapter(SOURCE / "KAdapterModel", "linguistic")
    config = module.KnowledgeAdapterConfig(
        hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1, backbone_layers=[3]
    )
    model.add_knowledge_adapter("places", config)
    model.unfreeze_backbone()
    model.train()(**inputs, labels=torch.tensor([0, 1, 1])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval().save_pretrained(TARGET / "changed")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        TARGET / "changed", trust_remote_code=True
    )
    with torch.no_grad():
        expected = model(**inputs).logits
    from_backbone = module.KAdapterModel.from_backbone(model.backbone, adapters={"factual": config})
    return {
        "same": same_output(loaded, inputs, expected),
        "files": sorted(path.name for path in (TARGET / "changed").rglob("*.safetensors")),
        "from_backbone": list(from_backbone.adapters),
    }


def refusal(folder: Path) -> str:
    try:
        transformers.AutoModel.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        return str(error)
    return "loaded"


report = {folder.name: examine(folder) for folder in sorted(SOURCE.iterdir()) if folder.is_dir()}
report["changed"] = change_and_save(SOURCE / "KAdapterForSequenceClassification")
if MODE == "blocked":
    report["without trust"] = refusal(SOURCE / "KAdapterModel")
report["package imported"] = "kadapter_hf" in sys.modules
print(json.dumps(report))
