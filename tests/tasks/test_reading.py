"""What a user's files may look like, and what is said about those that can't be used."""

import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from samples import FACTS, SAMPLES, files_of, write_sample

from kadapter_hf.rows import held_out, whole_questions
from kadapter_hf.tasks import TASKS


TEXT = "Marie Curie was born in Warsaw ."


def read(task: str, tmp_path, name: str, text: str | bytes, **kwargs):
    """The rows in a file with this content."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    rows, _ = TASKS[task].read(path, **kwargs)
    return rows.to_list()


@pytest.mark.parametrize("task", TASKS)
def test_byte_order_marks_and_windows_line_ends_change_nothing(task, tmp_path):
    write_sample(task, tmp_path)
    before, _ = TASKS[task].read(files_of(task, tmp_path, "test"))
    for path in tmp_path.iterdir():
        text = path.read_text(encoding="utf-8")
        path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    after, _ = TASKS[task].read(files_of(task, tmp_path, "test"))
    assert after.to_list() == before.to_list()


@pytest.mark.parametrize("task", TASKS)
def test_a_file_of_another_task_is_an_error_that_names_the_file(task, tmp_path):
    for other in SAMPLES:
        # Any table with texts and labels can be read for classification.
        if TASKS[other].schema is TASKS[task].schema or task == "classification":
            continue
        write_sample(other, tmp_path / other)
        path = files_of(other, tmp_path / other, "train")
        if path.suffix in TASKS[task].endings:
            with pytest.raises(ValueError, match=f"{path.name}"):
                TASKS[task].read(path)


@pytest.mark.parametrize("task", ["relation", "typing", "classification", "multiple-choice", "extractive-qa", "ner"])
def test_a_row_without_labels_is_an_error_unless_it_is_to_be_predicted(task, tmp_path):
    rows, _ = TASKS[task].read(files_of(task, write_sample(task, tmp_path), "test"))
    unlabelled = rows.remove_columns(TASKS[task].schema.labels)
    assert len(TASKS[task].read(unlabelled, labelled=False)[0]) == len(rows)
    with pytest.raises(ValueError, match="row 1: no "):
        TASKS[task].read(unlabelled)


def test_semevals_test_file_without_relations(tmp_path):
    """It has a sentence a line, and no blank lines."""
    text = '1\t"The <e1>cat</e1> sat on the <e2>mat</e2>."\n2\t"<e1>Rome</e1> is in <e2>Italy</e2>."\n'
    rows = read("semeval-2010-task-8", tmp_path, "TEST_FILE.txt", text, labelled=False)
    assert [row["text"] for row in rows] == ["The cat sat on the mat.", "Rome is in Italy."]
    with pytest.raises(ValueError, match="TEST_FILE.txt, 1: no relation"):
        read("semeval-2010-task-8", tmp_path, "TEST_FILE.txt", text)


# ---- Tables as spreadsheets write them ------------------------------------------------------------------------------

HEAD, ROW = "sentence,head,tail,label", f"{TEXT},Marie Curie,Warsaw,born in"


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", f"{HEAD}\n{ROW}\n".replace(",", ";")),
        ("a.csv", f"{HEAD}\n{ROW}\n".replace(",", "\t")),
        ("a.csv", f"Sentence , HEAD,Tail,Label,,\n{ROW},,\n"),
        ("a.csv", f"{HEAD}\n,,,\n\n{ROW}\n,,,\n"),
        ("a.csv", f"text,{HEAD},notes\n,{ROW}\n"),
        ("a.csv", f"sentence,Entity 1,entity-2,label\n{ROW}\n"),
    ],
    ids=["semicolons", "tabs", "empty columns", "empty rows", "an empty column of another name", "names in words"],
)
def test_a_spreadsheets_table_is_read(name, text, tmp_path):
    assert read("relation", tmp_path, name, text) == [
        {"text": TEXT, "subject": [0, 11], "object": [24, 30], "relation": "born in"}
    ]


def test_a_table_of_one_column_keeps_its_semicolons(tmp_path):
    rows = read("classification", tmp_path, "a.csv", "text\nRome; Paris\n", labelled=False)
    assert [row["text"] for row in rows] == ["Rome; Paris"]


@pytest.mark.parametrize(
    "text, problem",
    [
        (f"{HEAD},label\n{ROW},x\n", "a.csv has several columns named 'label'; rename or remove one"),
        (f"{HEAD}\nYes, {ROW}\n", "a.csv, line 2: more cells than columns; a text with a comma needs quotation marks"),
        (f'{HEAD}\n"{TEXT}\nMore.",Nobody,Warsaw,x\n', "a.csv, line 2: the subject 'Nobody' does not occur"),
    ],
)
def test_a_table_that_would_be_misread_is_an_error_with_the_line(text, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        read("relation", tmp_path, "a.csv", text)


def test_cells_may_be_longer_than_pythons_limit(tmp_path):
    (row,) = read("relation", tmp_path, "a.csv", f"{HEAD}\n{'very ' * 40000}{ROW}\n")
    assert len(row["text"]) == 200000 + len(TEXT)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_an_error_that_names_the_right_one(encoding, tmp_path):
    with pytest.raises(ValueError, match="a.csv is not UTF-8; save it as CSV in UTF-8"):
        read("relation", tmp_path, "a.csv", f"{HEAD}\n{ROW} é\n".encode(encoding))


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    with pytest.raises(ValueError, match="a.parquet is not Parquet"):
        read("relation", tmp_path, "a.parquet", "PAR")


@pytest.mark.parametrize("cell", ['"[\'Rome\', \'the ""old"" one\']"', '"[""Rome"", ""the \\""old\\"" one""]"'])
def test_lists_in_cells_may_be_written_as_python_or_json(cell, tmp_path):
    (row,) = read("multiple-choice", tmp_path, "a.csv", f"context,question,choices,label\nc,q,{cell},0\n")
    assert row["choices"] == ["Rome", 'the "old" one']


def test_an_array_of_numpy_is_not_joined_to_one_text(tmp_path):
    with pytest.raises(ValueError, match="line 2: choices is not a list"):
        read("multiple-choice", tmp_path, "a.csv", "context,question,choices,label\nc,q,['a' 'b'],0\n")


# ---- Spans ----------------------------------------------------------------------------------------------------------


def test_an_entity_is_named_by_its_text_if_it_occurs_once(tmp_path):
    (row,) = read("relation", tmp_path, "a.csv", f"text,subject,object,relation\n{TEXT},Marie Curie,Warsaw,born in\n")
    assert row == {"text": TEXT, "subject": [0, 11], "object": [24, 30], "relation": "born in"}


@pytest.mark.parametrize(
    "columns, cells",
    [
        ("sentence,head,tail,label", "Marie Curie,Warsaw,born in"),
        ("Text,Entity1,Entity2,Relation", "Marie Curie,Warsaw,born in"),
        ("text,subject,object,relation", '"[0, 11]","[24, 30]",born in'),
        ("text,subject_start,subject_end,object_start,object_end,relation", "0,11,24,30,born in"),
        ("text,Subject Start,Subject End,Object Start,Object End,relation", "0.0,11.0,24.0,30.0,born in"),
    ],
)
def test_the_usual_names_of_columns_and_ways_to_write_spans(columns, cells, tmp_path):
    (row,) = read("relation", tmp_path, "a.csv", f"{columns}\n{TEXT},{cells}\n")
    assert (row["subject"], row["object"]) == ([0, 11], [24, 30])


@pytest.mark.parametrize(
    "subject, problem",
    [
        ("Einstein", "line 2: the subject 'Einstein' does not occur in the text"),
        ("in", None),
        ("a", "line 2: the subject 'a' occurs 4 times in the text; give its offsets as \\[start, end\\] instead"),
        ("", "line 2: no subject \\(a column subject or subj or head"),
        ('"[30, 99]"', "line 2: the subject is outside the text"),
        ('"[5, 5]"', "line 2: the subject is empty"),
        ('"[20, 26]"', "line 2: subject and object overlap"),
    ],
)
def test_an_entity_that_can_not_be_found_is_an_error_with_the_line(subject, problem, tmp_path):
    text = f"text,subject,object,relation\n{TEXT},{subject},Warsaw,born in\n"
    if problem is None:  # a whole word, although "in" is also a part of others
        assert read("relation", tmp_path, "a.csv", text)[0]["subject"] == [21, 23]
        return
    with pytest.raises(ValueError, match=f"a.csv, {problem}"):
        read("relation", tmp_path, "a.csv", text)


@pytest.mark.parametrize(
    "text, name, span",
    [
        ("東京は日本にある。", "日本", [3, 5]),  # no spaces between words
        ("👩‍🚀 Ann 🚀 flew.", "Ann", [4, 7]),  # an emoji of three code points
        ("Cafe\u0301 Zoë opened.", "Zoë", [6, 9]),  # a combining accent is a character of its own
        ("Rome", "Rome", [0, 4]),
        ("in Rome", "Rome", [3, 7]),
    ],
)
def test_spans_count_code_points(text, name, span, tmp_path):
    row = json.dumps({"text": text, "entity": name, "types": ["x"]}, ensure_ascii=False)
    assert read("typing", tmp_path, "a.jsonl", row)[0]["entity"] == span


def test_bad_rows_can_be_skipped_and_counted(tmp_path):
    text = f"text,subject,object,relation\n{TEXT},Nobody,Warsaw,x\n{TEXT},Marie Curie,Warsaw,born in\n"
    path = tmp_path / "a.csv"
    path.write_text(text)
    rows, report = TASKS["relation"].read(path, skip_bad_rows=True)
    assert len(rows) == report.kept == 1 and sum(report.dropped.values()) == 1


# ---- Labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ['"[""city"", ""place""]"', '"city, place"', "city|place", "city;place"])
def test_the_ways_to_write_several_types_in_a_cell(cell, tmp_path):
    (row,) = read("typing", tmp_path, "a.csv", f"text,entity,types\n{TEXT},Warsaw,{cell}\n")
    assert row["types"] == ["city", "place"]


def test_an_unknown_label_of_a_task_with_fixed_labels_is_an_error_with_the_record(tmp_path):
    record = {"sent": TEXT, "start": 24, "end": 30, "labels": ["town"]}
    with pytest.raises(ValueError, match="a.json, record 0: the label 'town' is not one of the task's 9"):
        read("open-entity", tmp_path, "a.json", json.dumps([record]))


@pytest.mark.parametrize("label, number", [("0", 0), ("3", 3), ("B", 1), ("d", 3)])
def test_the_right_choice_is_a_number_or_a_letter(label, number, tmp_path):
    text = f"context,question,choice0,choice1,choice2,choice3,label\nc,q,w,x,y,z,{label}\n"
    assert read("multiple-choice", tmp_path, "a.csv", text)[0]["label"] == number


@pytest.mark.parametrize("names", ["choice1,choice2", "option_a,option_b", "A,B", "Answer 0,Answer 1"])
@pytest.mark.parametrize("label", ["1", "b", "in Rome"])
def test_columns_and_labels_of_choices(names, label, tmp_path):
    (row,) = read("multiple-choice", tmp_path, "a.csv", f"context,question,{names},label\nc,q,no,in Rome,{label}\n")
    assert (row["choices"], row["label"]) == (["no", "in Rome"], 1)


def test_an_empty_choice_does_not_move_the_others(tmp_path):
    text = "context,question,choice0,choice1,choice2,choice3,label\nc,q,w,,y,z,2\n"
    with pytest.raises(ValueError, match="line 2: choice 2 is empty"):
        read("multiple-choice", tmp_path, "a.csv", text)


@pytest.mark.parametrize("label", ["4", "-1", "first", "E"])
def test_a_choice_that_is_not_there_is_an_error(label, tmp_path):
    text = f"context,question,choice0,choice1,choice2,choice3,label\nc,q,w,x,y,z,{label}\n"
    with pytest.raises(ValueError, match="line 2: label is not the number of a choice, 0 to 3"):
        read("multiple-choice", tmp_path, "a.csv", text)


@pytest.mark.parametrize("label", [7, "7"])
def test_the_name_of_a_class_may_be_a_number(label, tmp_path):
    record = {"text": TEXT, "subject": [0, 11], "object": [24, 30], "label": label}
    assert read("relation", tmp_path, "a.json", json.dumps([record]))[0]["relation"] == "7"


def test_classes_of_a_data_set_become_their_names():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows, _ = TASKS["classification"].read(Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features))
    assert rows["label"] == ["good", "bad"]


def test_tacred_keeps_the_first_negatives_as_the_original_does():
    rows = Dataset.from_dict({"relation": ["no_relation", "per:age", "no_relation", "no_relation", "per:age"]})
    options = TASKS["tacred"].options(negative_sample=3)
    assert TASKS["tacred"].used_rows(rows, options, True)["relation"] == [
        "no_relation",
        "per:age",
        "no_relation",
        "per:age",
    ]
    assert len(TASKS["tacred"].used_rows(rows, options, False)) == 5


# ---- Formats --------------------------------------------------------------------------------------------------------


def test_figers_own_test_format(tmp_path):
    tagged = "A\tO\nDr\tB-/person,/person/doctor\nHo\tI-/person,/person/doctor\nof\tO\nRome\tB-/location\n\n"
    rows = read("figer", tmp_path, "exp.label", tagged)
    assert [(row["text"][slice(*row["entity"])], row["types"]) for row in rows] == [
        ("Dr Ho", ["/person", "/person/doctor"]),
        ("Rome", ["/location"]),
    ]


def test_squads_format_and_a_table_of_answers_give_the_same_rows(tmp_path):
    rows = read("extractive-qa", tmp_path, "a.json", SAMPLES["extractive-qa"]("train")[".json"])
    table = [
        {"id": number, "question": f"where is {subject} ?", "context": text, "answer": other}
        for number, (text, subject, other, _) in enumerate(FACTS)
    ]
    assert read("extractive-qa", tmp_path, "b.jsonl", "".join(json.dumps(row) + "\n" for row in table)) == rows


@pytest.mark.parametrize("answer", [{"text": "Rome", "answer_start": 3}, {"text": "Paris"}])
def test_an_answer_that_is_not_in_the_text_is_an_error(answer, tmp_path):
    row = {"id": "1", "question": "where ?", "context": "In old Rome .", "answers": [answer]}
    with pytest.raises(ValueError, match="line 1: the answer '(Rome|Paris)' is not in the context"):
        read("extractive-qa", tmp_path, "a.jsonl", json.dumps(row))


def test_passages_of_open_qa_belong_to_their_question(tmp_path):
    write_sample("search-qa", tmp_path)
    rows, _ = TASKS["search-qa"].read(tmp_path / "train.txt")
    assert rows["id"] == [f"train-{number}" for number in (1, 2, 3, 4) for _ in range(2)]
    assert rows[0]["answers"] == {"text": ["italy"], "answer_start": [-1]}
    assert rows[1]["context"][slice(rows[1]["answers"]["answer_start"][0], None)].startswith("italy")


def test_open_qa_without_its_passages_is_an_error(tmp_path):
    write_sample("search-qa", tmp_path)
    (tmp_path / "train.json").unlink()
    with pytest.raises(ValueError, match="'train.json' is missing"):
        TASKS["search-qa"].read(tmp_path / "train.txt")


def test_conll_sentences(tmp_path):
    rows = read("ner", tmp_path, "a.conll", "-DOCSTART- O\n\nEU B-ORG\nrules O\n\nAnn B-PER\n")
    assert rows == [{"tokens": ["EU", "rules"], "tags": ["B-ORG", "O"]}, {"tokens": ["Ann"], "tags": ["B-PER"]}]


# ---- Splits ---------------------------------------------------------------------------------------------------------


def test_splits_come_from_the_names_of_files(tmp_path):
    write_sample("open-entity", tmp_path)
    assert {name: len(rows) for name, rows in TASKS["open-entity"].read_splits(str(tmp_path)).items()} == {
        "train": 4,
        "validation": 4,
        "test": 4,
    }


def test_a_saved_data_set_is_read_with_its_splits(tmp_path):
    rows = Dataset.from_dict({"text": ["a b", "c d"], "label": ["x", "y"]})
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path)
    assert TASKS["classification"].read_splits(str(tmp_path)).keys() == {"train", "test"}


def test_rows_about_the_same_text_are_held_out_together():
    rows = Dataset.from_dict({"context": [f"text {number % 5}" for number in range(50)]})
    train, held = held_out(rows, 0.3, "context", seed=0)
    assert len(train) + len(held) == 50 and len(held) == 20
    assert not set(train["context"]) & set(held["context"])


@pytest.mark.parametrize("label", [{}, {"label": -1}])
def test_a_test_split_without_public_labels_is_left_out(label, tmp_path, caplog):
    """As in CosmosQA's folder, and in its data set on the Hub."""
    write_sample("cosmos-qa", tmp_path)
    (tmp_path / "test.csv").unlink()
    row = {"context": "c", "question": "q"} | {f"answer{number}": "a" for number in range(4)} | label
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    assert TASKS["cosmos-qa"].read_splits(str(tmp_path)).keys() == {"train", "validation"}
    assert "have no labels and are left out; `kadapter predict` takes them" in caplog.text
    assert len(TASKS["cosmos-qa"].read(tmp_path / "test.jsonl", labelled=False)[0]) == 1


def test_each_file_is_read_once(tmp_path):
    read = []

    class Recording(type(TASKS["relation"])):
        def records(self, path):
            read.append(path.stem)
            return super().records(path)

    assert len(Recording("relation").read_splits(str(write_sample("relation", tmp_path)))["test"]) == len(FACTS)
    assert sorted(read) == ["dev", "test", "train"]


def test_a_sample_of_passages_has_whole_questions():
    rows = Dataset.from_dict({"id": ["a"] * 3 + ["b"] * 4 + ["c"] * 5})
    for most, seed in ((8, 0), (8, 1), (5, 2), (1, 3)):
        chosen = whole_questions(rows, most, seed)["id"]
        assert all(chosen.count(name) == rows["id"][:].count(name) for name in set(chosen))
        assert len(chosen) <= most or len(set(chosen)) == 1
    assert len(whole_questions(rows, 12, 0)) == 12
