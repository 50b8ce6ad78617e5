"""
What stands under the names that the pages use: tiny models and a few rows of data.

A page's folder gets what its blocks name and don't make themselves. A new name is one line here.
"""

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from blocks import ROOT, Block


sys.path.append(str(ROOT / "tests" / "tasks"))
from samples import FACTS, lines, relation, write_sample  # noqa: E402


ADAPTER = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}
BACKBONES = (
    "FacebookAI/roberta-large",
    "sentence-transformers/all-mpnet-base-v2",
    "sentence-transformers/all-MiniLM-L6-v2",
)
TEXTS = "\n".join(text for text, *_ in FACTS) + "\n"
Maker = Callable[[Path], object]


# ---- Data ------------------------------------------------------------------------------------------------------------


def write(text: str) -> Maker:
    return lambda path: path.write_text(text, encoding="utf-8")


def sample(task: str) -> Maker:
    """The files of a task, in a folder."""
    return lambda path: write_sample(task, path)


def sample_file(task: str, ending: str) -> Maker:
    """One of these files, and those that belong to it."""

    def make(path: Path) -> None:
        folder = write_sample(task, path.parent / f".{path.name}")
        for file in folder.glob("test.*"):
            if file.suffix == ending or task == "search-qa":
                file.replace(path.with_suffix(file.suffix))
        shutil.rmtree(folder)

    return make


def cosmosqa(path: Path) -> None:
    """With the names of the original's files; those for the leaderboard have no label."""
    write_sample("cosmos-qa", path)
    (path / "dev.csv").rename(path / "valid.csv")
    with open(path / "test.csv", encoding="utf-8", newline="") as file:
        rows = [{name: cell for name, cell in row.items() if name != "label"} for row in csv.DictReader(file)]
    (path / "test.csv").unlink()
    (path / "test.jsonl").write_text(lines(rows), encoding="utf-8")


def relation_rows(path: Path) -> None:
    rows = []
    for text, subject, other, label in FACTS * 2:
        spans = {
            name: [text.index(part), text.index(part) + len(part)] for name, part in [("s", subject), ("o", other)]
        }
        rows.append({"text": text, "subject": spans["s"], "object": spans["o"], "relation": label})
    if path.suffix != ".jsonl":
        path.mkdir()
        path = path / "train.jsonl"
    path.write_text(lines(rows), encoding="utf-8")


def conllu(path: Path) -> None:
    words = [("The", 2, "det"), ("Danube", 3, "nsubj"), ("flows", 0, "root"), ("here", 3, "advmod")]
    tree = "".join(
        f"{n}\t{word}\t_\t_\t_\t_\t{head}\t{label}\t_\t_\n" for n, (word, head, label) in enumerate(words, 1)
    )
    path.write_text((tree + "\n") * 4, encoding="utf-8")


def trees(path: Path) -> None:
    path.mkdir()
    row = {
        "text": "The cat sat",
        "tokens": ["The", "cat", "sat"],
        "heads": [2, 3, 0],
        "labels": ["det", "nsubj", "root"],
    }
    (path / "train.jsonl").write_text(lines([row] * 4), encoding="utf-8")


def fewrel(path: Path) -> None:
    content: dict[str, list] = {}
    for text, subject, other, label in FACTS:
        tokens = text.split()
        entities = {key: [name, "Q1", [[tokens.index(name)]]] for key, name in (("h", subject), ("t", other))}
        content.setdefault(label, []).append({"tokens": tokens, **entities})
    path.write_text(json.dumps(content), encoding="utf-8")


def lama(path: Path) -> None:
    (path / "TREx").mkdir(parents=True)
    template = {"relation": "P36", "template": "the capital of [X] is [Y] ."}
    (path / "relations.jsonl").write_text(lines([template]), encoding="utf-8")
    pairs = [("italy", "rome"), ("france", "paris"), ("austria", "vienna")]
    facts = [{"uuid": one, "sub_label": one, "obj_label": other} for one, other in pairs]
    (path / "TREx" / "P36.jsonl").write_text(lines(facts), encoding="utf-8")


def scierc(path: Path) -> None:
    path.mkdir()
    rows = [
        {
            "tokens": text.split(),
            "head": [0, 1],
            "tail": [len(text.split()) - 2, len(text.split()) - 1],
            "label": label,
        }
        for text, _, _, label in FACTS
    ]
    for split in ("train", "dev", "test"):
        (path / f"{split}.jsonl").write_text(lines(rows), encoding="utf-8")


