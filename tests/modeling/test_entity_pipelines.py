"""`pipeline("entity-typing")` and `pipeline("relation-classification")`, against the model itself."""

import pytest
import torch
from conftest import set_seed
from transformers import pipeline

from kadapter_hf import KAdapterForEntityTyping, KAdapterForRelationClassification
from kadapter_hf.features import relation_features, typing_features


TEXT = "dante was born in rome ."
LABELS = ["city", "person", "place"]
SPANS = {"dante": [0, 5], "rome": [18, 22], "born in rome": [10, 22]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, backbones, tokenizer):
    """`saved(class, task)`: the folder of a model with random weights."""

    def saved(model_class, task=None) -> str:
        set_seed(0)
        folder = str(tmp_path_factory.mktemp("model"))
        names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: n for n, name in enumerate(LABELS)}}
        model = model_class.from_backbone(backbones["roberta"], task=task, **names)
        with torch.no_grad():
            for parameter in model.head_parameters():
                parameter.normal_(std=0.3)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return saved


@torch.no_grad()
def expected(pipe, features: dict, activation) -> dict[str, float]:
    """The score of each label, from the features of one row."""
    row = {name: torch.tensor(value) for name, value in features.items() if name != "row"}
    scores = activation(pipe.model(**row).logits[0])
    return dict(zip(LABELS, scores.tolist(), strict=True))


def scores(labels: list[dict]) -> dict[str, float]:
    return {label["label"]: label["score"] for label in labels}


