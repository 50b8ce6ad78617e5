"""Threads that load and save at the same time don't disturb each other, or the rest of the process."""

import tempfile
import threading

import pytest
import torch
from conftest import assert_same_weights, small_adapter
from transformers import AutoModel
from transformers.utils import logging

from kadapter_hf import KAdapterForSequenceClassification, KAdapterModel
from kadapter_hf.modeling.replacing_kadapter import replace_files


def at_once(*actions) -> None:
    """Runs each action ten times in its own thread; raises the first error."""
    errors, barrier = [], threading.Barrier(len(actions))

    def repeat(action):
        try:
            barrier.wait()
            for turn in range(10):
                action(turn)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def folder(build, tmp_path):
    build(KAdapterForSequenceClassification).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_loads_at_the_same_time_leave_torch_able_to_initialise(folder, backbone):
    before = torch.nn.init.normal_, torch.nn.init.kaiming_uniform_, torch.nn.init.zeros_
    expected = KAdapterForSequenceClassification.from_pretrained(folder)
    found = []
    at_once(
        lambda _: found.append(KAdapterForSequenceClassification.from_pretrained(folder)),
        lambda _: KAdapterModel.from_pretrained(folder),
        lambda _: KAdapterModel.from_backbone(backbone, {"factual": small_adapter()}),
    )
    assert (torch.nn.init.normal_, torch.nn.init.kaiming_uniform_, torch.nn.init.zeros_) == before
    for model in found:
        assert_same_weights(model, expected)


def test_saves_at_the_same_time_leave_the_log_as_it_was(folder, tmp_path):
    models = [AutoModel.from_pretrained(folder) for _ in range(3)]
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    handlers = [(handler, list(handler.filters)) for handler in logging.get_logger().handlers]
    at_once(
        *(
            lambda turn, number=number, model=model: model.save_pretrained(tmp_path / f"{number}-{turn}")
            for number, model in enumerate(models)
        )
    )
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert handlers == [(handler, list(handler.filters)) for handler in logging.get_logger().handlers]


def test_a_save_is_quiet_about_comparing_the_backbone(folder, tmp_path, caplog, capfd):
    model = AutoModel.from_pretrained(folder)
    logger = logging.get_logger()
    propagate, logger.propagate = logger.propagate, True
    capfd.readouterr()
    try:
        model.save_pretrained(tmp_path / "again")
    finally:
        logger.propagate = propagate
    assert not caplog.records and capfd.readouterr().err == ""


def test_the_number_of_lock_files_has_a_limit(tmp_path, monkeypatch):
    """They stay where they are, as one that is deleted may be waited for."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "locks"))
    (tmp_path / "locks").mkdir()
    for number in range(600):
        with replace_files(tmp_path / str(number)) as staging:
            (staging / "config.json").write_text("{}")
    assert 0 < len(list((tmp_path / "locks").iterdir())) <= 256