SENTENCES = relation("")[".csv"]
DATA: dict[str, Maker] = {
    "OpenEntity": sample("open-entity"),
    "FIGER": sample("figer"),
    "TACRED": sample("tacred"),
    "tacred": sample("tacred"),
    "SemEval": sample("semeval-2010-task-8"),
    "cosmosqa": cosmosqa,
    "searchqa": sample("search-qa"),
    "LAMA": lama,
    "lama": lama,
    "data": lama,
    "relations.csv": write(SENTENCES),
    "sentences.csv": write("text,subject,object\n" + "".join(f"{a},{b},{c}\n" for a, b, c, _ in FACTS)),
    "test.csv": write(SENTENCES),
    "questions.csv": write("question,context\nwhere is rome ?,rome is in italy .\n"),
    "entities.json": sample_file("open-entity", ".json"),
    "sentences.json": sample_file("tacred", ".json"),
    "sample.txt": sample_file("search-qa", ".txt"),
    "valid.csv": sample_file("cosmos-qa", ".csv"),
    "train.json": sample_file("open-entity", ".json"),
    "dev.json": sample_file("open-entity", ".json"),
    "test.json": sample_file("open-entity", ".json"),
    "fewrel": relation_rows,
    "factual-rows": relation_rows,
    "trex": relation_rows,
    "rows.jsonl": relation_rows,
    "trees": trees,
    "ewt": trees,
    "val_wiki.json": fewrel,
    "train_wiki.json": fewrel,
    "pid2name.json": write('{"capital": ["capital of", "seat of government"]}'),
    "en_ewt-ud-train.conllu": conllu,
    "wiki.train.raw": write(TEXTS),
    "text.jsonl": write(lines([{"text": text} for text, *_ in FACTS])),
    "sentences.txt": write(TEXTS),
    "titles.jsonl": write(lines([{"title": text} for text, *_ in FACTS])),
    "scierc": scierc,
    "birthplaces.tsv": write("dante\trome\tdante was born in rome .\nmozart\tvienna\tmozart was born in vienna .\n"),
}
# Files of the same name in other pages.
DATA_OF_PAGES: dict[tuple[str, str], Maker] = {
    ("docs/tasks/semeval-2010-task-8.md", "sentences.txt"): sample_file("semeval-2010-task-8", ".txt"),
}


# ---- Models ----------------------------------------------------------------------------------------------------------


def save_backbones(folder: Path) -> dict[str, Path]:
    """Tiny RoBERTas with as many layers as the backbones, by their names on the Hub; made by pytest's process."""
    from conftest import POSITIONS, SIZES, disturb, new_tokenizer
    from transformers import RobertaConfig, RobertaForMaskedLM, set_seed

    saved = {}
    for name, layers in zip(BACKBONES, (24, 12, 6), strict=True):
        set_seed(0)
        sizes = SIZES | POSITIONS | {"num_hidden_layers": layers, "intermediate_size": 48, "type_vocab_size": 1}
        model = RobertaForMaskedLM(RobertaConfig(**sizes))
        disturb(model)
        model.save_pretrained(folder / name)
        new_tokenizer().save_pretrained(folder / name)
        saved[name] = folder / name
    return saved


def save_models(folder: str) -> None:
    """Saves the models in a process whose Hub has the backbones, and pushes some of them."""
    import torch
    from transformers import AutoTokenizer

    from kadapter_hf import KAdapterForDependencyParsing, KAdapterModel, KnowledgeAdapterConfig
    from kadapter_hf.tasks import TASKS

    out, backbone = Path(folder), BACKBONES[0]
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    torch.manual_seed(0)

    def save(name: str, model_class, *adapters: str, **kwargs):
        configs = {
            adapter: KnowledgeAdapterConfig(
                **ADAPTER, provenance={"objective": adapter, "corpus": "sample", "rows": 4}
            )
            for adapter in adapters
        }
        model = model_class.from_backbone(backbone, configs, **kwargs)
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        return model

    factual = save("factual-adapter", KAdapterModel, "factual", fusion="add")
    for name in ("news-adapter", "wiki/factual-adapter", "news/factual-adapter"):
        factual.save_pretrained(out / name)
    save("linguistic-adapter", KAdapterForDependencyParsing, "linguistic", fusion="add", num_labels=4)
    save("both", KAdapterModel, "factual", "linguistic")
    factual.save_knowledge_adapter(out / "factual.safetensors", "factual")
    for task_name in TASKS_OF_MODELS:
        task = TASKS[task_name]
        data = write_sample(task_name, out / f".{task_name}")
        rows = task.read_splits(str(data))
        labels = task.labels_in(rows)
        kwargs = {"id2label": dict(enumerate(labels))} if labels else {}
        model_name = "semeval-model" if task_name.startswith("semeval") else f"{task_name}-model"
        model = save(model_name, task.model_class, "factual", "linguistic", task={"name": task_name}, **kwargs)
        if task_name == "open-entity":
            model.push_to_hub("user/entity-typing")
            model.push_to_hub("user/both")
            for adapter in ("factual", "linguistic"):
                model.push_knowledge_adapter_to_hub(adapter, f"user/{adapter}")
            model.push_knowledge_adapter_to_hub("factual", "user/factual-adapter")
    biomedical = KAdapterModel.from_backbone(backbone, {"biomedical": KnowledgeAdapterConfig(**ADAPTER)})
    biomedical.push_knowledge_adapter_to_hub("biomedical", "user/biomedical")
    save_checkpoints(out)


