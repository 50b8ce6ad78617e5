"""The commands info, push and pull, over HTTP."""

import json
import re

import pytest
from conftest import contents, small_adapter

from kadapter_hf import KAdapterForRelationClassification, KAdapterModel


KADAPTER = "from kadapter_hf.cli import app; app(prog_name='kadapter')"
WEIGHTS = r"^/cdn/.*\.safetensors$"


@pytest.fixture
def folder(backbone, tmp_path):
    """A K-Adapter with an adapter of more bytes than its header needs."""
    wide = small_adapter(hidden_size=128, intermediate_size=512, provenance={"objective": "factual"})
    model = KAdapterForRelationClassification.from_backbone(backbone, adapters={"factual": wide}, num_labels=3)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_what_is_pushed_is_shown_without_its_weights_and_pulled_as_it_was(hub, folder, tmp_path):
    def kadapter(*arguments, user="user"):
        done = hub.run(["-c", KADAPTER, *map(str, arguments), "--json"], tmp_path / user, "token", check=False)
        assert "Traceback" not in done.stderr
        return done

    done = kadapter("push", folder, "user/facts", "--message", "Facts")
    assert done.returncode == 0, done.stderr
    sent = json.loads(done.stdout)
    commit = hub.repositories["user/facts"].commits[sent["commit"]]
    assert commit.message == "Facts" and set(sent["files"]) | {".gitattributes"} == commit.files.keys()

    before = len(hub.log)
    done = kadapter("info", "user/facts", user="other")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["from"], found["commit"], found["has_head"]) == ("hub", sent["commit"], True)
    file = folder / "adapters" / "factual.safetensors"
    [adapter] = found["adapters"]
    assert (adapter["sha256"], adapter["bytes"]) == (
        contents(folder)["adapters/factual.safetensors"],
        file.stat().st_size,
    )
    assert adapter["provenance"] == {"objective": "factual"}
    [header] = [request for request in hub.log[before:] if re.search(WEIGHTS, request.path)]
    assert header.headers["range"] == "bytes=0-100000" and header.status == 206
    assert adapter["bytes"] > 1_000_000

    done = kadapter("pull", "user/facts", "--output", tmp_path / "out", user="other")
    assert done.returncode == 0, done.stderr
    pulled = contents(tmp_path / "out")
    pushed = {name: file.sha256 for name, file in commit.files.items()}
    assert pulled == pushed
    assert KAdapterModel.from_pretrained(tmp_path / "out").active_knowledge_adapters == ["factual"]

    hub.corrupt(r"factual\.safetensors", at=900_000)
    done = kadapter("pull", "user/facts", "--adapter", "factual", "--output", tmp_path / "damaged", user="third")
    assert done.returncode == 1 and "hash mismatch for" in done.stderr
    assert not (tmp_path / "damaged").exists()


def test_refusals_of_the_hub_are_plain_sentences(hub, folder, tmp_path):
    code = (
        "from typer.testing import CliRunner; from kadapter_hf.cli import app\n"
        "for arguments in %r:\n"
        "    result = CliRunner().invoke(app, arguments)\n"
        "    print(result.exit_code, result.stderr.splitlines()[-1])\n"
    )
    commands = [
        ["info", "user/nowhere"],
        ["pull", "user/nowhere"],
        ["pull", "user/facts", "--revision", "v2"],
        ["pull", "user/facts", "--adapter", "maths"],
        ["push", str(folder), "someone/facts"],
        ["push", str(folder), "user/facts", "--token", "hf_wrong"],
    ]
    hub.put("user/facts", {"README.md": b"facts"})
    done = hub.run(code % commands, tmp_path, "token")
    said = done.stdout.splitlines()
    assert all(line.startswith("1 Error: '") for line in said) and "hf_wrong" not in done.stdout
    assert [line.split("Error: ")[1].split("'")[1] for line in said] == [
        "user/nowhere",
        "user/nowhere",
        "user/facts",
        "user/facts",
        "someone/facts",
        "user/facts",
    ]
    parts = [
        "neither a local file",
        "not on the Hub, or private",
        "no such revision",
        "has no adapters/maths",
        "",
        "valid token",
    ]
    for line, part in zip(said, parts, strict=True):
        assert part in line


@pytest.mark.parametrize("change", [{"shape": ["x"]}, {"shape": None}, {"dtype": []}])
def test_a_header_that_describes_no_tensor_is_refused_in_one_sentence(hub, folder, tmp_path, change):
    file = folder / "adapters" / "factual.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    next(entry for key, entry in header.items() if key != "__metadata__").update(change)
    changed = json.dumps(header).encode()
    hub.put("user/odd", {"adapters/factual.safetensors": len(changed).to_bytes(8, "little") + changed})
    done = hub.run(["-c", KADAPTER, "info", "user/odd"], tmp_path / "home", "token", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("Error: 'user/odd'") and done.stderr.count("\n") == 1
