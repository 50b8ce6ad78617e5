"""The T-REx pipeline, on generated documents and on the real sample."""

import gc
import importlib.util
import json
import os
import sys
import tempfile
from collections import Counter

import pytest
from datasets import load_dataset

from kadapter_hf.corpora import RELATION, Report, relation_problem
from kadapter_hf.corpora.trex import QuietRayExecutor, prepare_trex
from kadapter_hf.corpora.trex_steps import (
    document_examples,
    file_examples,
    in_test,
    no_garbage_collection,
    read_document,
)


TEXT = "Turin is big. Rome is in Italy. It was."
WORDS = ["Turin", "is", "big", ".", "Rome", "is", "in", "Italy", ".", "It", "was", "."]
SENTENCES = [[0, 13], [14, 31], [32, 39]]
ROME, ITALY, TURIN = [14, 18], [25, 30], [0, 5]


def bounds():
    found, end = [], 0
    for word in WORDS:
        start = TEXT.index(word, end)
        end = start + len(word)
        found.append([start, end])
    return found


def triple(subject=ROME, object_=ITALY, relation="P17", sentence=1):
    return {
        "sentence_id": sentence,
        "subject": {"boundaries": subject},
        "object": {"boundaries": object_},
        "predicate": {"uri": f"http://www.wikidata.org/prop/direct/{relation}"},
    }


def document(*triples, name="Q1"):
    return {
        "docid": f"http://www.wikidata.org/entity/{name}",
        "text": TEXT,
        "words_boundaries": bounds(),
        "sentences_boundaries": SENTENCES,
        "triples": list(triples),
    }


def examples(content, report):
    """What is found in a document."""
    read = read_document(content, "document", report)
    return [] if read is None else document_examples(read, report)


def corpus(write_file, files=3, documents=20):
    """Files of as many documents, each with two P17 and one P31, and one P1 in all."""
    paths = []
    for number in range(files):
        content = [
            document(triple(), triple(ITALY, ROME), triple(relation="P31"), name=f"Q{number}-{place}")
            for place in range(documents)
        ]
        if number == 0:
            content[0]["triples"].append(triple(relation="P1"))
        paths.append(write_file(content, f"trex/part-{number}.json"))
    return paths[0].parent


def rows(folder):
    return load_dataset(
        "parquet", data_files=str(folder / "*.parquet"), split="train", cache_dir=str(folder / "cache")
    )


