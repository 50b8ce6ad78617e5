"""The command `kadapter`: info, push, pull, combine, and what all commands have in common."""

import hashlib
import importlib.metadata
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
import typer
from conftest import POSITIONS, SIZES, contents
from datasets.exceptions import DatasetsError
from huggingface_hub import CommitInfo, constants
from huggingface_hub.errors import HTTPError, SafetensorsParsingError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, RobertaConfig
from typer.testing import CliRunner

from kadapter_cli import app
from kadapter_cli._output import plain_errors
from kadapter_hf import KAdapterConfig, KAdapterForRelationClassification, KAdapterModel, hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"
PRETRAIN = ["pretrain", "factual", "--data", "nowhere", "--output_dir", "nowhere"]
MULTITASK = ["pretrain", "multitask", "--output_dir", "nowhere", "--data"]
REPRODUCE = ["reproduce", "--data", "tacred=nowhere", "--adapters", "nowhere", "--output_dir", "nowhere"]
PROVENANCE = {"objective": "factual", "corpus": "fewrel", "metrics": {"micro_f1": 0.75}, "training": [{"epoch": 1}]}


def run(*arguments, **environment):
    environment = {"COLUMNS": "500"} | environment
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment, prog_name="kadapter")


def printed(*arguments) -> dict:
    """What a command prints with --json."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments, code: int = 1) -> str:
    """The one sentence with which a command fails."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def folder(build, tmp_path) -> Path:
    """A K-Adapter with two adapters and a head."""
    model = build(KAdapterForRelationClassification, num_labels=3)
    model.config.knowledge_adapters["factual"].provenance = PROVENANCE
    model.freeze_knowledge_adapters("linguistic")
    model.save_pretrained(tmp_path / "both")
    return tmp_path / "both"


@pytest.fixture
def file(folder, tmp_path) -> Path:
    """One adapter on its own."""
    return Path(shutil.copy(folder / "adapters" / "factual.safetensors", tmp_path / "alone.safetensors"))


@pytest.fixture
def cached(folder, tmp_path, monkeypatch) -> Path:
    """The same K-Adapter as the repository owner/both in the Hub's cache."""
    repository = tmp_path / "cache" / "models--owner--both"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return repository / "snapshots" / COMMIT


@pytest.fixture
def pushed(monkeypatch) -> list:
    """What `push` would send: a copy of the arguments, and the files in the folder."""
    calls = []

    def push_folder(folder, repo, **kwargs):
        calls.append((repo, kwargs, contents(folder), KAdapterModel.from_pretrained(folder)))
        return CommitInfo(
            commit_url=f"https://huggingface.co/{repo}/commit/{COMMIT}",
            commit_message="",
            commit_description="",
            oid=COMMIT,
        )

    monkeypatch.setattr(hub, "push_folder", push_folder)
    return calls


def backbone_of(folder: Path, **sizes) -> Path:
    """A new tiny RoBERTa, with weights of its own."""
    AutoModelForMaskedLM.from_config(RobertaConfig(**SIZES | POSITIONS | sizes)).save_pretrained(folder)
    return folder


