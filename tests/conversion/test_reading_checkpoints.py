"""Reading untrusted checkpoints: no file runs code or exhausts memory, and unreadable files are refused with clear errors."""

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION
from typer.testing import CliRunner

from kadapter_cli import app
from kadapter_hf.conversion import read_checkpoint
from kadapter_hf.conversion.original import Source
from kadapter_hf.modeling.format_kadapter import KAdapterLoadError


FORMATS = {"legacy": False, "zip": True}


class Command:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture(params=FORMATS)
def save(request, tmp_path):
    """`save(content)`: the path of a checkpoint, in the format of 2020 and in today's."""

    def save(content):
        path = tmp_path / "pytorch_model.bin"
        torch.save(content, path, _use_new_zipfile_serialization=FORMATS[request.param])
        return path

    return save


def refused(path) -> str:
    """The error of the command, in one sentence and without a traceback."""
    arguments = ["convert", str(path), "--output", str(path.parent / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ") and str(path) in result.stderr
    assert not (path.parent / "out").exists()
    return result.stderr


def test_tensors_of_each_kind_are_read(save):
    content = OrderedDict(
        single=torch.randn(3, 4), half=torch.randn(5).half(), bfloat16=torch.randn(2).bfloat16(), ids=torch.arange(6)
    )
    content["shared"] = content["single"]
    content["part"] = content["single"][1:]
    found = read_checkpoint(save(content))
    assert found.keys() == content.keys()
    for name, tensor in content.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_modules_state_dict_is_read_with_its_versions(save):
    module = torch.nn.BatchNorm1d(3)
    assert read_checkpoint(save(module.state_dict())).keys() == module.state_dict().keys()


@pytest.mark.parametrize("place", ["alone", "among tensors"])
def test_a_command_in_the_pickle_does_not_run(save, tmp_path, place):
    proof = tmp_path / "proof"
    command = Command(f"touch {proof}")
    said = refused(save(command if place == "alone" else OrderedDict(a=torch.ones(2), b=command)))
    assert "refers to posix.system" in said and "Nothing was run" in said
    assert not proof.exists()


def test_a_command_in_a_plain_pickle_or_in_the_header_does_not_run(tmp_path):
    proof, path = tmp_path / "proof", tmp_path / "pytorch_model.bin"
    command = Command(f"touch {proof}")
    start = pickle.dumps(MAGIC_NUMBER, protocol=2)
    for content in (pickle.dumps(command), start + pickle.dumps(command, protocol=2)):
        path.write_bytes(content)
        refused(path)
        assert not proof.exists()


@pytest.mark.parametrize(
    "content", [torch.nn.Linear(2, 2), [torch.ones(2)], {}, {"a": {"b": torch.ones(1)}}, {"a": 1}]
)
def test_what_is_no_state_dict_is_refused(save, content):
    assert "is not a state dict" in (said := refused(save(content))) or "refers to torch.nn" in said


def test_a_checkpoint_of_something_else_is_refused_with_a_name_in_it(save):
    content = {"bert.embeddings.LayerNorm.weight": torch.ones(4), "bert.pooler.dense.bias": torch.ones(4)}
    assert "checkpoint of something else" in (said := refused(save(content)))
    assert "'bert.embeddings.LayerNorm.weight'" in said


@pytest.mark.parametrize("left", [0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_refused(save, left):
    path = save(OrderedDict((f"adapter.{number}", torch.randn(100, 100)) for number in range(4)))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
    said = refused(path)
    assert "damaged or incomplete" in said or "truncated or forged" in said


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02", b"not a checkpoint\n" * 100, os.urandom(4096)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    refused(path)


def test_a_zip_archive_of_something_else_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not a PyTorch checkpoint" in refused(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "is missing" in refused(tmp_path / "none.bin")
    (tmp_path / "folder").mkdir()
    assert "is a folder" in refused(tmp_path / "folder")


# ---- Files that claim more than they hold -------------------------------------------------------------------------------


HUGE = 2**38
# How much more memory a process has had while it read the checkpoint.
MEASURE = """
import sys
from pathlib import Path
from kadapter_hf.conversion import read_checkpoint

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1])

before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
try:
    read_checkpoint(Path(sys.argv[1]))
except OSError as error:
    print(error)
print("MiB", (status("VmHWM") - before) // 1024)
"""


def archive(path: Path, entries: dict[str, bytes], compressed: bool) -> None:
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, content in entries.items():
            file.writestr(f"archive/{name}", content)


def text(content: str) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content.encode()


def number(content: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", content)


def entry(name: str, key: str, count: int, legacy: bool = True, device: str = "cpu") -> bytes:
    """What a pickle has for one tensor: its name, a storage of so many numbers, and how to read it."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text(device) + number(count)
    storage += b"NtQ" if legacy else b"tQ"
    view = number(0) + number(count) + b"\x85" + number(1) + b"\x85" + b"\x89ccollections\nOrderedDict\n)R"
    return text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"tRs"


def pickled(*entries: bytes) -> bytes:
    return b"\x80\x02}" + b"".join(entries) + b"."


def of_one_tensor(count: int, legacy: bool = False) -> bytes:
    return pickled(entry("adapter.0.x", "0", count, legacy))


def legacy_file(content: bytes) -> bytes:
    """A file as torch wrote it until 2020, around this pickle; it holds four numbers."""
    sizes = {"protocol_version": PROTOCOL_VERSION, "little_endian": True, "type_sizes": {}}
    header = b"".join(pickle.dumps(part, protocol=2) for part in (MAGIC_NUMBER, PROTOCOL_VERSION, sizes))
    return header + content + pickle.dumps(["0"], protocol=2) + struct.pack("<q4f", 4, 1, 2, 3, 4)


def claim(path: Path, name: bytes, size: int) -> None:
    """Changes the size of an entry in the archive's directory."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(name))
    content[entry + 20 : entry + 28] = struct.pack("<II", size, size)
    path.write_bytes(content)


def bomb_compressed(path):
    archive(path, {"data.pkl": of_one_tensor(2**26), "data/0": bytes(2**28)}, compressed=True)


def bomb_claimed(path):
    archive(path, {"data.pkl": of_one_tensor(4), "data/0": bytes(16)}, compressed=False)
    claim(path, b"archive/data/0", 2**32 - 2)


def bomb_pickled(path):
    archive(path, {"data.pkl": of_one_tensor(HUGE), "data/0": bytes(16)}, compressed=False)


def bomb_legacy(path):
    path.write_bytes(legacy_file(of_one_tensor(HUGE, legacy=True)))


def bomb_many(path):
    """Many storages, each of which would fit into the file alone."""
    path.write_bytes(legacy_file(pickled(*(entry(f"adapter.{n}.x", str(n), 1000) for n in range(100)))))


BOMBS = [bomb_compressed, bomb_claimed, bomb_pickled, bomb_legacy, bomb_many]


def test_the_files_that_the_bombs_are_made_of_can_be_read(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(legacy_file(of_one_tensor(4, legacy=True)))
    assert read_checkpoint(path)["adapter.0.x"].tolist() == [1, 2, 3, 4]
    archive(path, {"data.pkl": of_one_tensor(4), "data/0": struct.pack("<4f", 1, 2, 3, 4), "version": b"3\n"}, False)
    assert read_checkpoint(path)["adapter.0.x"].tolist() == [1, 2, 3, 4]


def test_a_checkpoint_that_was_saved_from_a_gpu_is_read_without_one(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(legacy_file(pickled(entry("adapter.0.x", "0", 4, device="cuda:0"))))
    read = read_checkpoint(path)["adapter.0.x"]
    assert read.device.type == "cpu" and read.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused(tmp_path, bomb):
    path = tmp_path / "pytorch_model.bin"
    bomb(path)
    said = refused(path)
    assert "compressed entry" in said or "claims" in said or "truncated or forged" in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_bomb_is_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    bomb_compressed(path)
    assert path.stat().st_size < 2**20
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    assert "compressed entry" in done.stdout
    assert int(done.stdout.split("MiB")[1]) < 32


def test_a_tensor_that_repeats_its_numbers_is_refused(save):
    read = read_checkpoint(save({"adapter.0.x": torch.zeros(1).expand(2**20, 2**18)}))
    with pytest.raises(KAdapterLoadError, match=r"'adapter\.0\.x' does not hold plain floating-point numbers"):
        Source(Path("pytorch_model.bin"), read).take("adapter.0.x", (2**20, 2**18), [])
