"""examples/knowledge.py: the complete program on tiny corpora, the data withheld from the adapter, and cached states."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import load_script
from datasets import load_dataset
from transformers import AutoTokenizer, DataCollatorWithPadding

from kadapter_hf import KAdapterForRelationClassification
from kadapter_hf.features import encode, relation_features


SCRIPT = Path(__file__).parents[2] / "examples" / "knowledge.py"
WORDS = "the river city capital of italy france wrote a book in rome paris".split()
FEWREL = ("P17", "P206")
DOCRED = ("P131", "P150", "P17", "P27", "P50", "P527")  # the most frequent first


@pytest.fixture(scope="module")
def example():
    """The program as a module."""
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """Tiny corpora in the formats and under the names of the real ones."""
    folder, words = tmp_path_factory.mktemp("corpora"), random.Random(0)

    def sentence() -> list[str]:
        return words.choices(WORDS, k=8)

    def write(name: str, content: str) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")

    record = {"h": ["", "", [[1]]], "t": ["", "", [[4, 5]]]}
    fewrel = {name: [record | {"tokens": sentence()} for _ in range(20)] for name in FEWREL}
    write("fewrel/val_wiki.json", json.dumps(fewrel))
    documents = []
    for number in range(100):
        mentions = [[{"sent_id": 0, "pos": [place, place + 1]}] for place in (1, 4)]
        labels = [
            {"h": 0, "t": 1, "r": relation} for place, relation in enumerate(DOCRED) if number % (place + 1) == 0
        ]
        document = {"title": f"document{number}", "vertexSet": mentions, "labels": labels}
        documents.append(document | {"sents": [[f"document{number}", *sentence()]]})
    write("re-docred/dev_revised.json", json.dumps(documents))
    tree = "\n".join(
        f"{n}\t{w}\t_\tX\t_\t_\t{n - 1}\t{'root' if n == 1 else 'dep'}\t_\t_" for n, w in enumerate(WORDS, 1)
    )
    for name in ("train", "dev"):
        write(f"ud-english-ewt/en_ewt-ud-{name}.conllu", f"{tree}\n\n" * 8)
    for name in ("TRAIN_FILE.TXT", "TEST_FILE_FULL.TXT"):
        rows = [
            f'{n}\t"The <e1>river</e1> {words.choice(WORDS)} of <e2>italy</e2>."\n{label}\nComment:\n'
            for n, label in enumerate(["Other", "Cause-Effect(e1,e2)"] * 10)
        ]
        write(f"semeval-2010-task-8/{name}", "\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def arguments(example, corpora, backbone):
    def arguments(folder: Path):
        quick = {"adapter_size": 64, "factual_epochs": 1, "linguistic_epochs": 1, "few": 10, "steps": 2, "seeds": 1}
        return example.Arguments(data=str(corpora), backbone=backbone, output_dir=str(folder), **quick)

    return arguments


def test_all_settings_of_all_tasks_are_compared_in_a_page_and_a_figure(example, arguments, tmp_path):
    args = arguments(tmp_path)
    example.run(args)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 3 * 2 * 6  # tasks, sizes, settings
    assert all(0 <= result["score"] <= 1 for result in results)
    page = (tmp_path / "results.md").read_text()
    for setting in example.SETTINGS:
        assert page.count(f"| {setting} | ") == 6
    assert "SemEval-2010 Task 8, 20 examples" in page and "SemEval-2010 Task 8, 10 examples" in page
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_adapters_that_are_there_already_are_not_trained_again(example, arguments, tmp_path):
    args = arguments(tmp_path / "first")
    example.run(args)
    args.factual, args.linguistic = (str(tmp_path / "first" / name) for name in ("factual", "linguistic"))
    args.output_dir = str(tmp_path / "again")
    example.run(args)
    assert not (tmp_path / "again" / "factual" / "config.json").exists()
    first, again = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "again"))
    assert again == first


def test_the_adapter_sees_neither_the_tasks_relations_nor_its_test_documents(example, corpora, tmp_path):
    files, (_, task, control) = example.read_corpora(corpora, tmp_path)
    learned = [row for split in load_dataset("parquet", data_dir=files["factual"]).values() for row in split]
    assert set(task.labels) == {"P150", "P50"}  # of those that FewRel has not, each second one
    assert not set(task.labels) & {row["relation"] for row in learned}
    assert not set(task.labels) & set(control.labels)
    tested = {row["text"].split()[0] for row in [*task.test, *control.test]}
    assert not tested & {row["text"].split()[0] for row in learned} and not tested & {
        row["text"].split()[0] for row in task.train
    }


@torch.no_grad()
def test_the_head_on_states_gives_what_the_whole_model_gives(example, arguments, backbone, tmp_path):
    args = arguments(tmp_path)
    _, (task, *_) = example.read_corpora(Path(args.data), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    rows = encode(task.test, relation_features, tokenizer, labels=task.labels, markers=task.markers)
    adapters = {name: args.adapter_config() for name in ("one", "two")}
    model = KAdapterForRelationClassification.from_backbone(backbone, adapters, num_labels=2).eval()
    model.save_pretrained(tmp_path / "model")
    states = example.states_at_markers(model, rows, tokenizer)
    given = torch.stack([states[name] for name in ("", "one", "two")], dim=1)
    markers = {"subject_start": torch.zeros(len(rows)).long(), "object_start": torch.ones(len(rows)).long()}
    head = KAdapterForRelationClassification.from_pretrained(tmp_path / "model").eval()
    wanted = model(**DataCollatorWithPadding(tokenizer)(rows.to_list())).logits
    torch.testing.assert_close(head(fusion_states=given, **markers).logits, wanted)


def test_variants_are_trained_and_probed_and_a_run_that_was_cut_off_goes_on(corpora, backbone, tmp_path):
    variants = load_script(SCRIPT.with_name("knowledge_variants.py"))
    names = [variants.UNTRAINED, "reads layers 0 to 6", "FewRel's relations alone", variants.BACKBONE]
    variants.VARIANTS["reads layers 0 to 6"] = {"adapter_layers": [0, 1, 2], "num_train_epochs": 1}
    args = variants.Arguments(str(corpora), backbone, str(tmp_path), names[:1], few=10, draws=2)
    variants.run(args)
    first = json.loads((tmp_path / "results.json").read_text())
    args.variants = names
    variants.run(args)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == names and results[names[0]] == first[names[0]]
    assert all(
        0 <= score <= 1 for result in results.values() for scores in result["probes"].values() for score in scores
    )
    assert {len(scores) for name, scores in results[names[1]]["probes"].items() if name.endswith(", 10")} == {2}
    assert results["FewRel's relations alone"]["pretraining"]["eval_micro_f1"] > 0
    page = (tmp_path / "variants.md").read_text()
    assert all(page.count(f"| {name} | ") == 1 for name in names)


def test_fusions_are_compared_on_the_same_states_and_a_run_that_was_cut_off_goes_on(corpora, backbone, tmp_path):
    fusions = load_script(SCRIPT.with_name("knowledge_fusions.py"))
    sizes = {"adapter_size": 64, "factual_epochs": 1, "linguistic_epochs": 1, "few": 10, "steps": 2, "seeds": 1}
    args = fusions.FusionArguments(str(corpora), backbone, str(tmp_path), **sizes, fusions=["attention"])
    fusions.run(args)
    first = json.loads((tmp_path / "results.json").read_text())
    args.fusions = ["attention", "concat, random start", "add, scale 0.1"]
    args.factual, args.linguistic = str(tmp_path / "factual"), str(tmp_path / "linguistic")
    fusions.run(args)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(first) == 2 * 3 and len(results) == 2 * 3 * 3  # tasks, sets of adapters, fusions
    assert all(result in results for result in first) and all(0 <= result["score"] <= 1 for result in results)
    page = (tmp_path / "fusion-results.md").read_text()
    assert all(page.count(f"| {name} | ") == 2 for name in args.fusions)
    args.fusions = ["mean"]
    with pytest.raises(ValueError, match="there is no fusion 'mean'"):
        fusions.run(args)