def rewrite(file: Path, change) -> None:
    """Changes an adapter file's metadata, or its tensors in place."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["kadapter"])
    change(metadata, tensors)
    save_file(tensors, file, metadata={"kadapter": json.dumps(metadata)})


# ---- info -----------------------------------------------------------------------------------------------------------


def test_info_of_a_file_says_all_that_is_known_of_the_adapter(file, backbone):
    found = printed("info", file)
    assert (found["from"], found["commit"], len(found["adapters"])) == ("file", None, 1)
    adapter = found["adapters"][0]
    tensors = load_file(file)
    config = KAdapterModel.from_backbone(backbone, adapters=str(file)).config
    assert adapter == {
        "name": "factual",
        "file": "alone.safetensors",
        "backbone_layers": [0, 1, 2],
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtype": "float32",
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "fingerprint": adapter["fingerprint"],
        "backbone": {
            "name": backbone,
            "revision": None,
            "fingerprint": config.backbone_fingerprint,
            "hidden_size": 32,
        },
        "provenance": PROVENANCE,
    }


def test_info_of_a_folder_says_what_else_is_in_it(folder, backbone):
    found = printed("info", folder)
    assert [adapter["name"] for adapter in found["adapters"]] == ["factual", "linguistic"]
    assert found["class"] == "KAdapterForRelationClassification"
    assert (found["fusion"], found["has_head"], found["has_backbone"]) == ("concat", True, False)
    assert (found["active_adapters"], found["frozen_adapters"]) == (["factual", "linguistic"], ["linguistic"])
    assert found["backbone"]["name"] == backbone and found["backbone"]["num_hidden_layers"] == 4
    assert found["other_files"]["head.safetensors"] == (folder / "head.safetensors").stat().st_size
    assert "adapters/factual.safetensors" not in found["other_files"]


def test_a_fusion_is_no_head_and_a_trained_backbone_is_in_the_folder(build, tmp_path):
    model = build()
    model.unfreeze_backbone()
    model.train()
    model.save_pretrained(tmp_path / "trained")
    found = printed("info", tmp_path / "trained")
    assert (found["has_head"], found["has_backbone"]) == (False, True)


def test_info_of_a_folder_with_nothing_but_an_adapter(build, tmp_path):
    build().save_knowledge_adapter(tmp_path / "alone", "linguistic")
    found = printed("info", tmp_path / "alone")
    assert [adapter["file"] for adapter in found["adapters"]] == ["adapters/linguistic.safetensors"]
    assert "class" not in found


def test_the_tables_have_it_too_and_leave_the_terminal_alone(folder, build, tmp_path):
    text = run("info", folder).stdout
    sha256 = hashlib.sha256((folder / "adapters" / "factual.safetensors").read_bytes()).hexdigest()
    for said in ("KAdapterForRelationClassification", "adapter linguistic", "0, 1, 2", sha256, "micro_f1 0.75"):
        assert said in text
    code = sorted(folder.glob("*.py"))
    assert f"{len(code)} files of code ({sum(path.stat().st_size for path in code):,} bytes)" in text
    assert not any(path.name in text for path in code)
    model = build(adapters=["odd"])
    model.config.knowledge_adapters["odd"].provenance = {"corpus": "\x1b[2J[bold]mine[/bold]\ud800"}
    model.save_knowledge_adapter(tmp_path / "odd.safetensors", "odd")
    text = run("info", tmp_path / "odd.safetensors").stdout
    assert "\x1b" not in text and "[bold]mine[/bold]" in text


def test_info_without_a_network_shows_what_the_cache_has(cached):
    found = printed("info", "owner/both")
    assert (found["from"], found["commit"]) == ("cache", COMMIT)
    assert [adapter["name"] for adapter in found["adapters"]] == ["factual", "linguistic"]
    assert "showing the cached version" in run("info", "owner/both").stdout
    assert "with the revision v2" in refused("info", "owner/both", "--revision", "v2")


@pytest.mark.parametrize("source", ["nowhere", "owner/nowhere", "./no/where", "nowhere.safetensors"])
def test_a_source_that_is_nowhere_is_named_with_the_way_out(source, cached):
    said = refused("info", source)
    assert f"'{source}' is neither a local file or folder" in said
    assert "check the name and the network" in said or "owner/name" in said


def test_another_model_is_no_kadapter_nor_is_an_empty_folder(backbone, tmp_path):
    assert "holds a 'roberta' model, not a K-Adapter" in refused("info", backbone)
    assert "neither config.json nor adapters/<name>.safetensors" in refused("info", tmp_path)


def test_changed_metadata_and_changed_weights_are_refused(file):
    shutil.copy(file, file.with_name("weights.safetensors"))
    rewrite(file, lambda metadata, tensors: metadata["config"].update(provenance={"corpus": "better"}))
    assert "metadata that was changed" in refused("info", file)
    rewrite(file.with_name("weights.safetensors"), lambda metadata, tensors: next(iter(tensors.values())).zero_())
    assert "does not hold what was saved" in refused("info", file.with_name("weights.safetensors"))


# ---- info --backbone ------------------------------------------------------------------------------------------------


def test_an_adapter_fits_the_backbone_it_was_trained_on(folder, backbone):
    found = printed("info", folder, "--backbone", backbone)
    assert (found["fits"], found["compared_with"]) == (True, backbone)
    assert [adapter["fits"] for adapter in found["adapters"]] == [True, True]
    assert f"fits {backbone}" in run("info", folder, "--backbone", backbone).stdout


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({}, "this backbone has other weights"),
        ({"hidden_size": 16}, "was trained on a backbone of width 32, and this one has width 16"),
        ({"num_hidden_layers": 1}, "reads the state of layer 2, and this backbone has 1 layers"),
        ({"is_decoder": True}, "must be an encoder"),
    ],
    ids=["weights", "width", "depth", "kind"],
)
def test_an_adapter_does_not_fit_another_backbone(file, tmp_path, sizes, reason):
    result = run("info", file, "--backbone", backbone_of(tmp_path / "other", **sizes), "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["fits"]) == (1, False)
    assert reason in found["reason"] and found["reason"].startswith("factual: ")


def test_sizes_are_compared_without_the_backbones_weights(file, tmp_path):
    for name, width in (("right", 32), ("wrong", 16)):
        RobertaConfig(**SIZES | POSITIONS | {"hidden_size": width}).save_pretrained(tmp_path / name)
    found = printed("info", file, "--backbone", tmp_path / "right")
    assert found["fits"] is None and "not available locally" in found["reason"]
    assert run("info", file, "--backbone", tmp_path / "wrong").exit_code == 1


def test_whether_it_fits_can_not_be_told_of_what_is_not_known(file, backbone, build, tmp_path):
    found = printed("info", file, "--backbone", "owner/nowhere")
    assert found["fits"] is None and "the configuration of 'owner/nowhere' can't be read" in found["reason"]
    model = build()
    model.save_knowledge_adapter(file, "factual")
    rewrite(file, forget_backbone)
    found = printed("info", file, "--backbone", backbone)
    assert found["fits"] is None and "does not record the fingerprint" in found["reason"]


def forget_backbone(metadata, tensors):
    metadata["config"]["backbone_fingerprint"] = None
    del metadata["checksum"]
    metadata["checksum"] = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


# ---- push -----------------------------------------------------------------------------------------------------------


def test_push_sends_a_folder_as_it_is(folder, pushed):
    flags = ["--private", "--revision", "v2", "--create-pr", "--message", "Better", "--token", "hf_secret"]
    result = run("push", folder, "owner/both", *flags)
    assert result.exit_code == 0 and "hf_secret" not in result.output
    [(repo, arguments, files, _)] = pushed
    assert (repo, files) == ("owner/both", contents(folder))
    assert arguments == {
        "adapter": None,
        "commit_message": "Better",
        "private": True,
        "token": "hf_secret",
        "revision": "v2",
        "create_pr": True,
    }


def test_push_prints_the_commit_and_what_was_sent(folder, pushed):
    url = f"https://huggingface.co/owner/both/commit/{COMMIT}"
    found = printed("push", folder, "owner/both")
    assert (found["repo_id"], found["commit"], found["url"], found["pr_url"]) == ("owner/both", COMMIT, url, None)
    assert set(found["files"]) == contents(folder).keys()
    text = run("push", folder, "owner/both").stdout
    assert url in text and "adapters/factual.safetensors" in text


@pytest.mark.parametrize("alone", [True, False], ids=["its file", "its folder"])
def test_push_sends_one_adapter_as_a_repository_of_its_own(folder, file, pushed, alone):
    files = printed("push", *([file] if alone else [folder, "--adapter", "factual"]), "owner/factual")["files"]
    [(_, arguments, sent, model)] = pushed
    assert arguments["adapter"] == "factual" and sent.keys() == set(files)
    assert [name for name in files if name.endswith(".safetensors")] == ["adapters/factual.safetensors"]
    assert sent["adapters/factual.safetensors"] == hashlib.sha256(file.read_bytes()).hexdigest()
    whole = KAdapterModel.from_pretrained(folder)
    inputs = {"input_ids": torch.tensor([[0, 7, 8, 2]])}
    with torch.no_grad():
        assert torch.equal(model(**inputs).knowledge_states["factual"], whole(**inputs).knowledge_states["factual"])


def test_push_refuses_what_is_not_there_or_not_whole(folder, file, pushed):
    assert "there is no 'maths'" in refused("push", folder, "owner/x", "--adapter", "maths")
    assert "has the adapter 'factual', not 'maths'" in refused("push", file, "owner/x", "--adapter", "maths")
    rewrite(folder / "adapters" / "factual.safetensors", lambda _, tensors: next(iter(tensors.values())).zero_())
    assert "does not hold what was saved" in refused("push", folder, "owner/x")
    assert not pushed


def test_push_refuses_an_adapter_without_the_backbone_that_only_its_folder_has(build, tmp_path, pushed):
    model = build()
    model.unfreeze_backbone()
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "trained")
    said = refused("push", tmp_path / "trained", "owner/x", "--adapter", "factual")
    assert "is useless without it" in said and not pushed


def test_push_says_that_there_is_no_network(folder):
    result = run("push", folder, "owner/both")
    assert result.exit_code == 1 and "offline mode is enabled" in result.stderr and "Traceback" not in result.output


# ---- pull -----------------------------------------------------------------------------------------------------------


def test_pull_into_the_cache_says_where_it_is_and_how_to_load_it(cached, backbone):
    found = printed("pull", "owner/both")
    assert (found["commit"], found["path"]) == (COMMIT, str(cached))
    assert found["backbone"] == {"name": backbone, "revision": None, "included": False}
    names: dict = {}
    exec(found["load"], names)
    assert isinstance(names["model"], KAdapterForRelationClassification)
    text = run("pull", "owner/both").stdout
    assert str(cached) in text and backbone in text and found["load"] in text


def test_pull_into_a_folder_leaves_real_files(cached, tmp_path):
    (tmp_path / "out").mkdir()
    (cached / "optimizer.pt").write_bytes(b"a pickle")
    found = printed("pull", "owner/both", "--output", tmp_path / "out")
    assert found["path"] == str(tmp_path / "out") and "optimizer.pt" not in found["files"]
    (cached / "optimizer.pt").unlink()
    assert contents(tmp_path / "out") == contents(cached)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert found["load"].endswith(f"from_pretrained('{tmp_path / 'out'}')")


def test_pull_of_one_adapter_is_one_file(cached, tmp_path, build):
    found = printed("pull", "owner/both", "--adapter", "factual", "--output", tmp_path / "new" / "out")
    path = tmp_path / "new" / "out" / "factual.safetensors"
    assert found["path"] == str(path) and found["load"] == f"model.load_knowledge_adapter('{path}')"
    assert contents(path.parent) == {path.name: contents(cached)["adapters/factual.safetensors"]}
    model = build(adapters=["other"])
    exec(found["load"], {"model": model})
    assert "factual" in model.adapters


def test_pull_refuses_a_folder_with_files_in_it(cached, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "is not empty" in refused("pull", "owner/both", "--output", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_pull_leaves_nothing_of_a_repository_that_is_not_whole(cached, tmp_path):
    rewrite(cached / "adapters" / "factual.safetensors", lambda _, tensors: next(iter(tensors.values())).zero_())
    before = set(tmp_path.iterdir())
    for flags in ([], ["--adapter", "factual"]):
        said = refused("pull", "owner/both", "--output", tmp_path / "out", *flags)
        assert "does not hold what was saved" in said
    assert set(tmp_path.iterdir()) == before


def test_pull_leaves_nothing_when_the_disk_is_full(cached, tmp_path, monkeypatch):
    def copytree(source, target, **kwargs):
        target.mkdir()
        (target / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", copytree)
    before = set(tmp_path.iterdir())
    assert "No space left" in refused("pull", "owner/both", "--output", tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_pull_refuses_another_model_and_what_is_not_in_the_cache(cached):
    (cached / "config.json").write_text('{"model_type": "roberta"}')
    assert "holds a 'roberta' model, not a K-Adapter" in refused("pull", "owner/both")
    assert "'owner/nowhere' is not completely cached" in refused("pull", "owner/nowhere")
    assert "can't name a knowledge adapter" in refused("pull", "owner/both", "--adapter", "../config", code=2)


# ---- combine --------------------------------------------------------------------------------------------------------


def test_combine_prints_json_too(folder, file, backbone, tmp_path):
    shutil.copy(folder / "adapters" / "linguistic.safetensors", tmp_path / "other.safetensors")
    found = printed("combine", file, tmp_path / "other.safetensors", "--output", tmp_path / "out")
    assert found == {"output": str(tmp_path / "out"), "backbone": backbone, "adapters": ["factual", "linguistic"]}


def test_adapters_of_the_same_name_are_named_anew(file, build, tmp_path):
    build(seed=1).save_knowledge_adapter(tmp_path / "other", "factual")
    said = refused("combine", file, tmp_path / "other", "--output", tmp_path / "out", code=2)
    assert f"'{file}' and '{tmp_path / 'other'}' both have an adapter named 'factual'" in said
    assert f"factual2={tmp_path / 'other'}" in said and not (tmp_path / "out").exists()
    found = printed("combine", file, f"news={tmp_path / 'other'}", "--output", tmp_path / "out")
    assert found["adapters"] == ["factual", "news"]
    adapters = KAdapterModel.from_pretrained(tmp_path / "out").adapters
    for name, source in (("factual", file), ("news", tmp_path / "other" / "adapters" / "factual.safetensors")):
        saved = {key.removeprefix("adapters.factual."): value for key, value in load_file(source).items()}
        assert all(torch.equal(value, saved[key]) for key, value in adapters[name].state_dict().items())


def test_a_name_chooses_one_of_several_adapters(folder, tmp_path):
    found = printed("combine", f"linguistic={folder}", "--output", tmp_path / "out")
    assert found["adapters"] == ["linguistic"]


def test_combine_refuses_a_folder_with_files_in_it(file, folder):
    before = contents(folder)
    assert "exists and is not empty; choose another folder" in refused("combine", file, "--output", folder)
    assert contents(folder) == before


def test_the_combined_model_has_its_backbones_tokenizer(file, backbone, tmp_path):
    assert run("combine", file, "--output", tmp_path / "out").exit_code == 0
    ids = AutoTokenizer.from_pretrained(backbone)("the river")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the river")["input_ids"] == ids


def test_a_backbone_without_a_tokenizer_is_told(build, tmp_path):
    other = str(backbone_of(tmp_path / "other"))
    build(backbone=other).save_knowledge_adapter(tmp_path / "alone.safetensors", "factual")
    result = run("combine", tmp_path / "alone.safetensors", "--output", tmp_path / "out")
    assert result.exit_code == 0 and f"'{other}' has no tokenizer" in result.stdout


@pytest.fixture(params=["float32", "bfloat16"])
def own_backbone(request, backbone, tmp_path) -> Path:
    """A copy of the tiny RoBERTa with its tokenizer."""
    folder = Path(shutil.copytree(backbone, tmp_path / "backbone"))
    AutoModelForMaskedLM.from_pretrained(backbone, dtype=request.param).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fusion", ["concat", "add", "attention"])
def test_combine_writes_the_same_bytes_without_the_backbones_weights(fusion, own_backbone, build, tmp_path):
    for name in ("factual", "linguistic"):
        build(adapters=[name], backbone=str(own_backbone)).save_knowledge_adapter(tmp_path, name)
    sources = [tmp_path / "adapters" / f"{name}.safetensors" for name in ("factual", "linguistic")]
    written = []
    for folder in ("with", "without"):
        torch.manual_seed(0)  # a new fusion has some noise
        result = run("combine", *sources, "--fusion", fusion, "--output", tmp_path / folder)
        assert result.exit_code == 0, result.stderr
        assert ("the weights of the backbone are not available" in result.stdout) is (folder == "without")
        written.append(contents(tmp_path / folder))
        (own_backbone / "model.safetensors").unlink(missing_ok=True)
    assert written[0] == written[1]


def test_without_weights_adapters_of_different_backbones_are_refused(build, tmp_path):
    for number in (1, 2):
        other = backbone_of(tmp_path / f"backbone{number}")
        build(backbone=str(other)).save_knowledge_adapter(tmp_path / f"{number}.safetensors", "factual")
        (other / "model.safetensors").unlink()
    said = refused(
        "combine", tmp_path / "1.safetensors", f"two={tmp_path / '2.safetensors'}", "--output", tmp_path / "out"
    )
    assert "'2.safetensors' was trained on the backbone" in said.replace(f"{tmp_path}/", "")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_records_no_fingerprint_needs_the_backbones_weights(build, tmp_path):
    other = backbone_of(tmp_path / "backbone")
    build(backbone=str(other)).save_knowledge_adapter(tmp_path / "alone.safetensors", "factual")
    rewrite(tmp_path / "alone.safetensors", forget_backbone)
    (other / "model.safetensors").unlink()
    assert f"the backbone '{other}' can't be loaded" in refused(
        "combine", tmp_path / "alone.safetensors", "--output", "x"
    )


@pytest.mark.parametrize(("fusion", "near"), [("concat", True), ("gate", True), ("attention", True), ("add", False)])
def test_combine_says_whether_the_output_is_close_to_the_backbones(fusion, near, file, tmp_path):
    result = run("combine", file, "--fusion", fusion, "--output", tmp_path / "out")
    assert ("its output is close to the backbone's" in result.stdout) is near
    with torch.no_grad():
        output = KAdapterModel.from_pretrained(tmp_path / "out")(torch.tensor([[0, 7, 8, 2]]))
    state = output.backbone_last_hidden_state
    assert ((output.last_hidden_state - state).norm() < 0.5 * state.norm()).item() is near


# ---- All commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["combine", "convert", "info", "pretrain", "pull", "push"])
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0 and f"Example: kadapter {command} " in " ".join(result.stdout.split())


def test_the_version_is_that_of_the_package():
    assert run("--version").stdout == f"kadapter-hf {importlib.metadata.version('kadapter-hf')}\n"


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["inof", "x"], "Did you mean 'info'?"),
        (["prepare", "fewrle", "x"], "Did you mean 'fewrel'?"),
        (["info", "x", "--bakcbone", "y"], "--backbone"),
        (["pretrain", "factul"], "Did you mean 'factual'?"),
        (
            ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--num_epochs", "1"],
            "Did you mean '--num_train_epochs'?",
        ),
        (
            ["pretrain", "factual", "--data", "x", "--output_dir", "y", "--name=x", "--evalsize=1"],
            "Did you mean '--eval_size'?",
        ),
    ],
)
def test_what_does_not_exist_gets_the_nearest_one_suggested(arguments, near):
    result = run(*arguments)
    assert result.exit_code == 2 and near in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["push", "nowhere", "owner/x"], "'nowhere' does not exist"),
        (["push", ".", "a/b/c"], "'a/b/c' is not a valid name of a repository on the Hub (owner/name)"),
        (["pull", "a/b/c"], "'a/b/c' is not a valid name of a repository on the Hub (owner/name)"),
        (["pretrain", "factul"], "'factul' is not one of factual, linguistic, typing"),
        ([*PRETRAIN, "--eval_size", "0"], "--eval_size must be between 0 and 1, not 0.0"),
        ([*PRETRAIN, "--max_train_samples", "0"], "--max_train_samples must be at least 1, not 0"),
        ([*PRETRAIN, "--activations_dtype", "int8"], "invalid choice: 'int8'"),
        ([*PRETRAIN, "--fusion", "ad"], "--fusion: invalid choice: 'ad'"),
        ([*PRETRAIN, "--name", "a/b"], "'a/b' can't name a knowledge adapter"),
        ([*PRETRAIN, "--adapter_hidden_size", "7"], "_num_attention_heads (12) must divide --adapter_hidden_size (7)"),
        ([*PRETRAIN, "--dropout", "1.5"], "--dropout must be in [0, 1), not 1.5"),
        ([*PRETRAIN, "--max_steps", "-5"], "--max_steps must be at least -1, not -5"),
        ([*PRETRAIN, "--num_train_epochs", "0"], "--num_train_epochs must be more than 0 without --max_steps"),
        ([*PRETRAIN, "--data", "x", ""], "--data is empty"),
        (["finetune", "tacred", "--train_file", "", "--output_dir", "x"], "--train_file is empty"),
        (["evaluate", "tacred", "--model", "x", "--data", ""], "Invalid value for '--data': it is empty"),
        (["predict", "tacred", "--model", "", "--input", "setup.cfg"], "Invalid value for '--model': it is empty"),
        (["info", ""], "Invalid value for 'source': it is empty"),
        (["probe", "--model", "x", "--data", ""], "--data is empty"),
        (["pretrain", "--data", "x", "factual"], "the OBJECTIVE comes before all flags: `factual --data …`"),
        (["finetune", "--data", "x", "tacred"], "the TASK comes before all flags: `open-entity --data …`"),
        ([*MULTITASK, "x"], "--data takes OBJECTIVE=SOURCE, and there is no objective 'x'; there are factual, ling"),
        ([*MULTITASK, "factual=x", "--max_eval_samples", "0"], "--max_eval_samples must be at least 1, not 0"),
        ([*REPRODUCE, "--learning_rate", "-1"], "--learning_rate must be at least 0, not -1.0"),
        ([*PRETRAIN, "--max_length", "0"], "--max_length must be at least 1, not 0"),
        ([*PRETRAIN, "--cache_activations", "setup.cfg"], "--cache_activations must be a folder"),
        ([*PRETRAIN, "--output_dir", "setup.cfg"], "--output_dir must be a folder; 'setup.cfg' is a file"),
        ([*PRETRAIN, "--learning_rate", "nan"], "--learning_rate must be at least 0, not nan"),
        ([*PRETRAIN, "--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be at least 1, not 0"),
        ([*PRETRAIN, "--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps must be at least 1, not 0"),
        ([*PRETRAIN, "--seed", "-1"], "--seed must be at least 0, not -1"),
        ([*PRETRAIN, "--dataloader_num_workers", "-1"], "--dataloader_num_workers must be at least 0, not -1"),
        ([*PRETRAIN, "--adam_beta1", "2"], "--adam_beta1 must be in [0, 1), not 2.0"),
        ([*PRETRAIN, "--report_to", "unknownthing"], "--report_to: unknownthing is not supported"),
        ([*PRETRAIN, "--lr_scheduler_kwargs", "x"], "--lr_scheduler_kwargs must be a JSON object, not x"),
        ([*PRETRAIN, "--accelerator_config", "nowhere.json"], "there is no file 'nowhere.json'"),
        ([*PRETRAIN, "--hub_model_id", "a/b/c"], "'a/b/c' is not a valid name of a repository on the Hub"),
        ([*PRETRAIN, "--max_steps", "many"], "--max_steps/--max-steps: invalid int value: 'many'"),
        ([*PRETRAIN, "--load_best_model_at_end", "true"], "requires the save and eval strategy to match"),
        ([*PRETRAIN, "--whatever", "x"], "there is no flag --whatever. Try 'kadapter pretrain factual --help'"),
        ([*PRETRAIN, "more", "rows"], "unexpected arguments: more rows"),
        (["combine", "x", "--output", "y", "--fusion", "ad"], "'ad' is not one of add, attention, concat, gate"),
        (["combine", "x", "--output", "y", "--fusion-config", "top_k"], "must be a JSON object like"),
        (["combine", "x", "--output", "y", "--fusion-config", '{"top_k": 2}'], "the fusion 'concat' has no ['top_k']"),
        (["combine", "a/b=x", "--output", "y"], "there is no 'a/b=x', and 'a/b' can't name a knowledge adapter"),
        (["pull", "owner/x", "--adapter", "../x"], "'../x' can't name a knowledge adapter"),
        (["prepare", "trex", "docs", "--output", "x", "--seed", "-1"], "Invalid value for '--seed'"),
        (["convert", "setup.cfg", "--output", "x", "--layers", "0,a"], "comma-separated numbers are expected"),
    ],
)
def test_wrong_arguments_say_what_was_expected(arguments, said, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    result = run(*arguments)
    assert result.exit_code == 2 and said in " ".join(result.stderr.split()) and result.stderr.count("\n") < 8


@pytest.mark.parametrize("token", ["", "hf_secret\n", "hf_sécret"])
def test_what_can_not_be_a_token_is_refused_and_not_shown(token):
    result = run("pull", "owner/x", "--token", token)
    assert result.exit_code == 2 and "not a valid token" in result.stderr and "cret" not in result.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_and_options(shell):
    def completed(words: str) -> str:
        number = str(len(words.split()) - 1)
        environment = {"_KADAPTER_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": number}
        environment |= {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        return run(**environment).stdout

    assert "info" in completed("kadapter in") and "push" not in completed("kadapter in")
    assert "--backbone" in completed("kadapter info --ba")


def test_completion_can_be_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # else the shell in use is looked for
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run("--install-completion", "bash")
    assert result.exit_code == 0, result.output
    assert "_KADAPTER_COMPLETE" in (tmp_path / ".bash_completions" / "kadapter.sh").read_text()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a\nb"),
        OSError("a\nb"),
        MemoryError("a\nb"),
        torch.OutOfMemoryError("a\nb"),
        HTTPError("a\nb"),
        SafetensorsParsingError("a\nb"),
        DatasetsError("a\nb"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_faults_of_data_machine_and_hub_are_one_line(error, capsys):
    with pytest.raises(typer.Exit) as ended, plain_errors():
        raise error
    said = capsys.readouterr().err
    assert ended.value.exit_code == 1 and said.startswith("Error: ") and "a b" in said and said.count("\n") == 1


def test_an_impossible_value_is_wrong_usage_and_one_in_a_file_is_not(folder):
    with pytest.raises(typer.Exit) as ended, plain_errors():
        KAdapterConfig(fusion="ad")
    assert ended.value.exit_code == 2
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"fusion": "ad"}))
    assert "fusion must be one of" in refused("info", folder)


def test_a_message_is_shown_with_its_beginning_and_its_end_if_it_is_long(capsys):
    with pytest.raises(typer.Exit), plain_errors():
        raise ValueError(f"the first words {'x' * 100_000} the last words")
    said = capsys.readouterr().err
    assert said.startswith("Error: the first words x") and said.endswith("x the last words\n") and len(said) < 5000


# ---- app ------------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_told_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"the port {port} is in use; choose another with --port" in refused("app", "no-model", "--port", port)


def test_an_address_of_another_machine_is_told_before_the_model_is_loaded():
    said = refused("app", "no-model", "--host", "192.0.2.1")  # is of none, RFC 5737
    assert "Error: can't listen on 192.0.2.1: " in said and said.count("192.0.2.1") == 1
