"""Tags of words: windows, the tags of first tokens, and the entities that tags make."""

import pytest

from kadapter_hf.tasks.ner import spans, tagging_features


@pytest.mark.parametrize(
    "tags, found",
    [
        ("O O", set()),
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("I-PER I-PER", {("PER", 0, 2)}),  # without a beginning
        ("B-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("O I-LOC O", {("LOC", 1, 2)}),
    ],
)
def test_entities_of_tags_as_conlleval_counts_them(tags, found):
    assert spans(tags.split()) == found


def test_a_long_sentence_becomes_windows_and_no_word_is_lost(tokenizer):
    words = ["rome", "is", "old"] * 30
    tags = ["B-LOC", "O", "O"] * 30
    encoded = tagging_features({"tokens": [words], "tags": [tags]}, tokenizer, ["B-LOC", "O"], max_length=32)
    assert max(map(len, encoded["input_ids"])) == 32 and len(encoded["row"]) == 3
    seen = [word for window in encoded["words"] for word in window if word >= 0]
    assert seen == list(range(90))
    labels = [label for window in encoded["labels"] for label in window if label != -100]
    assert labels == [0, 1, 1] * 30
