"""A save that is killed at any time, or fails on a full disk, leaves the old model or the new one, never a mix."""

import errno
import faulthandler
import os
import resource
import shutil
import signal
import sys
import time
import traceback

import pytest
import torch
from conftest import TINY, contents, disturb, small_adapter
from transformers import AutoModelForSequenceClassification, RobertaConfig, RobertaModel, set_seed
from transformers.trainer_utils import load_sharded_checkpoint

from kadapter_hf import KAdapterForSequenceClassification, KAdapterLoadError
from kadapter_hf.modeling.format_kadapter import STAGING, part_of
from kadapter_hf.modeling.reading_kadapter import read_adapter
from kadapter_hf.modeling.sources_kadapter import adapter_file


# The audit events before a change of the file system.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


class Watch:
    """
    An audit hook that kills this process just before its Nth change below a folder; for forked children only.

    With `from_move` the count begins when config.json is moved to where it belongs: the folder becomes the new model.
    """

    def __init__(self, folder, left: int, from_move: bool):
        self.folder, self.left, self.from_move = str(folder), left, from_move

    def __call__(self, event, args):
        if event not in CHANGES and not (event == "open" and is_for_writing(args[2])):
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
        if os.path.isabs(path) and not path.startswith(self.folder):
            return  # a relative path is one of `shutil.rmtree`
        if self.from_move and not (event == "os.rename" and os.fsdecode(args[1]) == f"{self.folder}/config.json"):
            return
        self.from_move = False
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def is_for_writing(flags) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def in_child(action, seconds=60) -> int:
    """Runs a function in a fork of this process; returns its exit status, or the negative number of its signal."""
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(seconds - 1, exit=True)
        status = 1
        try:
            status = action() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        assert time.monotonic() < deadline, "the child hangs"
        time.sleep(0.001)


def killed_at(change, folder, action, from_move=False) -> bool:
    """Runs `action` in a child that is killed before the given change below the folder; returns whether it was killed."""

    def run():
        sys.addaudithook(Watch(folder, change, from_move))
        action()

    status = in_child(run)
    assert status in (0, -signal.SIGKILL)
    return status != 0


def make_model(backbone, adapters, seed, **kwargs):
    set_seed(seed)
    model = KAdapterForSequenceClassification.from_backbone(
        backbone, adapters={name: small_adapter(backbone_layers=[0]) for name in adapters}, num_labels=3, **kwargs
    )
    for part in (model.adapters, model.fusion, *model.head_modules()):
        disturb(part, seed)
    return model


@pytest.fixture(scope="module", autouse=True)
def two_code_files():
    """A save copies only two code files: each file adds two moments to be killed at, but no new case."""
    with pytest.MonkeyPatch.context() as patch:
        users = [module for name, module in sys.modules.items() if name.startswith("kadapter_hf.modeling.")]
        users = [module for module in users if hasattr(module, "code_files")]
        two = users[0].code_files()[:2]
        for module in users:
            patch.setattr(module, "code_files", lambda: two)
        yield two


def test_a_save_copies_the_code_files_that_it_is_told_to(old, two_code_files, tmp_path):
    old.save_pretrained(tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("*.py"))] == [path.name for path in two_code_files]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """One layer, as much is saved and loaded here."""
    set_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    RobertaModel(RobertaConfig(**{**TINY["roberta"].to_dict(), "num_hidden_layers": 1})).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def old(backbone):
    return make_model(backbone, ["factual", "linguistic"], 0)


@pytest.fixture(scope="module")
def new(backbone):
    """One adapter was removed, one added and one changed, and so was everything else but the backbone."""
    model = make_model(backbone, ["factual", "causal"], 1, classifier_dropout=0.3)
    model.set_active_knowledge_adapters(["causal"])
    return model


@pytest.fixture(scope="module")
def new_with_backbone(backbone):
    model = make_model(backbone, ["causal", "factual"], 2)
    disturb(model.backbone, 2)
    return model


def is_model(found, expected) -> bool:
    if not same_tensors(found.state_dict(), expected.state_dict()):
        return False
    assert found.config.knowledge_adapters.keys() == expected.config.knowledge_adapters.keys()
    assert found.active_knowledge_adapters == expected.active_knowledge_adapters
    assert found.config.classifier_dropout == expected.config.classifier_dropout
    return True


