"""A few rows for each task, in its own file format, made of the words that the tests' tokenizer knows."""

import json
from pathlib import Path


FACTS = [
    ("rome is the capital city of italy .", "rome", "italy", "capital"),
    ("paris is the capital city of france .", "paris", "france", "capital"),
    ("dante was born in rome .", "dante", "rome", "birthplace"),
    ("mozart was born in vienna .", "mozart", "vienna", "birthplace"),
]
TACRED = {"capital": "org:city_of_headquarters", "birthplace": "per:city_of_birth"}
SEMEVAL = {"capital": "Component-Whole(e1,e2)", "birthplace": "Other"}
CHOICES = ["in the city", "on the mat", "in the river", "by the cat"]


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def relation(_: str) -> dict[str, str]:
    table = "".join(f"{text},{subject},{other},{label}\n" for text, subject, other, label in FACTS)
    return {".csv": "sentence,head,tail,label\n" + table}


def tacred(_: str) -> dict[str, str]:
    rows = []
    for text, subject, other, label in FACTS:
        token = text.split()
        first, second = token.index(subject), token.index(other)
        spans = {"subj_start": first, "subj_end": first, "obj_start": second, "obj_end": second}
        rows.append({"token": token, "relation": TACRED[label]} | spans)
    return {".json": json.dumps(rows)}


def semeval(_: str) -> dict[str, str]:
    text = ""
    for number, (sentence, subject, other, label) in enumerate(FACTS, start=1):
        tagged = sentence.replace(subject, f"<e1>{subject}</e1>").replace(other, f"<e2>{other}</e2>")
        text += f'{number}\t"{tagged}"\n{SEMEVAL[label]}\nComment:\n\n'
    return {".txt": text}


def typing(_: str) -> dict[str, str]:
    rows = [
        {"text": text, "entity": subject, "types": ["place"] if label == "capital" else ["person", "artist"]}
        for text, subject, _, label in FACTS
    ]
    return {".jsonl": lines(rows)}


def open_entity(_: str) -> dict[str, str]:
    rows = []
    for text, subject, _, label in FACTS:
        start = text.index(subject)
        labels = ["place", "location"] if label == "capital" else ["person"]
        rows.append({"sent": text, "start": start, "end": start + len(subject), "labels": labels, "ents": []})
    return {".json": json.dumps(rows)}


def figer(split: str) -> dict[str, str]:
    """The test split is in the format of the test set itself."""
    if split != "test":
        return open_entity(split)
    words = [
        f"{word}\tB-{'place,location' if label == 'capital' else 'person'}" if word == subject else f"{word}\tO"
        for text, subject, _, label in FACTS
        for word in (*text.split(), "")
    ]
    return {".label": "\n".join(word if word[0] != "\t" else "" for word in words) + "\n"}


def classification(_: str) -> dict[str, str]:
    return {".tsv": "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, _, _, label in FACTS)}


def multiple_choice(_: str) -> dict[str, str]:
    rows = [
        {"context": text, "question": f"where is {subject} ?", "choices": CHOICES, "label": "AB"[number % 2]}
        for number, (text, subject, _, _) in enumerate(FACTS)
    ]
    return {".json": json.dumps(rows)}


def cosmos_qa(_: str) -> dict[str, str]:
    head = "id,context,question,answer0,answer1,answer2,answer3,label\n"
    rows = (
        f"{number},{text},where is {subject} ?,{','.join(CHOICES)},{number % 4}\n"
        for number, (text, subject, _, _) in enumerate(FACTS)
    )
    return {".csv": head + "".join(rows)}


def extractive_qa(_: str) -> dict[str, str]:
    paragraphs = []
    for number, (text, subject, other, _) in enumerate(FACTS):
        answers = [{"text": other, "answer_start": text.index(other)}]
        questions = [{"id": str(number), "question": f"where is {subject} ?", "answers": answers}]
        paragraphs.append({"context": text, "qas": questions})
    return {".json": json.dumps({"version": "1.1", "data": [{"title": "facts", "paragraphs": paragraphs}]})}


def open_qa(_: str) -> dict[str, str]:
    """Two passages a question: one with the answer, one without."""
    questions, passages = [], []
    for text, subject, other, _ in FACTS:
        question = f"where is {subject} ?".split()
        questions.append({"question": question, "answers": [[other]]})
        passages.append(
            [{"question": question, "document": words.split()} for words in ("the cat sat on the mat", text)]
        )
    return {".txt": lines(questions), ".json": lines(passages)}


def ner(_: str) -> dict[str, str]:
    text = "-DOCSTART- -X- O\n\n"
    for sentence, subject, _, label in FACTS:
        kind = "LOC" if label == "capital" else "PER"
        text += "".join(f"{word} X {f'B-{kind}' if word == subject else 'O'}\n" for word in sentence.split()) + "\n"
    return {".conll": text}


SAMPLES = {
    "relation": relation,
    "tacred": tacred,
    "semeval-2010-task-8": semeval,
    "typing": typing,
    "open-entity": open_entity,
    "figer": figer,
    "classification": classification,
    "multiple-choice": multiple_choice,
    "cosmos-qa": cosmos_qa,
    "extractive-qa": extractive_qa,
    "search-qa": open_qa,
    "quasar-t": open_qa,
    "ner": ner,
}


def write_sample(task: str, folder: Path) -> Path:
    """Writes the files of three splits into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        for ending, text in SAMPLES[task](split).items():
            (folder / f"{split}{ending}").write_text(text, encoding="utf-8")
    return folder


def files_of(task: str, folder: Path, split: str) -> Path:
    """The file that names the rows of a split."""
    return folder / f"{split}{next(iter(SAMPLES[task](split)))}"
