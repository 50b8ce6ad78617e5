"""FewRel, DocRED, TACRED and SemEval-2010 Task 8."""

import pytest

from kadapter_hf.corpora import RELATION, read_docred, read_fewrel, read_semeval, read_tacred, relation_problem


WORDS = ["The", "river", "Po", "flows", "to", "the", "Adriatic", "Sea", "."]
TEXT = "The river Po flows to the Adriatic Sea ."
FEWREL = {"tokens": WORDS, "h": ["po", "Q643", [[2], [0]]], "t": ["adriatic sea", "Q13924", [[6, 7]]]}
TACRED = {
    "id": "e1",
    "token": WORDS,
    "subj_start": 6,
    "subj_end": 7,
    "obj_start": 2,
    "obj_end": 2,
    "relation": "mouth_of",
}
DOCRED = {
    "title": "Po",
    "sents": [["It", "is", "long", "."], WORDS],
    "vertexSet": [
        [{"sent_id": 0, "pos": [0, 1]}, {"sent_id": 1, "pos": [2, 3]}],
        [{"sent_id": 1, "pos": [6, 8]}],
        [{"sent_id": 0, "pos": [2, 3]}],
        [{"sent_id": 1, "pos": [1, 3]}],
    ],
    "labels": [{"h": 0, "t": 1, "r": "P403"}],
}
SEMEVAL = '1\t"The <e1>fire</e1> caused <e2>damage</e2> here."\nCause-Effect(e1,e2)\nComment: none\n'


def test_fewrel_joins_words_and_takes_the_first_mention(write_file):
    dataset, report = read_fewrel(write_file({"P403": [FEWREL]}))
    assert list(dataset) == [{"text": TEXT, "subject": [10, 12], "object": [26, 38], "relation": "P403"}]
    assert TEXT[26:38] == "Adriatic Sea"
    assert dataset.features == RELATION.features
    assert report.labels == {"P403": 1}


def test_fewrel_relations_by_name(write_file):
    names = write_file({"P403": ["mouth of the watercourse", "where it ends"]})
    dataset, _ = read_fewrel(write_file({"P403": [FEWREL], "P1": [FEWREL]}), names)
    assert dataset["relation"][:] == ["mouth of the watercourse", "P1"]


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"h": ["po", "Q643", [[2, 4]]]}, "an entity's words are not next to each other"),
        ({"h": ["po", "Q643", [[9]]]}, "a span is outside the words"),
        ({"h": ["po", "Q643", []]}, "the record is incomplete"),
        ({"h": ["po", "Q643", [[7]]]}, "subject and object overlap"),
        ({"tokens": None}, "the record is incomplete"),
    ],
)
def test_unusable_fewrel_records_are_counted_and_named(write_file, change, problem):
    path = write_file({"P403": [FEWREL, FEWREL | change]})
    _, report = read_fewrel(path)
    assert (report.kept, report.first_dropped) == (1, {problem: ["P403 record 1"]})
    with pytest.raises(ValueError, match=f"{path.name}, P403 record 1: {problem}"):
        read_fewrel(path, strict=True)


def test_docred_takes_the_sentence_that_both_entities_are_in(write_file):
    dataset, _ = read_docred(write_file([DOCRED]))
    assert list(dataset) == [{"text": TEXT, "subject": [10, 12], "object": [26, 38], "relation": "P403"}]


def test_docred_pairs_in_different_sentences_are_counted_and_no_error(write_file):
    labels = [*DOCRED["labels"], {"h": 1, "t": 2, "r": "P1"}]
    dataset, report = read_docred(write_file([DOCRED | {"labels": labels}]), strict=True)
    assert len(dataset) == 1
    assert report.first_dropped == {"subject and object share no sentence": ["Po: 1 P1 2"]}


def test_docred_entities_that_overlap_are_left_out(write_file):
    labels = [*DOCRED["labels"], {"h": 3, "t": 0, "r": "P1"}, {"h": 3, "t": 9, "r": "P1"}]
    _, report = read_docred(write_file([DOCRED | {"labels": labels}, {"title": "no labels"}]))
    assert report.dropped == {
        "subject and object overlap": 1,
        "the record is incomplete": 1,
        "the document is incomplete": 1,
    }