def files(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_an_example_is_the_sentence_with_offsets_in_it():
    report = Report()
    assert examples(document(triple()), report) == [("Q1#0", "Rome is in Italy.", (0, 4), (11, 16), "P17")]
    assert (report.kept, report.labels) == (1, {"P17": 1})


@pytest.mark.parametrize(
    "bad, problem",
    [
        (triple(subject=None), "subject or object has no boundaries"),
        (triple(object_=TURIN), "subject or object is not made of words of the sentence"),
        (triple(subject=[14, 17]), "subject or object is not made of words of the sentence"),
        (triple(subject=[15, 18]), "subject or object is not made of words of the sentence"),
        (triple(subject=[18, 14]), "subject or object is not made of words of the sentence"),
        (triple(object_=[25, 99]), "subject or object is not made of words of the sentence"),
        (triple(subject=[14, 21], object_=[19, 30]), "subject and object overlap"),
        (triple(relation=""), "relation is not a name"),
        (triple(sentence=3), "no such sentence"),
        (triple(sentence=-1), "no such sentence"),
        ({"subject": {}}, "the triple is incomplete"),
        (triple(subject=["14", "18"]), "the triple is incomplete"),
        (4, "the triple is incomplete"),
    ],
)
def test_an_unusable_triple_is_counted_and_named(bad, problem):
    report = Report()
    assert len(examples(document(triple(), bad), report)) == 1
    assert report.first_dropped == {problem: ["Q1 triple 1"]}


@pytest.mark.parametrize("change", [{"text": None}, {"text": "short"}, {"text": TEXT + "\ud800"}, {"triples": None}])
def test_a_document_that_is_not_whole_is_counted_and_named(change):
    report = Report()
    assert examples(document(triple()) | change, report) == []
    assert report.first_dropped == {"the document is incomplete": ["Q1"]}


def test_a_word_that_crosses_the_end_of_the_sentence_is_none_of_its_words():
    crossing = document(triple(object_=[25, 31]))
    crossing["words_boundaries"] = [[14, 18], [25, 34]]
    report = Report()
    assert examples(crossing, report) == []
    assert report.dropped == {"subject or object is not made of words of the sentence": 1}


def test_the_real_sample_gives_the_originals_examples(real):
    documents = json.loads(real("t-rex/sample-output.json").read_text(encoding="utf-8"))
    cleaned = json.loads(real("t-rex/cleaned-by-the-original.json").read_text(encoding="utf-8"))
    report = Report()
    found = [example for one in documents for example in examples(one, report)]
    assert len(found) == len(cleaned) == 99
    # What the original skips without counting it.
    assert report.dropped == {"subject or object has no boundaries": 13}
    for (name, *values), theirs in zip(found, cleaned, strict=True):
        row = dict(zip(RELATION.features, values, strict=True))
        words = theirs["token"]
        assert relation_problem(row) is None
        assert (name.partition("#")[0], row["relation"]) == (theirs["docid"], theirs["relation"])
        assert "".join(row["text"].split()) == "".join("".join(words).split())
        for span, first, last in [("subject", "subj_start", "subj_end"), ("object", "obj_start", "obj_end")]:
            start, end = row[span]
            before = "".join(words[: theirs[first]])
            assert "".join(row["text"][:start].split()) == before
            assert "".join(row["text"][start:end].split()) == "".join(words[theirs[first] : theirs[last] + 1])


def test_the_files_that_the_pipeline_writes(write_file, tmp_path):
    report = prepare_trex([corpus(write_file)], tmp_path / "out", min_examples=2)
    out = tmp_path / "out"
    assert files(out) == {"train.parquet", "test.parquet", "relations.json", "relations.png", "report.json"}
    assert json.loads((out / "relations.json").read_text()) == ["P17"]
    assert (out / "relations.png").read_bytes().startswith(b"\x89PNG")
    assert report.kept == report.labels["P17"] == 120
    assert report.dropped == {"relation is excluded": 60, "relation with fewer than 2 examples": 1}
    assert report.first_dropped == {"relation is excluded": ["P31"], "relation with fewer than 2 examples": ["P1"]}
    parts = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert parts["train"].features == RELATION.features
    sizes = {name: len(part) for name, part in parts.items()}
    assert json.loads((out / "report.json").read_text())["sizes"] == sizes
    assert sum(sizes.values()) == 120 and sizes["test"] > 0
    assert all(relation_problem(row) is None for row in [*parts["train"], *parts["test"]])


@pytest.mark.parametrize("split", ["document", "example"])
def test_what_is_split_goes_by_its_name_and_the_seed(write_file, tmp_path, split):
    prepare_trex([corpus(write_file)], tmp_path / "out", min_examples=2, split=split, seed=3)
    keys = [f"Q{file}-{place}" for file in range(3) for place in range(20)]
    if split == "example":
        keys = [f"{key}#{number}" for key in keys for number in (0, 1)]
    tests = sum(in_test(key, 3) for key in keys)
    sizes = json.loads((tmp_path / "out" / "report.json").read_text())["sizes"]
    assert sizes["test"] == tests * (2 if split == "document" else 1)


def test_a_tenth_is_for_testing_and_another_seed_takes_another():
    chosen = [{key for key in map(str, range(10_000)) if in_test(key, seed)} for seed in (0, 1)]
    assert all(900 < len(keys) < 1100 for keys in chosen)
    assert len(chosen[0] & chosen[1]) < 200


def test_broken_files_are_counted_and_named(write_file, tmp_path):
    folder = corpus(write_file, files=1)
    write_file(b"[{", "trex/a.json")
    write_file(b'["\xff"]', "trex/b.json")
    write_file({}, "trex/c.json")
    write_file([4, document(name="Q9") | {"text": 4}], "trex/d.json")
    report = prepare_trex([folder], tmp_path / "out", min_examples=2)
    assert report.kept == 40
    assert (
        report.first_dropped.items()
        >= {
            "the file is not JSON": ["a.json"],
            "the file is not UTF-8": ["b.json"],
            "the file is not a list of documents": ["c.json"],
            "the document is incomplete": ["d.json document 0", "Q9"],
        }.items()
    )


def test_half_of_a_surrogate_pair_costs_only_its_document(write_file, tmp_path):
    whole, broken = document(triple(), name="Q1"), document(triple(), name="Q2") | {"text": TEXT + "\ud800"}
    path = write_file([whole, broken, document(triple(), name="Q3")], "trex/a.json")
    assert b"\\ud800" in path.read_bytes()
    report = Report()
    assert file_examples(path, report)["id"].to_pylist() == ["Q1#0", "Q3#0"]
    assert report.first_dropped == {"the document is incomplete": ["Q2"]}


def test_what_only_json_takes_is_read(tmp_path):
    content = json.dumps([document(triple()) | {"confidence": float("nan")}])
    for encoding in ("utf-8-sig", "utf-16"):
        path = tmp_path / f"{encoding}.json"
        path.write_text(content, encoding=encoding)
        assert file_examples(path, Report())["id"].to_pylist() == ["Q1#0"]


def test_the_garbage_collector_pauses_and_goes_on_as_before():
    with no_garbage_collection():
        assert not gc.isenabled()
        with no_garbage_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_strict_names_the_file_also_after_a_run_that_was_not(write_file, tmp_path):
    folder = corpus(write_file, files=1)
    write_file([document(triple(sentence=7))], "trex/bad.json")
    with pytest.raises(ValueError, match=r"bad.json: 1 × no such sentence \(Q1 triple 0\)"):
        prepare_trex([folder], tmp_path / "strict", strict=True)
    prepare_trex([folder], tmp_path / "out", min_examples=2)
    with pytest.raises(ValueError, match=r"no such sentence \(Q1 triple 0\)"):
        prepare_trex([folder], tmp_path / "out", min_examples=2, strict=True)


def test_an_interrupted_run_goes_on_where_it_was(write_file, tmp_path, monkeypatch):
    folder = corpus(write_file)
    out = tmp_path / "out"
    read, seen = Report.save, []

    def interrupted(report, path, **more):
        seen.append(str(path))
        if len(seen) == 2:
            raise KeyboardInterrupt
        read(report, path, **more)

    monkeypatch.setattr(Report, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_trex([folder], out, min_examples=2)
    assert sorted(os.listdir(out / "extracted" / "logs" / "extract" / "completions")) == ["00000"]
    assert not (out / "report.json").exists()
    seen.clear()
    monkeypatch.setattr(Report, "save", lambda *args, **more: (seen.append(str(args[1])), read(*args, **more)))
    assert prepare_trex([folder], out, min_examples=2).kept == 120
    assert [name.rpartition("/")[2] for name in seen] == ["00001.json", "00002.json", "report.json"]
    # The shard that was being written when the run ended exists once.
    assert Counter(rows(out / "extracted" / "shards")["relation"]) == {"P17": 120, "P31": 60, "P1": 1}


def test_a_second_run_splits_anew_without_reading_the_files(write_file, tmp_path):
    folder = corpus(write_file)
    prepare_trex([folder], tmp_path / "out", min_examples=2)
    shard = tmp_path / "out" / "extracted" / "shards" / "00000.parquet"
    before = shard.stat().st_mtime_ns
    report = prepare_trex([folder], tmp_path / "out", min_examples=1)
    assert shard.stat().st_mtime_ns == before
    assert report.labels == {"P17": 120, "P1": 1}


def test_a_folder_goes_with_one_list_of_files(write_file, tmp_path):
    folder = corpus(write_file)
    prepare_trex([folder], tmp_path / "out", min_examples=2)
    write_file([document(triple())], "trex/another.json")
    with pytest.raises(ValueError, match="was created from other files"):
        prepare_trex([folder], tmp_path / "out", min_examples=2)


def test_relations_get_names_and_keep_their_number_without_one(write_file, tmp_path):
    names = write_file({"P17": ["country", "a description"]}, "names.json")
    report = prepare_trex([corpus(write_file)], tmp_path / "out", min_examples=1, names=names)
    assert report.labels == {"country": 120, "P1": 1}
    assert json.loads((tmp_path / "out" / "relations.json").read_text()) == ["P1", "country"]
    relations = Counter(rows(tmp_path / "out")["relation"])
    assert relations == {"country": 120, "P1": 1}


def test_a_sample_that_leaves_no_training_rows_is_an_error(write_file, tmp_path):
    name = next(f"Q{number}" for number in range(1000) if in_test(f"Q{number}", 0))
    path = write_file([document(triple(), name=name)], "trex/a.json")
    with pytest.raises(
        ValueError, match="all 1 examples are of documents in the test set: read more files, or .*--split"
    ):
        prepare_trex([path], tmp_path / "out", min_examples=1)


def test_without_matplotlib_there_are_rows_and_no_figure(write_file, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert prepare_trex([corpus(write_file)], tmp_path / "out", min_examples=2).kept == 120
    assert "relations.png is left out, as a figure needs matplotlib" in caplog.text
    assert not (tmp_path / "out" / "relations.png").exists()


def test_too_high_a_minimum_is_an_error_that_says_what_there_is(write_file, tmp_path):
    with pytest.raises(
        ValueError, match="the most frequent, P17, has 120 examples, the minimum is 500.*--min-examples"
    ):
        prepare_trex([corpus(write_file)], tmp_path / "out", min_examples=500)


def test_files_without_a_usable_triple_leave_no_new_folder(write_file, tmp_path):
    path = write_file([document(triple(sentence=7))], "trex/a.json")
    (tmp_path / "there").mkdir()
    for output in ("new", "there"):
        with pytest.raises(ValueError, match="no usable triple"):
            prepare_trex([path], tmp_path / output)
    assert not (tmp_path / "new").exists() and (tmp_path / "there").exists()


def test_a_folder_without_files_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no JSON files in"):
        prepare_trex([tmp_path], tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist"):
        prepare_trex([tmp_path / "nowhere"], tmp_path / "out")


@pytest.mark.slow
def test_two_workers_make_what_one_makes(write_file, tmp_path):
    folder = corpus(write_file)
    reports = [prepare_trex([folder], tmp_path / str(n), min_examples=2, workers=n) for n in (1, 2)]
    assert reports[0] == reports[1]
    assert (tmp_path / "1" / "train.parquet").read_bytes() == (tmp_path / "2" / "train.parquet").read_bytes()


def test_slurm_gets_a_job_for_each_stage(write_file, tmp_path, monkeypatch):
    # Stands in for Slurm's own command: keeps the script and answers with the job's number.
    sbatch = write_file(
        '#!/bin/sh\nfor script; do :; done\ncat "$script" >> "$0.log"\necho "$@" >> "$0.args"\necho job 42\n',
        "bin/sbatch",
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    out = tmp_path / "out"
    options = {"executor": "slurm", "workers": 2, "partition": "cpu", "time": "01:00:00"}
    assert prepare_trex([corpus(write_file)], out, **options) is None
    extract, split = (
        (out / f"extracted/logs/{stage}/launch_script.slurm").read_text() for stage in ("extract", "split")
    )
    for line in ("--job-name=trex-extract", "--partition=cpu", "--time=01:00:00", "--array=0-2%2"):
        assert f"#SBATCH {line}\n" in extract
    assert "launch_pickled_pipeline" in extract and str(out / "extracted/logs/extract/executor.pik") in extract
    assert "#SBATCH --array=0-0%1\n" in split
    assert "--dependency=afterok:42" in sbatch.with_name("sbatch.args").read_text()
    assert not (out / "report.json").exists()


def has_ray():
    return importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(has_ray(), reason="Ray is installed")
def test_without_ray_the_error_says_so(write_file, tmp_path):
    with pytest.raises(ImportError, match=r'needs Ray: pip install "datatrove\[ray\]"'):
        prepare_trex([corpus(write_file)], tmp_path / "out", executor="ray")


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_ray_makes_what_one_process_makes_and_raises_what_it_raises(write_file, tmp_path, cluster):
    folder = corpus(write_file)
    reports = [prepare_trex([folder], tmp_path / kind, min_examples=2, executor=kind) for kind in ("local", "ray")]
    assert reports[0] == reports[1]
    for name in ("train.parquet", "test.parquet", "relations.json", "report.json"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()
    # Both stages, the second one after it was complete once.
    with pytest.raises(ValueError, match="the most frequent, P17, has 120 examples, the minimum is 500"):
        prepare_trex([folder], tmp_path / "ray", min_examples=500, executor="ray")
    write_file([document(triple(sentence=7))], "trex/bad.json")
    with pytest.raises(ValueError, match=r"bad.json: 1 × no such sentence \(Q1 triple 0\)"):
        prepare_trex([folder], tmp_path / "strict", strict=True, executor="ray")


class Failing:
    """A step of a pipeline that fails for the second task."""

    def __call__(self, data, rank, world_size):
        if rank == 1:
            raise OSError("no space")
        return ()


def test_what_a_task_on_ray_raises_is_left_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # for datatrove's logs
    executor = QuietRayExecutor([Failing()], tasks=2, logging_dir=str(tmp_path))
    executor._run_for_rank(0)
    with pytest.raises(OSError, match="no space"):
        executor._run_for_rank(1)
    assert os.listdir(tmp_path / "completions") == ["00000"]
    assert (tmp_path / "errors" / "00001").read_text() == "no space"
