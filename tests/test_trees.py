"""`pipeline("dependency-parsing")` against the model itself, and the drawing of a tree."""

import pytest
import torch
from conftest import set_seed
from transformers import pipeline

from kadapter_hf import KAdapterForDependencyParsing, draw_tree
from kadapter_hf.features import dependency_features
from kadapter_hf.modeling.parsing_kadapter import decode_parse


WORDS = "the old city is in italy .".split()
LABELS = ["det", "nsubj", "root"]


@pytest.fixture(scope="module")
def parse(tmp_path_factory, backbones, tokenizer):
    set_seed(0)
    folder = str(tmp_path_factory.mktemp("parser"))
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: n for n, name in enumerate(LABELS)}}
    model = KAdapterForDependencyParsing.from_backbone(backbones["roberta"], **names)
    with torch.no_grad():
        for parameter in model.head_parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return pipeline("dependency-parsing", folder)


@torch.no_grad()
def expected(parse, words: list[str]) -> list[tuple[int, str]]:
    features = dependency_features({"tokens": [words]}, parse.tokenizer, LABELS)
    row = {name: torch.tensor(value) for name, value in features.items() if name != "row"}
    output = parse.model(**row)
    heads, relations = decode_parse(output.arc_logits[0], output.relation_logits[0])
    return [(head, LABELS[relation]) for head, relation in zip(heads, relations, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_trees_are_those_of_the_model_one_by_one_or_in_a_batch(batch_size, parse):
    texts = [" ".join(WORDS), "dante was born in rome .", "the cat"]
    for text, tree in zip(texts, parse(texts, batch_size=batch_size), strict=True):
        assert [(word["head"], word["label"]) for word in tree] == expected(parse, text.split())
        assert [text[word["start"] : word["end"]] for word in tree] == text.split()
        assert [word["id"] for word in tree] == list(range(1, len(tree) + 1))


def test_a_text_is_split_into_words_and_punctuation(parse):
    tree = parse("The old city, in Italy.")
    assert [word["text"] for word in tree] == ["The", "old", "city", ",", "in", "Italy", "."]


@pytest.mark.parametrize("text, problem", [("", "without words"), ("the " * 99, "more tokens than the model takes")])
def test_a_text_that_has_no_tree_is_an_error(text, problem, parse):
    with pytest.raises(ValueError, match=problem):
        parse(text)


def test_a_drawing_has_each_word_and_an_arc_for_each_but_the_root(parse):
    tree = parse(" ".join(WORDS))
    drawing = draw_tree(tree)
    assert drawing.startswith("<svg") and all(f">{word}<" in drawing for word in WORDS)
    assert drawing.count('class="displacy-arrow"') == len(WORDS) - 1
