"""LAMA's files: facts and their sentences, what is left out, and files that are not in this format."""

import json

import pytest

from kadapter_hf.lama import Fact, read_exclusions, read_lama


TEMPLATE = {"relation": "P36", "template": "the capital of [X] is [Y] ."}


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def fact(subject: str = "italy", other: str = "rome", uuid: str = "1", **more) -> dict:
    return {"uuid": uuid, "sub_label": subject, "obj_label": other} | more


@pytest.fixture
def lama(tmp_path, write_file):
    """`lama({"TREx/P36.jsonl": …})`: a folder with these files; T-REx's templates are always there."""

    def lama(files: dict[str, str | bytes]):
        for name, content in ({"relations.jsonl": lines(TEMPLATE)} | files).items():
            write_file(content, f"lama/{name}")
        return tmp_path / "lama"

    return lama


def texts(path, **kwargs) -> list[str]:
    return [fact.text for fact in read_lama(path, **kwargs)[0]]


# ---- Facts ----------------------------------------------------------------------------------------------------------


def test_a_fact_of_t_rex_is_its_relations_template_with_the_subject(lama):
    path = lama({"TREx/P36.jsonl": lines(fact(predicate_id="P36", evidences=[]))})
    facts, report = read_lama(path)
    assert facts == [Fact("TREx", "P36", "1", "italy", "rome", "the capital of italy is [MASK] .")]
    assert report.kept == 1 and not report.dropped


def test_google_re_has_templates_without_a_relations_file(lama):
    sentence = {"masked_sentences": ["curie was from [MASK] ."], "pred": "/people/person/place_of_birth"}
    path = lama({"Google_RE/place_of_birth_test.jsonl": lines(fact("curie", "vienna", **sentence))})
    (found,), _ = read_lama(path)
    assert (found.part, found.relation, found.text) == ("Google_RE", "place_of_birth", "curie was born in [MASK] .")


def test_a_fact_of_google_re_that_most_raters_judge_wrong_is_left_out(lama):
    judged = [{"rater": "1", "judgment": "yes"}, {"rater": "2", "judgment": "no"}]
    wrong = [*judged, {"rater": "3", "judgment": "no"}]
    records = [fact("curie", "vienna", judgments=judged), fact("dante", "rome", judgments=wrong)]
    facts, report = read_lama(lama({"Google_RE/place_of_birth_test.jsonl": lines(*records)}))
    assert [found.subject for found in facts] == ["curie"]
    assert report.dropped == {"judged wrong by most raters": 1}


def test_squad_and_conceptnet_have_sentences_of_their_own(lama):
    squad = {
        "masked_sentences": ["newton wrote about [MASK] ."],
        "obj_label": "physics",
        "id": "5_0",
        "sub_label": "Squad",
    }
    concept = {
        "masked_sentences": ["a dog can [MASK] ."],
        "obj_label": "ran",
        "sub": "dog",
        "pred": "CapableOf",
        "uuid": "c",
    }
    facts, _ = read_lama(lama({"Squad/test.jsonl": lines(squad), "ConceptNet/test.jsonl": lines(concept)}))
    assert facts == [
        Fact("ConceptNet", "ConceptNet", "c", "dog", "ran", "a dog can [MASK] ."),
        Fact("Squad", "Squad", "5_0", "Squad", "physics", "newton wrote about [MASK] ."),
    ]


def test_of_facts_with_the_same_subject_and_object_the_first_counts(lama):
    facts, report = read_lama(lama({"TREx/P36.jsonl": lines(fact(), fact(uuid="2"), fact("france", "paris", "3"))}))
    assert [found.uuid for found in facts] == ["1", "3"]
    assert report.dropped == {"repeats subject and object of another": 1}


@pytest.mark.parametrize("name", ["", "TREx", "TREx/P36.jsonl"])
def test_the_folder_one_part_and_one_file_have_the_same_facts(lama, name):
    path = lama({"TREx/P36.jsonl": lines(fact())})
    assert read_lama(path / name)[0] == read_lama(path)[0]


def test_a_part_made_by_lamas_uhn_script_is_a_part_of_its_own(lama):
    path = lama({"TREx/P36.jsonl": lines(fact(), fact("france", "paris")), "TREx_UHN/P36.jsonl": lines(fact())})
    assert [(found.part, found.object) for found in read_lama(path)[0]] == [
        ("TREx", "rome"),
        ("TREx", "paris"),
        ("TREx_UHN", "rome"),
    ]


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_change_nothing(lama):
    plain = lines(fact(), fact("france", "paris"))
    path = lama({"TREx/P36.jsonl": b"\xef\xbb\xbf" + plain.replace("\n", "\r\n\r\n").encode()})
    assert texts(path) == ["the capital of italy is [MASK] .", "the capital of france is [MASK] ."]


def test_the_placeholders_of_a_template_are_no_placeholders_in_a_subject(lama):
    assert texts(lama({"TREx/P36.jsonl": lines(fact("[Y]"))})) == ["the capital of [Y] is [MASK] ."]


