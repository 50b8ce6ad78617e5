"""`kadapter doctor`."""

import importlib
import json
import shutil
from importlib.metadata import metadata, version
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from kadapter_cli import app
from kadapter_hf.precision import fast_dtype


doctor = importlib.import_module("kadapter_cli.doctor")  # whose function has the same name
DEVELOPMENT = {"browser", "conformance", "demo", "dist", "docs", "lint", "notebooks", "test"}


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})


@pytest.fixture
def caches(tmp_path, monkeypatch) -> Path:
    """Empty caches."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path


def test_it_says_what_is_installed_and_what_the_machine_can_do(caches):
    found = json.loads(run("--json").stdout)
    for name in ("kadapter-hf", "torch", "transformers", "datasets", "huggingface_hub"):
        assert found["versions"][name] == version(name)
    assert found["problems"] == [] and found["devices"][0]["device"] == "cpu"
    device = torch.device(found["precision"]["device"])
    assert found["precision"]["dtype"] == str(fast_dtype(device)[0]).removeprefix("torch.")
    assert found["hub"]["offline"] is True


def test_the_size_of_a_cache_counts_each_file_once(caches):
    (caches / "hub" / "blobs").mkdir(parents=True)
    (caches / "hub" / "blobs" / "weights").write_bytes(b"x" * 1000)
    (caches / "hub" / "snapshot").symlink_to(caches / "hub" / "blobs" / "weights")
    link = len(str(caches / "hub" / "blobs" / "weights"))
    found = {cache["path"]: cache for cache in json.loads(run("--json").stdout)["caches"]}
    assert found[str(caches / "hub")]["bytes"] in (1000, 1000 + link)
    assert found[str(caches / "datasets")]["bytes"] == 0
    assert found[str(caches / "datasets")]["free"] == pytest.approx(shutil.disk_usage(caches).free, rel=0.1)


def test_the_tables_say_it_too(caches):
    done = run()
    said = " ".join(done.stdout.split())
    assert done.exit_code == 0
    for part in (f"torch │ {version('torch')}", "fast precision", "free", str(caches / "hub"), "T-REx and CoNLL-U"):
        assert part in said


def test_a_required_package_that_is_too_old_is_a_problem(caches, monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=99", "nothing-of-this-name>=1"])
    done = run("--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["problems"] == [
        f"torch {version('torch')} is installed, and torch>=99 is required",
        "nothing-of-this-name is not installed",
    ]
    assert "nothing-of-this-name is not installed" in run().stdout


def test_packages_that_an_extra_lacks_are_named_with_the_way_to_get_them(caches, monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ['nothing-of-this-name>=1; extra == "parse"'])
    done = run()
    assert done.exit_code == 0
    assert "nothing-of-this-name is not installed: pip install 'kadapter-hf[parse]'" in done.stdout


def test_every_extra_for_users_has_a_purpose():
    assert set(doctor.EXTRAS) == set(metadata("kadapter-hf").get_all("Provides-Extra")) - DEVELOPMENT