def which(folder, models) -> int:
    """Loads the folder with all readers; returns the index of the model that they find."""
    found = KAdapterForSequenceClassification.from_pretrained(folder)
    (index,) = (index for index, model in enumerate(models) if is_model(found, model))
    assert is_model(AutoModelForSequenceClassification.from_pretrained(folder), models[index])
    assert_adapters_are_of(folder, models[index], {name for model in models for name in model.adapters})
    assert_stock_reader_sees_one(folder, models)
    return index


def assert_adapters_are_of(folder, model, names):
    """The folder has exactly the model's adapters."""
    for name in names:
        if name in model.adapters:
            path = adapter_file(folder, name)
            assert same_tensors(read_adapter(path).tensors, part_of(model.state_dict(), f"adapters.{name}"))
        else:
            with pytest.raises(KAdapterLoadError, match=f"there is no '{name}'"):
                adapter_file(folder, name)


def same_tensors(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def assert_stock_reader_sees_one(folder, models):
    """transformers' own reader of sharded checkpoints fails, or gets the tensors of a single model."""

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.found = {}

        def load_state_dict(self, state_dict, strict=True):
            self.found |= state_dict

    reader = Reader()
    try:
        load_sharded_checkpoint(reader, folder, strict=False)
    except (ValueError, FileNotFoundError):
        return
    states = [model.state_dict() for model in models]
    assert any(
        reader.found.keys() >= {name for name in state if not name.startswith("backbone.")}
        and reader.found.keys() <= state.keys()
        and all(torch.equal(tensor, state[name]) for name, tensor in reader.found.items())
        for state in states
    )


def visible(folder):
    """The contents of a folder, without the code."""
    return {name: digest for name, digest in contents(folder).items() if not name.endswith(".py")}


def saved_alone(model, folder):
    model.save_pretrained(folder)
    return visible(folder)


def kill_everywhere(tmp_path, first, second, least, from_move=False):
    """Saves `second` over `first`, killed at each change in turn, until a save completes; checks the folder each time."""
    first.save_pretrained(tmp_path / "first")
    expected = saved_alone(second, tmp_path / "alone")
    folder = tmp_path / "folder"
    seen, change = [], 0
    while True:
        shutil.copytree(tmp_path / "first", folder)
        killed = killed_at(change, folder, lambda: second.save_pretrained(folder), from_move)
        seen.append(which(folder, [first, second]))
        if not killed:
            break
        second.save_pretrained(folder)  # a later save works
        assert visible(folder) == expected
        shutil.rmtree(folder)
        change += 1
    assert seen == sorted(seen) and set(seen) == {0, 1}, seen
    assert change >= least and visible(folder) == expected
    return folder


def test_a_save_that_is_killed_leaves_the_old_or_the_new_model(old, new, tmp_path):
    kill_everywhere(tmp_path, old, new, least=40)


def test_it_does_so_when_the_new_model_brings_its_own_backbone(old, new_with_backbone, tmp_path):
    folder = kill_everywhere(tmp_path, old, new_with_backbone, least=15, from_move=True)
    assert (folder / "backbone.safetensors").exists()


def test_it_does_so_when_only_the_old_model_had_its_own_backbone(old, new_with_backbone, tmp_path):
    folder = kill_everywhere(tmp_path, new_with_backbone, old, least=15, from_move=True)
    assert not (folder / "backbone.safetensors").exists()


def test_a_save_that_is_killed_after_one_that_was_killed_leaves_the_first_new_model_or_the_second(
    old, new, new_with_backbone, tmp_path
):
    """The second save finds a folder whose files were being moved."""
    old.save_pretrained(tmp_path / "first")
    assert killed_at(5, tmp_path / "first", lambda: new.save_pretrained(tmp_path / "first"), from_move=True)
    assert (tmp_path / "first" / STAGING).is_dir() and which(tmp_path / "first", [old, new]) == 1
    folder = tmp_path / "folder"
    seen, killed = [], True
    while killed:
        shutil.copytree(tmp_path / "first", folder)
        killed = killed_at(3 * len(seen), folder, lambda: new_with_backbone.save_pretrained(folder))
        found = KAdapterForSequenceClassification.from_pretrained(folder)
        seen.append([is_model(found, model) for model in (new, new_with_backbone)].index(True))
        assert_adapters_are_of(folder, (new, new_with_backbone)[seen[-1]], ["factual", "causal", "linguistic"])
        assert_stock_reader_sees_one(folder, [new, new_with_backbone])
        shutil.rmtree(folder)
    assert seen == sorted(seen) and set(seen) == {0, 1} and len(seen) >= 15, seen


def test_a_first_save_that_is_killed_is_refused_or_the_model(old, tmp_path):
    """The folder was empty before."""
    folder = tmp_path / "folder"
    seen, killed = [], True
    while killed:
        killed = killed_at(2 * len(seen), folder, lambda: old.save_pretrained(folder))
        try:
            found = KAdapterForSequenceClassification.from_pretrained(folder)
            seen.append(is_model(found, old))
            assert seen[-1]
        except KAdapterLoadError as error:
            assert not (folder / "config.json").exists() and "folder" in str(error)
            seen.append(False)
        shutil.rmtree(folder, ignore_errors=True)
    assert seen == sorted(seen) and set(seen) == {False, True} and len(seen) >= 20


def test_an_adapter_that_was_being_saved_when_killed_is_the_old_or_the_new_one(old, new, tmp_path):
    states = [part_of(model.state_dict(), "adapters.factual") for model in (old, new)]
    for target in ("factual.safetensors", "library"):
        seen, killed = [], True
        while killed:
            path = old.save_knowledge_adapter(tmp_path / target, "factual")
            killed = killed_at(
                len(seen), tmp_path, lambda target=target: new.save_knowledge_adapter(tmp_path / target, "factual")
            )
            found = read_adapter(path).tensors
            seen.append([same_tensors(found, state) for state in states].index(True))
            new.save_knowledge_adapter(tmp_path / target, "factual")
            assert same_tensors(read_adapter(path).tensors, states[1])
            assert [file.name for file in path.parent.iterdir() if file.is_file()] == ["factual.safetensors"]
        assert seen == sorted(seen) and set(seen) == {0, 1} and len(seen) > 3


# ---- The disk is full ---------------------------------------------------------------------------------------------------


def fails_for_space(limit, action):
    """Runs `action` with files limited to `limit` bytes; checks that it fails with the system's error."""

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            action()
        except OSError as error:
            return 7 if error.errno == errno.EFBIG or "File too large" in str(error) else 8
        return 9

    assert in_child(run) == 7


def sizes(folder):
    return sorted(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("model", ("new", "new_with_backbone"))
def test_a_full_disk_leaves_the_old_model_and_nothing_else(request, old, model, tmp_path):
    new = request.getfixturevalue(model)
    folder = tmp_path / "folder"
    old.save_pretrained(folder)
    before = contents(folder)
    new.save_pretrained(tmp_path / "new")
    limits = {0, 10, *(size - 1 for size in sizes(tmp_path / "new"))}
    assert len(limits) > 8
    for limit in sorted(limits):
        fails_for_space(limit, lambda: new.save_pretrained(folder))
        assert contents(folder) == before
        assert {path.name for path in folder.iterdir() if path.is_dir()} == {"adapters"}
    assert which(folder, [old, new]) == 0


def test_a_full_disk_at_the_first_save_leaves_an_empty_folder(old, tmp_path):
    fails_for_space(1000, lambda: old.save_pretrained(tmp_path / "folder"))
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_full_disk_leaves_the_old_adapter_file(old, new, tmp_path):
    path = old.save_knowledge_adapter(tmp_path, "factual")
    before = contents(tmp_path)
    for limit in (0, 10, path.stat().st_size - 1):
        fails_for_space(limit, lambda: new.save_knowledge_adapter(tmp_path, "factual"))
        assert contents(tmp_path) == before


def test_a_save_that_fails_can_be_repeated_elsewhere(new, tmp_path):
    """The model can be saved after a save that failed."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="is a file"):
        new.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError):
        new.save_pretrained(tmp_path / "file" / "below")
    new.save_pretrained(tmp_path / "folder")
    assert is_model(KAdapterForSequenceClassification.from_pretrained(tmp_path / "folder"), new)
