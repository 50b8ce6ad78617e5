"""What `kadapter_hf.<TAB>` shows."""

import subprocess
import sys

import kadapter_hf


def test_tab_shows_the_public_names_and_submodules_only():
    shown = set(dir(kadapter_hf))
    assert {*kadapter_hf.__all__, "features", "metrics", "corpora", "objectives", "pretraining"} <= shown
    assert not {"version", "AutoConfig", "AutoModel", "cards", "modeling"} & shown
    assert all(getattr(kadapter_hf, name) is not None for name in shown)


def test_submodules_are_imported_when_they_are_used():
    program = """
import sys
import kadapter_hf

before = set(sys.modules)
assert not {"kadapter_hf.features", "kadapter_hf.pretraining", "datasets"} & before
assert kadapter_hf.features.relation_features and "kadapter_hf.features" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    assert not hasattr(kadapter_hf, "featurse")
