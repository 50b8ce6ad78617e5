"""What a push to the Hub uploads, keeps and refuses; scripts/pushes.py does all pushes in one process."""

import json
from pathlib import Path

import pytest
from conftest import load_script
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load


SCRIPT = Path(__file__).parent / "scripts" / "pushes.py"
TYPED = load_script(SCRIPT).TYPED
FACTUAL = "adapters/factual.safetensors"
REFUSED_RACES = 3


@pytest.fixture(scope="module")
def hub(backbone, tmp_path_factory):
    """A Hub with the backbone and all pushes; in `raced` and `contested`, others commit at the same time."""
    home = tmp_path_factory.mktemp("pushes")
    with HubServer() as hub:
        files = {path.name: path.read_bytes() for path in Path(backbone).iterdir()}
        hub.put("user/encoder", files, message="backbone")
        raced: list[str] = []

        def come_between(repo: str) -> None:
            if repo == "user/contested" or repo == "user/raced" and repo not in raced:
                raced.append(repo)
                hub.put(repo, {"README.md": f"---\nlicense: mit\n---\nOthers' {len(raced)}.\n".encode()})

        hub.before_commit = come_between
        done = hub.run([str(SCRIPT), str(home)], home, token="token")
        hub.found = json.loads(done.stdout.splitlines()[-1])
        hub.stderr = done.stderr
        yield hub
        assert not hub.errors


def commits(hub: HubServer, repo: str) -> list[str]:
    """The messages of the main branch, the newest first."""
    repository, messages = hub.repositories[repo], []
    commit = repository.commit_id("main")
    while commit is not None:
        messages.append(repository.commits[commit].message)
        commit = repository.commits[commit].parent
    return messages


def weights(hub: HubServer, repo: str, revision: str = "main") -> dict[str, bytes]:
    return {name: content for name, content in hub.files(repo, revision).items() if name.endswith(".safetensors")}


def test_a_model_goes_up_in_one_commit_without_its_backbone(hub):
    files = hub.files("user/model")
    assert set(weights(hub, "user/model")) == {FACTUAL, "adapters/linguistic.safetensors", "head.safetensors"}
    assert {"config.json", "model.safetensors.index.json", "README.md", "heads_kadapter.py"} <= files.keys()
    assert commits(hub, "user/model")[0].startswith("The first")
    assert hub.found["oid"] == hub.repositories["user/model"].commit_id("main")
    assert hub.found["url"].endswith(hub.found["oid"])
    assert "rivers" in ModelCard(files["README.md"].decode()).data.tags


def test_pushing_again_makes_no_commit_and_sends_nothing(hub):
    assert len(commits(hub, "user/model")) == 2  # the repository's own first, and ours
    assert len(hub.logged("PUT", "user(%2F|/)model/")) == len(weights(hub, "user/model"))


def test_a_private_repository_is_private(hub):
    assert hub.repositories["user/private"].private and not hub.repositories["user/model"].private


def test_a_branch_and_a_pull_request_leave_main_as_it_was(hub):
    first = weights(hub, "user/branch")
    assert weights(hub, "user/branch", "next")[FACTUAL] != first[FACTUAL]
    assert hub.found["pr"] == "refs/pr/1"
    assert weights(hub, "user/branch", "refs/pr/1")[FACTUAL] == weights(hub, "user/branch", "next")[FACTUAL]
    assert len(commits(hub, "user/branch")) == 2


def test_what_the_model_no_longer_has_is_removed_and_nothing_else(hub):
    assert set(weights(hub, "user/shrunk")) == {FACTUAL, "head.safetensors"}
    assert hub.files("user/shrunk")["adapters/notes.txt"] == b"mine"


def test_a_push_that_another_one_overtook_is_made_again_on_top_of_it(hub):
    assert weights(hub, "user/raced") == weights(hub, "user/shrunk")
    card = ModelCard(hub.files("user/raced")["README.md"].decode())
    assert card.data.license == "mit" and "Others' 1." in card.text and card.data.base_model == "user/encoder"


def test_a_push_that_is_overtaken_each_time_says_so_and_changes_nothing(hub):
    assert "KAdapterLoadError: 'user/contested' kept changing during 3 attempts" in hub.found["contested"]
    assert not weights(hub, "user/contested")
    assert commits(hub, "user/contested").count("put") == REFUSED_RACES


def test_the_backbone_s_own_repository_is_refused(hub):
    assert "'user/encoder' is the backbone's own repository" in hub.found["into the backbone's"]
    assert commits(hub, "user/encoder") == ["backbone", "initial commit"]