def test_the_real_facts_of_t_rex(real):
    path = real("lama")
    facts, report = read_lama(path)
    count = sum(len(file.read_bytes().splitlines()) for file in (path / "TREx").iterdir())
    assert (len(report.labels), count) == (28, 22881)
    assert len(facts) == len({(found.relation, found.subject, found.object) for found in facts})
    assert len(facts) + report.dropped["repeats subject and object of another"] == count
    assert all(found.text.count("[MASK]") == 1 and found.subject in found.text for found in facts)


# ---- Facts to leave out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "2",
        "France\tparis",
        json.dumps({"uuid": "2"}),
        json.dumps({"sub_label": "FRANCE", "obj_label": "Paris"}),
        json.dumps(fact("france", "paris", "2", evidences=[])),
    ],
)
def test_a_fact_is_excluded_by_its_uuid_or_by_subject_and_object(lama, write_file, line):
    path = lama({"TREx/P36.jsonl": lines(fact(), fact("france", "paris", "2"))})
    facts, report = read_lama(path, write_file(f"\ufeff{line}\r\n\r\n"))
    assert [found.object for found in facts] == ["rome"]
    assert report.dropped == {"excluded": 1}


def test_a_line_with_uuid_and_names_excludes_repetitions_too(lama, write_file):
    path = lama({"TREx/P36.jsonl": lines(fact(uuid="1"), fact(uuid="2"), fact("france", "paris", "3"))})
    assert texts(path, exclude=write_file(lines(fact(uuid="1")))) == ["the capital of france is [MASK] ."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("a\tb\tc\n", "line 1: subject and object, separated by one tab"),
        ('\n{"uuid": 1}\n', "line 2: the field 'uuid' is missing, or is not text"),
        ('{"sub_label": "a"}\n', "line 1: the field 'obj_label' is missing"),
        ("{\n", "line 1 is not JSON"),
    ],
)
def test_the_error_for_a_list_of_exclusions_names_the_line(write_file, content, message):
    with pytest.raises(ValueError, match=message):
        read_exclusions(write_file(content))


def test_a_list_of_exclusions_for_other_data_is_refused(lama, write_file):
    with pytest.raises(ValueError, match="none of these facts is in"):
        read_lama(lama({"TREx/P36.jsonl": lines(fact())}), write_file("other\n"))


# ---- Files that are not LAMA's --------------------------------------------------------------------------------------

NO_TEMPLATE = (
    "line 1: the relation 'P99' has no template in relations.jsonl, and the record no field 'masked_sentences'"
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("TREx/P36.jsonl", "\n{\n", "P36.jsonl, line 2 is not JSON"),
        ("TREx/P36.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("TREx/P36.jsonl", b"\xff\n", "line 1 is not UTF-8"),
        ("TREx/P36.jsonl", lines({"sub_label": "a"}), "line 1: the field 'obj_label' is missing"),
        ("TREx/P36.jsonl", lines(fact(), {"obj_label": "a"}), "line 2: the field 'sub_label' is missing"),
        ("TREx/P36.jsonl", lines(fact(other=["rome"])), "line 1: the field 'obj_label' is missing, or is not text"),
        ("TREx/P36.jsonl", lines(fact(judgments="yes")), "line 1: 'judgments' is not a list of objects"),
        ("TREx/P99.jsonl", lines(fact()), NO_TEMPLATE),
        ("Squad/test.jsonl", lines(fact(masked_sentences=["a dog"])), r"line 1: 'masked_sentences' has no \[MASK\]"),
        ("Squad/test.jsonl", lines(fact(masked_sentences="[MASK]")), "line 1: 'masked_sentences' is not a list"),
        ("Squad/test.jsonl", lines(fact(masked_sentences=[])), "line 1: 'masked_sentences' is not a list"),
        ("relations.jsonl", lines({"relation": "P36"}), "relations.jsonl, line 1: the field 'template' is missing"),
        ("relations.jsonl", lines(TEMPLATE | {"template": "[X] is"}), r"line 1: 'template' needs \[X\] and one \[Y\]"),
        ("TREx/P36.jsonl", "", "no fact is left. The files are empty"),
    ],
)
def test_the_error_for_a_file_of_another_format_names_file_line_and_field(lama, name, content, message):
    files = {"TREx/P36.jsonl": lines(fact())} if name == "relations.jsonl" else {}
    with pytest.raises(ValueError, match=message):
        read_lama(lama(files | {name: content}))


def test_a_folder_without_facts_and_a_missing_folder_are_refused(lama, tmp_path):
    with pytest.raises(ValueError, match="has no .jsonl file of facts"):
        read_lama(lama({}))
    with pytest.raises(ValueError, match="there is no "):
        read_lama(tmp_path / "nowhere")


def test_if_all_facts_are_left_out_the_error_says_why(lama, write_file):
    with pytest.raises(ValueError, match=r"no fact is left. 1 × excluded \(.*P36.jsonl, line 1\)"):
        read_lama(lama({"TREx/P36.jsonl": lines(fact())}), write_file("1\n"))
