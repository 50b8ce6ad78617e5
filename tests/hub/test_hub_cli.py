"""The commands push, info and pull over HTTP, in a process with an empty cache."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import contents, small_adapter
from hub_server import HubServer

from kadapter_hf import KAdapterForRelationClassification, KAdapterModel


# Runs the commands in order and prints the result of each.
COMMANDS = """
import json, sys
from kadapter_cli import app
from typer.testing import CliRunner

results = [CliRunner().invoke(app, arguments, prog_name="kadapter") for arguments in json.loads(sys.argv[1])]
print(json.dumps([[result.exit_code, result.stdout, result.stderr] for result in results]))
"""
REFUSALS = {  # by command: the repository that is named, and why
    ("info", "user/nowhere"): ("user/nowhere", "neither a local file"),
    ("pull", "user/nowhere"): ("user/nowhere", "not on the Hub, or private"),
    ("pull", "user/readme", "--revision", "v2"): ("user/readme", "no such revision"),
    ("pull", "user/readme", "--adapter", "maths"): ("user/readme", "has no adapters/maths"),
    ("push", "{folder}", "someone/facts"): ("someone/facts", ""),
    ("push", "{folder}", "user/facts", "--token", "hf_wrong"): ("user/facts", "valid token"),
}
ODD_HEADERS = {"a shape of text": {"shape": ["x"]}, "no shape": {"shape": None}, "a list as dtype": {"dtype": []}}


class Done(NamedTuple):
    """What became of a command."""

    exit_code: int
    stdout: str
    stderr: str


class Run(NamedTuple):
    hub: HubServer
    sent: dict
    folder: Path
    output: Path
    commands: dict[tuple[str, ...], Done]


def odd_file(file: Path, change: dict) -> bytes:
    """An adapter's file, without its weights, with a header that describes no tensor."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    next(entry for key, entry in header.items() if key != "__metadata__").update(change)
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed


@pytest.fixture(scope="module")
def done(backbone, tmp_path_factory) -> Run:
    """A K-Adapter with an adapter of more bytes than its header needs is pushed, shown, pulled, and not found."""
    tmp_path = tmp_path_factory.mktemp("hub-cli")
    folder, output = tmp_path / "saved", tmp_path / "out"
    wide = small_adapter(hidden_size=128, intermediate_size=512, provenance={"objective": "factual"})
    model = KAdapterForRelationClassification.from_backbone(backbone, adapters={"factual": wide}, num_labels=3)
    model.save_pretrained(folder)
    with HubServer() as hub:
        hub.put("user/damaged", {name: (folder / name).read_bytes() for name in contents(folder)})
        hub.corrupt(r"/user/damaged/.*factual\.safetensors", at=900_000)
        hub.put("user/readme", {"README.md": b"facts"})
        for number, change in enumerate(ODD_HEADERS.values()):
            odd = odd_file(folder / "adapters" / "factual.safetensors", change)
            hub.put(f"user/odd-{number}", {"adapters/factual.safetensors": odd})
        commands = [
            ("push", str(folder), "user/facts", "--message", "Facts", "--json"),
            ("info", "user/facts", "--json"),
            ("pull", "user/facts", "--output", str(output), "--json"),
            ("pull", "user/damaged", "--adapter", "factual", "--output", str(tmp_path / "damaged")),
            *(("info", f"user/odd-{number}") for number in range(len(ODD_HEADERS))),
            *REFUSALS,
        ]
        arguments = [[argument.format(folder=folder) for argument in command] for command in commands]
        found = hub.run(["-c", COMMANDS, json.dumps(arguments)], tmp_path / "home", "token")
        assert not hub.errors
        results = [Done(*result) for result in json.loads(found.stdout.splitlines()[-1])]
        assert not any("Traceback" in result.stdout + result.stderr for result in results)
        yield Run(hub, json.loads(results[0].stdout), folder, output, dict(zip(commands, results, strict=True)))


def command(done: Run, *begin: str) -> Done:
    """The result of the command that starts with these arguments."""
    (result,) = (result for arguments, result in done.commands.items() if arguments[: len(begin)] == begin)
    return result


def test_a_push_makes_a_commit_with_the_files_that_it_names(done):
    commit = done.hub.repositories["user/facts"].commits[done.sent["commit"]]
    assert commit.message == "Facts" and set(done.sent["files"]) | {".gitattributes"} == commit.files.keys()


def test_what_is_pushed_is_shown_without_its_weights(done):
    shown = command(done, "info", "user/facts")
    assert shown.exit_code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert (found["from"], found["commit"], found["has_head"]) == ("hub", done.sent["commit"], True)
    file = done.folder / "adapters" / "factual.safetensors"
    [adapter] = found["adapters"]
    sha256 = contents(done.folder)["adapters/factual.safetensors"]
    assert (adapter["sha256"], adapter["bytes"]) == (sha256, file.stat().st_size)
    assert adapter["provenance"] == {"objective": "factual"}
    header, *pulled = done.hub.logged("GET", r"^/cdn/user/facts/.*\.safetensors$")
    assert (header.headers["range"], header.status) == ("bytes=0-100000", 206)
    assert [("range" in request.headers, request.status) for request in pulled] == [(False, 200)] * 2  # by `pull`
    assert adapter["bytes"] > 1_000_000


def test_what_is_pushed_is_pulled_as_it_was(done):
    pulled = command(done, "pull", "user/facts", "--output")
    assert pulled.exit_code == 0, pulled.stderr
    commit = done.hub.repositories["user/facts"].commits[done.sent["commit"]]
    assert contents(done.output) == {name: file.sha256 for name, file in commit.files.items()}
    assert KAdapterModel.from_pretrained(done.output).active_knowledge_adapters == ["factual"]


def test_a_damaged_adapter_is_not_pulled(done):
    pulled = command(done, "pull", "user/damaged")
    assert pulled.exit_code == 1 and "hash mismatch for adapters/factual.safetensors" in pulled.stderr
    assert not done.output.with_name("damaged").exists()


@pytest.mark.parametrize("arguments", REFUSALS, ids=" ".join)
def test_a_refusal_of_the_hub_is_a_plain_sentence(done, arguments):
    refused = command(done, *arguments)
    said = refused.stderr.splitlines()[-1]
    repo, part = REFUSALS[arguments]
    assert refused.exit_code == 1 and said.startswith(f"Error: '{repo}'") and part in said
    assert "hf_wrong" not in refused.stdout + refused.stderr


@pytest.mark.parametrize("number", range(len(ODD_HEADERS)), ids=ODD_HEADERS)
def test_a_header_that_describes_no_tensor_is_refused_in_one_sentence(done, number):
    refused = command(done, "info", f"user/odd-{number}")
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"Error: 'user/odd-{number}'") and refused.stderr.count("\n") == 1
