"""CoNLL-U files, and text that spaCy parses."""

import sys
from pathlib import Path

import pytest

from kadapter_hf.corpora import DEPENDENCY, dependency_problem, parse_text, read_conllu


EXAMPLES = Path(__file__).parents[2] / "examples" / "data"


def row(number, form, head, label, misc="_"):
    return "\t".join([str(number), form, "_", "_", "_", "_", str(head), label, "_", misc])


GOOD = "\n".join(
    ["# sent_id = s1", "# text = She sleeps.", row(1, "She", 2, "nsubj"), row(2, "sleeps", 0, "root", "SpaceAfter=No")]
    + [row(3, ".", 2, "punct"), ""]
)


def test_a_sentence(write_file):
    dataset, report = read_conllu(write_file(GOOD))
    assert list(dataset) == [
        {
            "text": "She sleeps.",
            "tokens": ["She", "sleeps", "."],
            "heads": [2, 0, 2],
            "labels": ["nsubj", "root", "punct"],
        }
    ]
    assert dataset.features == DEPENDENCY.features
    assert report.labels == {"nsubj": 1, "root": 1, "punct": 1}


def test_text_is_joined_where_the_comment_is_missing(write_file):
    dataset, _ = read_conllu(write_file(GOOD.replace("# text = She sleeps.\n", "")))
    assert dataset["text"][:] == ["She sleeps."]


def test_multiword_and_empty_rows_are_no_words(write_file):
    lines = [
        "# text = I don't (see)",
        row(1, "I", 2, "nsubj"),
        row("2-3", "don't", "_", "_", "_"),
        row(2, "do", 0, "root"),
    ]
    lines += [row(3, "n't", 2, "advmod"), row("3.1", "see", "_", "_"), row(4, "(", 5, "punct", "SpaceAfter=No")]
    lines += [row(5, "see", 2, "xcomp", "SpaceAfter=No"), row(6, ")", 5, "punct")]
    dataset, _ = read_conllu(write_file("\n".join(lines)))
    assert dataset[0]["text"] == "I don't (see)"
    assert dataset[0]["tokens"] == ["I", "do", "n't", "(", "see", ")"]
    assert dataset[0]["heads"] == [2, 0, 2, 5, 2, 5]


def test_words_that_the_text_writes_as_one_are_joined_anew(write_file):
    lines = [
        "# text = Il vient du lac.",
        row(1, "Il", 2, "nsubj"),
        row(2, "vient", 0, "root"),
        row("3-4", "du", "_", "_"),
    ]
    lines += [
        row(3, "de", 5, "case"),
        row(4, "le", 5, "det"),
        row(5, "lac", 2, "obl", "SpaceAfter=No"),
        row(6, ".", 2, "punct"),
    ]
    dataset, _ = read_conllu(write_file("\n".join(lines)))
    assert dataset[0]["text"] == "Il vient de le lac."
    assert dependency_problem(dataset[0]) is None


def test_a_multiword_row_says_whether_a_space_follows_its_words(write_file):
    lines = ["# text = Va al.", row(1, "Va", 0, "root"), row("2-3", "al", "_", "_", "SpaceAfter=No")]
    lines += [row(2, "a", 1, "case", "SpaceAfter=No"), row(3, "el", 1, "det"), row(4, ".", 1, "punct")]
    dataset, _ = read_conllu(write_file("\n".join(lines)))
    assert dataset["text"][:] == ["Va a el."]


def test_unusable_sentences_are_counted_and_named(write_file):
    two_roots = "\n".join(["# sent_id = s2", row(1, "a", 0, "root"), row(2, "b", 0, "root"), ""])
    no_head = "\n".join([row(1, "a", "_", "_"), ""])
    gap = "\n".join(["# sent_id = s4", row(1, "a", 0, "root"), row(3, "b", 1, "dep"), ""])
    path = write_file(b"\n".join(part.encode() for part in [GOOD, two_roots, no_head, gap, "word\n"]) + b"\n# \xff\n")
    _, report = read_conllu(path)
    assert report.kept == 1
    assert report.first_dropped == {
        "several roots": ["s2"],
        "a word has no head or no label": ["sentence 3"],
        "words are not numbered from 1": ["s4"],
        "not CoNLL-U": ["sentence 5"],
        "not UTF-8": ["sentence 6"],
    }
    with pytest.raises(ValueError, match="s2: several roots"):
        read_conllu(path, strict=True)


def test_an_empty_file_is_an_error(write_file):
    with pytest.raises(ValueError, match="no usable record"):
        read_conllu(write_file(""))


def test_the_example_trees():
    dataset, report = read_conllu(EXAMPLES / "trees.conllu", strict=True)
    assert (len(dataset), report.labels.total(), report.labels["det"], len(report.labels)) == (231, 2165, 319, 40)


def test_real_trees_keep_their_text(real):
    path = real("ud-english-ewt/en_ewt-ud-dev.conllu")
    dataset, _ = read_conllu(path, strict=True)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert dataset["text"][:] == [line[len("# text = ") :] for line in lines if line.startswith("# text = ")]
    assert len(dataset) == 2001
    assert sum(map(len, dataset["tokens"])) == sum(line.split("\t")[0].isdigit() for line in lines)


@pytest.mark.slow
def test_all_real_training_trees_are_usable(real):
    dataset, _ = read_conllu(real("ud-english-ewt/en_ewt-ud-train.conllu"), strict=True)
    assert len(dataset) == 12_544


def test_without_spacy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match=r"kadapter-hf\[parse\]"):
        parse_text(["A text."], "en_core_web_sm")


def test_a_pipeline_that_is_not_installed_is_named():
    pytest.importorskip("spacy")
    with pytest.raises(ValueError, match="spacy download no_such_pipeline"):
        parse_text(["A text."], "no_such_pipeline")


def test_a_pipeline_without_a_parser_is_an_error(tmp_path):
    spacy = pytest.importorskip("spacy")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ValueError, match="has no parser"):
        parse_text(["A text."], str(tmp_path / "blank"))


def test_parsed_text_makes_a_row_for_each_sentence(tmp_path):
    spacy = pytest.importorskip("spacy")
    from spacy.language import Language
    from spacy.tokens import Doc

    @Language.component("two_sentences")
    def two_sentences(doc):
        heads, labels = [1, 1, 1, 4, 4], ["nsubj", "ROOT", "punct", "det", "ROOT"]
        return Doc(doc.vocab, [t.text for t in doc], [bool(t.whitespace_) for t in doc], heads=heads, deps=labels)

    pipeline = spacy.blank("en")
    pipeline.add_pipe("two_sentences")
    pipeline.to_disk(tmp_path / "pipeline")
    dataset, _ = parse_text(["", "She sleeps. The end"], str(tmp_path / "pipeline"))
    assert list(dataset) == [
        {
            "text": "She sleeps.",
            "tokens": ["She", "sleeps", "."],
            "heads": [2, 0, 2],
            "labels": ["nsubj", "ROOT", "punct"],
        },
        {"text": "The end", "tokens": ["The", "end"], "heads": [2, 0], "labels": ["det", "ROOT"]},
    ]
