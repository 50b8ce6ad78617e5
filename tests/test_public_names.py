"""What `kadapter_hf.<TAB>` shows."""

import kadapter_hf


def test_tab_shows_the_public_names_and_submodules_only():
    shown = set(dir(kadapter_hf))
    assert {*kadapter_hf.__all__, "features", "metrics", "corpora", "objectives", "pretraining"} <= shown
    assert not {"version", "AutoConfig", "AutoModel", "cards", "modeling"} & shown
    assert all(getattr(kadapter_hf, name) is not None for name in shown)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    assert not hasattr(kadapter_hf, "featurse")
