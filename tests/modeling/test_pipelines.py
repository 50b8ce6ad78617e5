"""transformers' pipelines on a saved K-Adapter, as on any other model."""

import logging

import pytest
import torch
from conftest import disturb
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    FillMaskPipeline,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

from kadapter_hf import (
    KAdapterForMaskedLM,
    KAdapterForQuestionAnswering,
    KAdapterForSequenceClassification,
    KAdapterForTokenClassification,
    KAdapterModel,
)


TEXTS = ["rome is the capital of italy", "marie curie was born in the old city", "the cat sat"]


@pytest.fixture
def saved(build, tokenizer, tmp_path):
    """`saved(KAdapterFor…)`: a model, and a folder with it and its tokenizer."""

    def saved(model_class, **kwargs):
        model = build(model_class, **kwargs)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return model, str(tmp_path)

    return saved


@pytest.fixture(autouse=True)
def not_called_unsupported(caplog):
    """A pipeline logs an error when it does not know the model's class."""
    logger = logging.getLogger("transformers")
    propagate, logger.propagate = logger.propagate, True
    yield
    logger.propagate = propagate
    assert "is not supported for" not in caplog.text


@torch.no_grad()
def outputs(model, tokenizer, *texts):
    return model(**tokenizer(*texts, return_tensors="pt"))