# ---- One adapter --------------------------------------------------------------------------------------------------------


def test_an_adapter_goes_up_alone_with_the_bytes_it_has_everywhere(hub):
    assert weights(hub, "user/factual") == {FACTUAL: weights(hub, "user/both")[FACTUAL]}
    assert len(commits(hub, "user/factual")) == 2 and commits(hub, "user/factual")[0].startswith("Facts")


def test_its_repository_loads_whole_as_a_model_and_as_an_adapter(hub):
    assert hub.found["loading info"] == {} and hub.found["adds"]


def test_an_adapter_does_not_take_the_place_of_something_else(hub):
    found = {repo: hub.found[f"linguistic into {repo}"] for repo in ("user/both", "user/factual", "user/encoder")}
    assert "'user/both' holds the knowledge adapters ['factual']" in found["user/both"]
    assert "'user/factual' holds the knowledge adapters ['factual']" in found["user/factual"]
    assert "'user/encoder' is the backbone's own repository" in found["user/encoder"]
    assert len(commits(hub, "user/both")) == 2


def test_an_adapter_of_a_backbone_that_is_nowhere_else_is_not_sent_without_it(hub):
    assert "BackboneMismatchError" in hub.found["on a changed backbone"]
    assert "push both with push_to_hub" in hub.found["on a changed backbone"]
    assert "user/late" not in hub.repositories
    assert "backbone.safetensors" in weights(hub, "user/tuned")


# ---- Model cards --------------------------------------------------------------------------------------------------------


def test_what_was_edited_in_the_card_on_the_hub_survives_the_next_push(hub):
    card = ModelCard(hub.files("user/edited")["README.md"].decode())
    assert card.data.license == "apache-2.0" and "## Mine\n\nM.\n" in card.text
    assert "| rows | 34 |" in card.text


def test_the_snippet_of_the_card_runs_as_printed(hub):
    assert '"user/factual"' in hub.files("user/factual")["README.md"].decode()
    assert hub.found["snippet"].startswith("torch.Size([1, ")


# ---- Pipelines ------------------------------------------------------------------------------------------------------------


def test_a_pipeline_comes_from_the_hub_or_a_folder_with_and_without_the_package(hub, tmp_path):
    code = f"""
import json, sys
sys.modules["kadapter_hf"] = None  # can't be imported
from huggingface_hub import snapshot_download
from transformers import pipeline

for source in ("user/typing", snapshot_download("user/typing", local_dir="typing")):
    pipe = pipeline("entity-typing", model=source, trust_remote_code=True)
    print(json.dumps(pipe({TYPED!r}, threshold=0.0)))
"""
    printed = hub.run(code, tmp_path).stdout.splitlines()[-2:]
    from_hub, from_folder, with_package = (
        [(label["label"], round(label["score"], 4)) for labels in entities for label in labels]
        for entities in (*map(json.loads, printed), hub.found["typing"])
    )
    assert from_hub == from_folder == with_package and len(with_package) == 6


# ---- Training -----------------------------------------------------------------------------------------------------------


def test_trainer_pushes_checkpoints_and_the_model(hub):
    messages = commits(hub, "user/trained")
    assert any(message.startswith("Training in progress, step") for message in messages)
    assert any(message.startswith("End of training") for message in messages)
    assert hub.found["trained"] == pytest.approx(hub.found["trained, loaded"], abs=1e-6)


def test_a_push_after_trainer_s_makes_the_card_the_k_adapter_s_and_keeps_the_training(hub):
    card = ModelCard(hub.files("user/trained")["README.md"].decode())
    assert card.data.base_model == "user/encoder" and "## Use" in card.text
    assert "### Training hyperparameters" in card.text and "More information needed" not in card.text


def test_save_pretrained_pushes_the_folder_but_no_pickles(hub):
    files = hub.files("user/saved")
    assert {"notes.txt", "tokenizer.json", FACTUAL} <= files.keys()
    assert not {"optimizer.pt", "training_args.bin", "_draft.txt"} & files.keys()
    assert load(files[FACTUAL])


def test_pretraining_pushes_the_adapter_with_a_card_that_has_its_metrics(hub):
    files = hub.files("user/pretrained")
    assert {FACTUAL, "training.png", "trainer_state.json", "tokenizer.json"} <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert {result.metric_name for result in card.data.eval_results} >= {"micro f1", "macro f1"}
    assert (card.data.license, card.data.language, card.data.base_model) == ("cc0-1.0", ["en"], "user/encoder")
    assert card.text.count("\n| epoch | step | loss | held-out loss |") == 1