def save_checkpoints(folder: Path) -> None:
    """Saves files like those of the original's scripts, for the backbone's width."""
    import torch
    from transformers import RobertaModel

    from kadapter_hf import KnowledgeAdapterConfig
    from kadapter_hf.modeling.adapters_kadapter import KnowledgeAdapter

    backbone = RobertaModel.from_pretrained(BACKBONES[0], add_pooling_layer=True)
    width = backbone.config.hidden_size
    sizes = ADAPTER | {"hidden_size": 24, "num_attention_heads": 12}

    def adapter(before: str = "") -> dict:
        module = KnowledgeAdapter(KnowledgeAdapterConfig(**sizes, backbone_layers=[0, 11, 22]), width)
        return {
            before + name.replace("layers.", "adapter.", 1): tensor for name, tensor in module.state_dict().items()
        }

    def linear(name: str, rows: int, columns: int) -> dict:
        return {f"{name}.weight": torch.randn(rows, columns), f"{name}.bias": torch.randn(rows)}

    def head(labels: int) -> dict:
        return linear("dense", width, 2 * width) | linear("out_proj", labels, width)

    fusion = linear("task_dense_fac", width, 2 * width) | linear("task_dense_lin", width, 2 * width)
    attention: dict = {}
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        attention |= linear(f"self_attention.{part}", width, width)
    norm = {f"self_attention.output.LayerNorm.{kind}": torch.randn(width) for kind in ("weight", "bias")}
    parser = linear("dense", width, width) | linear("out_proj", 64, width) | attention | norm
    files = {
        "fac-adapter/pytorch_model.bin": adapter() | linear("com_dense", width, 2 * width) | head(5),
        "lin-adapter/pytorch_model.bin": adapter() | linear("com_dense", width, 2 * width) | parser,
        "tacred/pytorch_model.bin": adapter("fac_adapter.")
        | adapter("lin_adapter.")
        | fusion
        | linear("task_dense", width, 2 * width)
        | head(42),
        "tacred/pytorch_pretrained_model.bin": {f"model.{name}": part for name, part in backbone.state_dict().items()},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(content, folder / name)


TASKS_OF_MODELS = ("open-entity", "figer", "tacred", "semeval-2010-task-8", "relation", "cosmos-qa", "search-qa")
MODELS = (
    "factual-adapter",
    "news-adapter",
    "wiki/factual-adapter",
    "news/factual-adapter",
    "linguistic-adapter",
    "both",
    "factual.safetensors",
) + tuple("semeval-model" if task.startswith("semeval") else f"{task}-model" for task in TASKS_OF_MODELS)
CHECKPOINTS = (
    "fac-adapter/pytorch_model.bin",
    "lin-adapter/pytorch_model.bin",
    "tacred/pytorch_model.bin",
    "tacred/pytorch_pretrained_model.bin",
)
FOLDERS_OF_BACKBONES = ("backbone", "bert", "multitask-backbone", "multitask")


# ---- What a page gets ------------------------------------------------------------------------------------------------


def provide(block: Block, folder: Path, made: Path, placed: set[str]) -> None:
    """
    Puts what a block names into the folder, unless an earlier block of the page has made it, and into `placed`. What the block
    makes itself is removed if it came from here.
    """
    outputs = set(re.findall(r"--output(?:_dir)?[ =](\S+)|\bsave_\w+\(\s*[\"']([^\"']+)", block.text))
    outputs = {name.rstrip("/") for pair in outputs for name in pair if name}
    for name in (*DATA, *MODELS, *CHECKPOINTS, *FOLDERS_OF_BACKBONES):
        path = folder / name
        if name in outputs:
            if name in placed and block.language != "python":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                placed.discard(name)
        elif not path.exists() and re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w.-])", block.text):
            if name in DATA:
                DATA_OF_PAGES.get((block.page, name), DATA[name])(path)
            elif name in (*MODELS, *CHECKPOINTS):
                path.parent.mkdir(exist_ok=True)
                copy = shutil.copytree if (made / name).is_dir() else shutil.copyfile
                copy(made / name, path)
            else:
                shutil.copytree(made / BACKBONES[0], path)
            placed.add(name)