def test_tacred_ends_are_the_last_words(write_file):
    dataset, _ = read_tacred(write_file([TACRED]))
    assert list(dataset) == [{"text": TEXT, "subject": [26, 38], "object": [10, 12], "relation": "mouth_of"}]


def test_unusable_tacred_records_are_named_by_their_id(write_file):
    _, report = read_tacred(write_file([TACRED, TACRED | {"id": "e2", "subj_end": 9}, {"id": "e3"}, 4]))
    assert report.first_dropped == {
        "a span is outside the words": ["e2"],
        "the record is incomplete": ["e3", "record 3"],
    }


def test_semeval_tags_become_spans(write_file):
    dataset, _ = read_semeval(write_file(SEMEVAL))
    expected = {"text": "The fire caused damage here.", "subject": [4, 8], "object": [16, 22]}
    assert list(dataset) == [expected | {"relation": "Cause-Effect(e1,e2)"}]


def test_semeval_reads_windows_line_ends_and_quotes_in_the_sentence(write_file):
    record = '7\t"Say "hi" to <e1>me</e1> and "<e2>you</e2>""\r\nOther\r\nComment:\r\n\r\n'
    dataset, _ = read_semeval(write_file(record * 2))
    assert dataset["text"][:] == ['Say "hi" to me and "you"'] * 2
    assert dataset[0]["object"] == [20, 23]


def test_unusable_semeval_records_are_counted_and_named(write_file):
    bad = [
        b'5\t"<e1>a</e1> <e2>b</e2>"',
        b'2\t"no <e1>tags</e1>"\nOther\n',
        b"cut",
        b'4\t"\xff <e1>a</e1> <e2>b</e2>"\nOther\n',
    ]
    path = write_file(b"\n\n".join([SEMEVAL.encode(), *bad]))
    _, report = read_semeval(path)
    assert report.kept == 1
    assert report.first_dropped == {
        "relation is not a name": ["5"],
        "a tag is missing": ["2"],
        "does not consist of a number, a sentence and a relation": ["cut"],
        "not UTF-8": ["record 5"],
    }
    with pytest.raises(ValueError, match="5: relation is not a name"):
        read_semeval(path, strict=True)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}", b"4"])
@pytest.mark.parametrize("read", [read_fewrel, read_docred, read_tacred])
def test_a_file_of_something_else_is_an_error_that_names_it(write_file, read, content):
    path = write_file(content)
    with pytest.raises(ValueError, match=path.name):
        read(path)


def test_real_fewrel(real):
    dataset, report = read_fewrel(real("fewrel/val_wiki.json"), real("fewrel/pid2name.json"))
    assert (len(dataset), report.dropped.total()) == (11_200, 0)
    assert len(report.labels) == 16
    assert set(report.labels.values()) == {700}
    row = dataset[0]
    assert row["text"][slice(*row["subject"])].lower() == "cape girardeau bridge"
    assert row["text"][slice(*row["object"])].lower() == "mississippi river"
    assert row["relation"] == "crosses"


def test_real_redocred(real):
    dataset, report = read_docred(real("re-docred/dev_revised.json"))
    # Counted apart, by a loop over all pairs of mentions: of 17,284 labels 7,982 have a pair in one sentence, of these
    # 7,976 one that doesn't overlap.
    assert len(dataset) + report.dropped.total() == 17_284
    assert report.dropped["subject and object share no sentence"] == 9_302
    assert report.dropped["subject and object overlap"] == 6
    assert len(dataset) == 7_976
    assert all(relation_problem(row) is None for row in dataset.select(range(500)))


@pytest.mark.parametrize("name, size", [("TRAIN_FILE.TXT", 8000), ("TEST_FILE_FULL.TXT", 2717)])
def test_real_semeval(real, name, size):
    dataset, report = read_semeval(real(f"semeval-2010-task-8/{name}"), strict=True)
    assert (len(dataset), len(report.labels)) == (size, 19)
    assert not any("<e" in text or "</e" in text for text in dataset["text"])
