"""Pushes to the Hub at HF_ENDPOINT, with one repository per case; prints the results and exceptions."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments, pipeline, set_seed

from kadapter_hf import (
    KAdapterForEntityTyping,
    KAdapterForSequenceClassification,
    KAdapterModel,
    KnowledgeAdapterConfig,
)
from kadapter_hf.pretraining import main as pretrain


BACKBONE = "user/encoder"
TYPED = {"text": "dante was born in rome .", "entities": [[0, 5], [18, 22]]}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
found: dict[str, object] = {}
api = HfApi()


def new_model(**kwargs) -> KAdapterForSequenceClassification:
    set_seed(0)
    adapters = {
        "factual": KnowledgeAdapterConfig(**SIZES, provenance={"rows": 12, "license": "mit"}),
        "linguistic": KnowledgeAdapterConfig(**SIZES),
    }
    model = KAdapterForSequenceClassification.from_backbone(BACKBONE, adapters, num_labels=2, **kwargs)
    change(model.adapters)
    return model


def change(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.1)


def refusal(push, *args, **kwargs) -> str:
    try:
        push(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def output(model, **kwargs) -> list[float]:
    inputs = AutoTokenizer.from_pretrained(BACKBONE)("a river", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs, **kwargs)[0].flatten().tolist()


def whole_models() -> None:
    model = new_model()
    first = model.push_to_hub("user/model", commit_message="The first", commit_description="of all", tags=["rivers"])
    found["url"], found["oid"] = str(first.commit_url), first.oid
    model.push_to_hub("user/model")
    model.push_to_hub("user/private", private=True)
    model.push_to_hub("user/branch")
    change(model.adapters["factual"])
    model.push_to_hub("user/branch", revision="next")
    found["pr"] = model.push_to_hub("user/branch", create_pr=True, commit_message="Please").pr_revision
    found["into the backbone's"] = refusal(model.push_to_hub, BACKBONE)
    model.push_to_hub("user/shrunk")
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="adapters/notes.txt", repo_id="user/shrunk")
    model.delete_knowledge_adapter("linguistic")
    model.push_to_hub("user/shrunk")
    model.push_to_hub("user/raced")
    found["contested"] = refusal(model.push_to_hub, "user/contested")


def single_adapters() -> None:
    model = new_model()
    model.push_to_hub("user/both")
    for _ in range(2):
        model.push_knowledge_adapter_to_hub("factual", "user/factual", commit_message="Facts")
    for repo in ("user/both", "user/factual", BACKBONE):
        found[f"linguistic into {repo}"] = refusal(model.push_knowledge_adapter_to_hub, "linguistic", repo)
    alone = KAdapterModel.from_backbone(BACKBONE, {"factual": "user/factual"}, fusion="add")
    loaded, info = AutoModel.from_pretrained("user/factual", output_loading_info=True)
    found["loading info"] = {key: list(value) for key, value in info.items() if value}
    model.set_active_knowledge_adapters("factual")
    expected = output(KAdapterModel.from_backbone(BACKBONE, fusion="add"))
    found["adds"] = output(alone) == output(loaded) != expected
    tuned = new_model()
    tuned.unfreeze_backbone()
    change(tuned.backbone)
    tuned.add_knowledge_adapter("late", KnowledgeAdapterConfig(**SIZES))
    found["on a changed backbone"] = refusal(tuned.push_knowledge_adapter_to_hub, "late", "user/late")
    tuned.push_to_hub("user/tuned")


def cards() -> None:
    model = new_model()
    model.push_to_hub("user/edited")
    path = Path(hf_hub_download("user/edited", "README.md"))
    text = path.read_text().replace("license: mit", "license: apache-2.0")
    text = text.replace("## Backbone", "## Mine\n\nM.\n\n## Backbone", 1)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="user/edited")
    model.config.knowledge_adapters["factual"].provenance = {"rows": 34, "license": "mit"}
    model.push_to_hub("user/edited")
    card = Path(hf_hub_download("user/factual", "README.md")).read_text()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    found["snippet"] = printed.getvalue()


def pipelines() -> None:
    task = {"name": "open-entity", "marker": " @", "max_length": 32}
    KAdapterForEntityTyping.from_backbone(BACKBONE, num_labels=3, task=task).push_to_hub("user/typing")
    AutoTokenizer.from_pretrained(BACKBONE).push_to_hub("user/typing")
    found["typing"] = pipeline("entity-typing", model="user/typing")(TYPED, threshold=0.0)


def trainers(folder: Path) -> None:
    def arguments(name: str, **kwargs) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(folder / name), max_steps=2, save_steps=1, report_to="none", push_to_hub=True, **kwargs
        )

    ids = AutoTokenizer.from_pretrained(BACKBONE)("a river")["input_ids"]
    rows = [{"input_ids": ids, "labels": number % 2} for number in range(8)]
    trainer = Trainer(
        new_model(),
        arguments("trained", hub_model_id="user/trained", hub_always_push=True),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(BACKBONE),
    )
    trainer.train()
    trainer.push_to_hub()
    found["trained"] = output(trainer.model)
    found["trained, loaded"] = output(KAdapterForSequenceClassification.from_pretrained("user/trained"))
    trainer.model.push_to_hub("user/trained")
    model = new_model()
    saved = folder / "saved"
    AutoTokenizer.from_pretrained(BACKBONE).save_pretrained(saved)
    for name in ("optimizer.pt", "training_args.bin", "_draft.txt", "notes.txt"):
        (saved / name).write_bytes(b"x")
    model.save_pretrained(saved, push_to_hub=True, repo_id="user/saved", commit_message="Saved")


def pretrained(folder: Path) -> None:
    facts = folder / "facts.jsonl"
    text = "The Rhine flows through Basel"
    row = {"text": text, "subject": [4, 9], "object": [24, 29]}
    facts.write_text("".join(json.dumps(row | {"relation": f"r{n % 2}"}) + "\n" for n in range(20)))
    flags = {
        "data": facts,
        "backbone": BACKBONE,
        "output_dir": folder / "pretrained",
        "hub_model_id": "user/pretrained",
        "license": "cc0-1.0",
        "language": "en",
        "max_steps": 2,
        "eval_strategy": "epoch",
        "adapter_hidden_size": 16,
        "adapter_num_attention_heads": 2,
        "adapter_intermediate_size": 32,
        "report_to": "none",
    }
    pretrain(
        ["factual", "--push_to_hub", *(str(part) for key, value in flags.items() for part in (f"--{key}", value))]
    )


if __name__ == "__main__":
    for step in (whole_models, single_adapters, cards, pipelines):
        step()
    for step in (trainers, pretrained):
        step(Path(sys.argv[1]))
    print(json.dumps(found))