def test_text_classification(saved, tokenizer):
    labels = {0: "place", 1: "person", 2: "animal"}
    model, folder = saved(
        KAdapterForSequenceClassification, id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    classify = pipeline("text-classification", model=folder)
    for kwargs in ({}, {"batch_size": 3}):  # one by one, and in a padded batch
        for text, found in zip(TEXTS, classify(TEXTS, top_k=None, **kwargs), strict=True):
            wanted = outputs(model, tokenizer, text).logits[0].softmax(-1)
            assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(
                {labels[index]: score.item() for index, score in enumerate(wanted)}, rel=1e-4
            )
    best = classify(TEXTS[0])[0]
    assert best["label"] == labels[outputs(model, tokenizer, TEXTS[0]).logits[0].argmax().item()]


def test_multi_label_text_classification_gives_independent_scores(saved, tokenizer):
    model, folder = saved(KAdapterForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    found = pipeline("text-classification", model=folder)(TEXTS[0], top_k=None)
    wanted = outputs(model, tokenizer, TEXTS[0]).logits[0].sigmoid()
    assert sorted(entry["score"] for entry in found) == pytest.approx(sorted(wanted.tolist()), rel=1e-4)


def test_token_classification(saved, tokenizer):
    labels = {0: "O", 1: "B-PLACE", 2: "I-PLACE"}
    model, folder = saved(KAdapterForTokenClassification, id2label=labels, label2id={v: k for k, v in labels.items()})
    tag = pipeline("token-classification", model=folder, ignore_labels=[])
    found = tag(TEXTS[0])
    wanted = outputs(model, tokenizer, TEXTS[0]).logits[0].softmax(-1)[1:-1]
    assert [entry["word"] for entry in found] == TEXTS[0].split()
    assert [entry["entity"] for entry in found] == [labels[index] for index in wanted.argmax(-1).tolist()]
    assert [entry["score"] for entry in found] == pytest.approx(wanted.max(-1).values.tolist(), rel=1e-4)
    assert [TEXTS[0][entry["start"] : entry["end"]] for entry in found] == TEXTS[0].split()
    groups = pipeline("token-classification", model=folder, aggregation_strategy="simple")(TEXTS[0])
    assert all(group["entity_group"] == "PLACE" for group in groups)


def test_fill_mask(saved, tokenizer):
    model, folder = saved(KAdapterForMaskedLM)
    text = "rome is the <mask> of italy"
    found = pipeline("fill-mask", model=folder, top_k=4)(text)
    wanted = outputs(model, tokenizer, text).logits[0, 4].softmax(-1).topk(4)
    assert [entry["token"] for entry in found] == wanted.indices.tolist()
    assert [entry["score"] for entry in found] == pytest.approx(wanted.values.tolist(), rel=1e-4)


def test_fill_mask_without_an_active_adapter_is_the_backbones(saved, backbone, tokenizer):
    model, folder = saved(KAdapterForMaskedLM)
    fill = pipeline("fill-mask", model=folder)
    fill.model.set_active_knowledge_adapters(None)
    stock = FillMaskPipeline(AutoModelForMaskedLM.from_pretrained(backbone), tokenizer)
    for text in ("rome is the <mask> of italy", "<mask> was born in paris"):
        assert fill(text) == stock(text) != pipeline("fill-mask", model=folder)(text)


def test_feature_extraction(saved, tokenizer):
    model, folder = saved(KAdapterModel)
    extract = pipeline("feature-extraction", model=folder)
    for batch_size in (None, 1, 3):
        for text, features in zip(TEXTS, extract(TEXTS, batch_size=batch_size), strict=True):
            expected = outputs(model, tokenizer, text).last_hidden_state
            found = torch.tensor(features)[:, : expected.shape[1]]  # in a padded batch
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_feature_extraction_from_a_model_with_a_head(saved, tokenizer):
    """The Auto class of its task removes the head."""
    model, folder = saved(KAdapterForSequenceClassification)
    (features,) = pipeline("feature-extraction", model=folder)(TEXTS[:1])
    base = KAdapterModel.from_pretrained(folder)
    torch.testing.assert_close(torch.tensor(features), outputs(base, tokenizer, TEXTS[0]).last_hidden_state)


def test_pipeline_on_a_model_in_memory_with_a_dtype(saved, tokenizer):
    model, folder = saved(KAdapterForSequenceClassification)
    in_memory = pipeline("text-classification", model=model, tokenizer=tokenizer)(TEXTS)
    loaded = pipeline("text-classification", model=folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert [entry["score"] for entry in loaded(TEXTS)] == pytest.approx(
        [entry["score"] for entry in in_memory], abs=0.05
    )


def answer(model, tokenizer, question: str, context: str) -> tuple[str, float]:
    """The best span of the context, and the probability of its start and end; as the pipeline of that name did it."""
    encoded = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0]
    in_context = torch.tensor([part == 1 for part in encoded.sequence_ids(0)])
    with torch.no_grad():
        output = model(**encoded)
    start, end = (
        logits[0].masked_fill(~in_context, -torch.inf).softmax(-1)
        for logits in (output.start_logits, output.end_logits)
    )
    scores = (start[:, None] * end[None, :]).triu()
    first, last = divmod(scores.argmax().item(), scores.shape[1])
    return context[offsets[first][0] : offsets[last][1]], scores.max().item()


def test_question_answering(saved, tokenizer):
    """transformers 5 has no pipeline for it, so its steps are done here with a saved model."""
    context = "marie curie was born in berlin and dante was born in rome"
    questions = {"where was curie born ?": "berlin", "where was dante born ?": "rome"}
    model, folder = saved(KAdapterForQuestionAnswering)
    encoded = tokenizer(list(questions), [context] * 2, return_tensors="pt")
    positions = torch.stack(
        [(encoded["input_ids"][0] == tokenizer.vocab[word]).nonzero()[0] for word in questions.values()]
    )
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=5e-3)
    for _ in range(60):
        model(**encoded, start_positions=positions, end_positions=positions).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    loaded = AutoModelForQuestionAnswering.from_pretrained(folder)
    for question, wanted in questions.items():
        found, score = answer(loaded, AutoTokenizer.from_pretrained(folder), question, context)
        assert found == wanted and score > 0.5


def test_question_answering_has_no_pipeline_in_this_transformers():
    """If it returns, it belongs in the tests above."""
    assert "question-answering" not in PIPELINE_REGISTRY.get_supported_tasks()


def test_pipeline_follows_a_change_of_weights(saved, tokenizer):
    """It uses the model, not a copy."""
    model, _ = saved(KAdapterForSequenceClassification)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    before = classify(TEXTS[0])
    disturb(model.adapters, 5)
    assert classify(TEXTS[0]) != before


@pytest.mark.parametrize("adapters", [("factual", "linguistic"), ("one-name",), ()])
def test_features_of_a_batch_are_those_of_each_text(adapters, saved, tokenizer):
    model, folder = saved(KAdapterModel, adapters=adapters)
    features = pipeline("feature-extraction", model=folder, tokenizer=tokenizer)
    texts = [TEXTS[0]] * 3
    for found, text in zip(features(texts, batch_size=2), texts, strict=True):
        torch.testing.assert_close(torch.tensor(found), outputs(model.eval(), tokenizer, text).last_hidden_state)