def approx(values: dict[str, float]):
    return pytest.approx(values, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_types_of_one_or_several_entities(batch_size, saved, tokenizer):
    pipe = pipeline("entity-typing", saved(KAdapterForEntityTyping))
    several = list(SPANS.values())  # two of them overlap
    one, many, none = pipe(
        [{"text": TEXT, "entity": SPANS["rome"]}, {"text": TEXT, "entities": several}, {"text": TEXT, "entities": []}],
        threshold=0.0,
        batch_size=batch_size,
    )
    assert none == [] and len(many) == 3
    for labels, span in zip([one, *many], [SPANS["rome"], *several], strict=True):
        features = typing_features({"text": [TEXT], "entity": [span]}, tokenizer, LABELS)
        assert scores(labels) == approx(expected(pipe, features, torch.sigmoid))
        assert [label["score"] for label in labels] == sorted(scores(labels).values(), reverse=True)


def test_types_have_a_probability_above_the_threshold(saved):
    pipe = pipeline("entity-typing", saved(KAdapterForEntityTyping))
    row = {"text": TEXT, "entity": SPANS["dante"]}
    everything = pipe(row, threshold=0.0)
    assert len(everything) == 3
    assert pipe(row) == [label for label in everything if label["score"] > 0.5]
    least = everything[1]["score"]
    assert pipe(row, threshold=least) == everything[:1]
    assert pipe(row, threshold=0.0, top_k=2) == everything[:2]


def test_no_input_has_no_output(saved):
    assert pipeline("entity-typing", saved(KAdapterForEntityTyping))([]) == []


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_input_has_its_own_adapters(batch_size, build, tokenizer, tmp_path):
    build(KAdapterForEntityTyping, num_labels=3).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("entity-typing", str(tmp_path))
    row = {"text": TEXT, "entity": SPANS["rome"]}
    inputs = [row | {"knowledge_adapters": ["factual"]}, row, row | {"knowledge_adapters": []}]
    found = pipe(inputs, threshold=0.0, batch_size=batch_size)
    for labels, names in zip(found, (["factual"], ["factual", "linguistic"], []), strict=True):
        with pipe.model.using_knowledge_adapters(names):
            assert scores(labels) == approx(scores(pipe(row, threshold=0.0)))
        assert scores(labels) == approx(scores(pipe(row, threshold=0.0, knowledge_adapters=names)))
    assert len({labels[0]["score"] for labels in found}) == 3


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_relation_of_one_or_several_pairs(batch_size, saved, tokenizer):
    pipe = pipeline("relation-classification", saved(KAdapterForRelationClassification))
    pairs = [[SPANS["dante"], SPANS["rome"]], [SPANS["rome"], SPANS["dante"]]]
    one = {"text": TEXT, "subject": pairs[0][0], "object": pairs[0][1]}
    first, many = pipe([one, {"text": TEXT, "pairs": pairs}], top_k=None, batch_size=batch_size)
    for labels, (subject, object_) in zip([first, *many], [pairs[0], *pairs], strict=True):
        rows = {"text": [TEXT], "subject": [subject], "object": [object_]}
        features = relation_features(rows, tokenizer, LABELS)
        assert scores(labels) == approx(expected(pipe, features, lambda logits: logits.softmax(-1)))
    assert first != many[1]
    (best,) = pipe(one)
    assert (best["label"], best["score"]) == (first[0]["label"], pytest.approx(first[0]["score"], rel=1e-4))


def test_the_markers_and_the_length_are_those_that_the_model_records(saved, tokenizer):
    task = {"name": "semeval-2010-task-8", "markers": [" #", " ?"], "max_length": 12}
    pipe = pipeline("relation-classification", saved(KAdapterForRelationClassification, task))
    text = f"{'the cat sat . ' * 20}{TEXT}"
    spans = [[place + 280 for place in SPANS[name]] for name in ("dante", "rome")]
    rows = {"text": [text], "subject": spans[:1], "object": spans[1:]}
    features = relation_features(rows, tokenizer, LABELS, markers=(" #", " ?"), max_length=12)
    assert len(features["input_ids"][0]) == 12
    found = pipe({"text": text, "subject": spans[0], "object": spans[1]}, top_k=None)
    assert scores(found) == approx(expected(pipe, features, lambda logits: logits.softmax(-1)))


def test_a_generator_is_processed_row_by_row(saved):
    pipe = pipeline("entity-typing", saved(KAdapterForEntityTyping))
    rows = [{"text": TEXT, "entity": span} for span in SPANS.values()]
    assert list(pipe(row for row in rows)) == [pipe(row) for row in rows]


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"text": TEXT}, "entity is missing"),
        (TEXT, 'an input is a dict with "text"'),
        ({"text": TEXT, "entity": [3, 3]}, "the span \\[3, 3\\] is empty or outside the text of 24 characters"),
        ({"text": TEXT, "entity": [3, 99]}, "outside the text"),
        ({"text": TEXT, "entity": [5, 6]}, "is empty"),
        ({"text": TEXT, "entity": "dante"}, "a span is \\[start, end\\] in characters, not 'dante'"),
        ({"text": TEXT, "entity": [0.0, 5.0]}, "a span is \\[start, end\\]"),
        ({"text": TEXT, "entities": [0, 5]}, "a span is \\[start, end\\] in characters, not 0"),
        ({"text": None, "entity": [0, 5]}, "text is not a string, but None"),
    ],
)
def test_an_input_that_can_not_be_marked_is_an_error(row, problem, saved):
    with pytest.raises(ValueError, match=problem):
        pipeline("entity-typing", saved(KAdapterForEntityTyping))(row)


def test_subject_and_object_must_not_overlap(saved):
    pipe = pipeline("relation-classification", saved(KAdapterForRelationClassification))
    with pytest.raises(ValueError, match="overlap"):
        pipe({"text": TEXT, "subject": SPANS["rome"], "object": SPANS["born in rome"]})


@pytest.mark.parametrize("pairs", [[[0, 5]], [[[0, 5]]], ["dante"]])
def test_a_pair_needs_two_spans(pairs, saved):
    pipe = pipeline("relation-classification", saved(KAdapterForRelationClassification))
    with pytest.raises(ValueError, match="spans? .*\\[start, end\\] in characters, not"):
        pipe({"text": TEXT, "pairs": pairs})


def test_a_model_without_markers_is_refused(saved):
    folder = saved(KAdapterForEntityTyping)
    with pytest.raises(ValueError, match="does not take marked entities; it has no subject_start"):
        pipeline("relation-classification", folder)


def test_text_classification_on_a_relation_model_names_the_pipeline_to_use(saved):
    with pytest.raises(ValueError, match="subject_start is missing.*relation-classification"):
        pipeline("text-classification", saved(KAdapterForRelationClassification))(TEXT)
