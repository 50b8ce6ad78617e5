"""The Hub of these tests behaves like the real one towards `huggingface_hub`."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from conftest import contents
from hub_server import LFS_FROM, MAIN, HubServer


REPO = "user/model"
FILES = {
    "README.md": "# Ein Modell für ☃".encode(),
    "empty.txt": b"",
    "adapters/factual.safetensors": bytes(range(256)) * 100,
    "adapters/größe.safetensors": b"ab\0" * 1000,
    "a/b c/d%20e/ü#1?.json": b'{"key": "value"}',
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


@pytest.fixture
def ask(hub, tmp_path):
    """
    `ask("…")`: runs code that has `api` and sets `answer`, in a process of its own with an empty cache, and gives that.

    An error of the Hub's is given as its class, status and message.
    """
    count = 0

    def ask(code: str, token: str | None = "token"):
        nonlocal count
        count += 1
        lines = "\n    ".join(code.strip().splitlines())
        program = f"""
import json
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
api = HfApi()
try:
    {lines}
except HfHubHTTPError as error:
    answer = [type(error).__name__, error.response.status_code, str(error)]
print(json.dumps(answer))
"""
        done = hub.run(program, tmp_path / f"home-{count}", token)
        return json.loads(done.stdout.splitlines()[-1])

    return ask


def upload(folder: Path) -> str:
    return f"""
api.create_repo("{REPO}", exist_ok=True)
answer = api.upload_folder(repo_id="{REPO}", folder_path={str(folder)!r}).oid
"""


def pull(**arguments) -> str:
    return f"answer = snapshot_download('{REPO}', **{arguments!r})"


# ---- Up and down --------------------------------------------------------------------------------------------------------


def test_an_uploaded_folder_comes_back_as_it_was(hub, ask, folder):
    oid = ask(upload(folder))
    assert {path: hub.files(REPO)[path] for path in FILES} == FILES
    found = Path(ask(pull()))
    assert found.name == oid
    assert {path: digest for path, digest in contents(found).items() if path in FILES} == contents(folder)


def test_files_above_the_limit_and_safetensors_are_lfs_objects(hub, ask, folder):
    (folder / "large.json").write_bytes(b"x" * (LFS_FROM + 1))
    ask(upload(folder))
    lfs = {
        path
        for path, file in hub.repositories[REPO].commits[hub.repositories[REPO].refs[MAIN]].files.items()
        if file.lfs
    }
    assert lfs == {"adapters/factual.safetensors", "adapters/größe.safetensors", "large.json"}
    assert sorted(size for _, size in hub.uploaded) == [3000, 25600, LFS_FROM + 1]
    assert contents(Path(ask(pull())))["large.json"] == contents(folder)["large.json"]


def test_what_is_there_already_is_not_sent_again(hub, ask, folder):
    oid = ask(upload(folder))
    assert len(hub.uploaded) == 2
    assert ask(upload(folder)) == oid
    (folder / "README.md").write_text("new")
    assert ask(upload(folder)) != oid
    assert len(hub.uploaded) == 2
    last = [json.loads(line) for line in hub.logged("POST", "/commit/")[-1].body.splitlines()]
    assert [line["value"].get("path") for line in last] == [None, "README.md"]


def test_an_ignored_file_is_not_taken(hub, ask, folder):
    (folder / ".gitignore").write_text("*.txt\n")
    ask(upload(folder))
    assert hub.files(REPO).keys() == {".gitattributes", ".gitignore", *FILES} - {"empty.txt"}


def test_files_and_folders_are_deleted(hub, ask):
    hub.put(REPO, FILES)
    operations = "[CommitOperationDelete('a/'), CommitOperationDelete('README.md')]"
    ask(f"answer = api.create_commit('{REPO}', {operations}, commit_message='less').oid")
    assert hub.files(REPO).keys() == {".gitattributes", *FILES} - {"a/b c/d%20e/ü#1?.json", "README.md"}


def test_a_part_of_a_file_is_served(hub, ask):
    hub.put(REPO, FILES)
    for path in ("adapters/factual.safetensors", "README.md"):
        answer = ask(
            f"reply = get_session().get('{hub.url}/{REPO}/resolve/main/{path}', headers={{'Range': 'bytes=3-9'}})\n"
            "answer = [reply.status_code, reply.headers['Content-Range'], list(reply.content)]"
        )
        assert answer == [206, f"bytes 3-9/{len(FILES[path])}", list(FILES[path][3:10])]


def test_the_token_is_not_sent_to_where_the_objects_are(hub, ask):
    hub.put(REPO, FILES)
    ask(pull())
    assert all(request.user == "user" for request in hub.logged("GET", "^/api/"))
    objects = hub.logged("GET", "^/cdn/")
    assert len(objects) == 2 and not any("authorization" in request.headers for request in objects)


# ---- What is in a repository --------------------------------------------------------------------------------------------


def test_files_are_listed_with_their_sizes_and_ids(hub, ask):
    hub.put(REPO, FILES)
    answer = ask(
        f"""
listed = {{f.path: f for f in api.list_repo_tree('{REPO}', recursive=True)}}
paths = list(listed)
same = api.get_paths_info('{REPO}', paths) == list(listed.values())
folder = [f.path for f in api.list_repo_tree('{REPO}', 'a')]
siblings = {{f.rfilename: (f.blob_id, f.size) for f in api.model_info('{REPO}', files_metadata=True).siblings}}
small, large = listed['README.md'], listed['adapters/factual.safetensors']
answer = [paths, same, folder, small.blob_id, large.lfs.sha256, siblings['README.md'] == (small.blob_id, small.size)]
"""
    )
    assert answer[0] == sorted([".gitattributes", *FILES, "a", "a/b c", "a/b c/d%20e", "adapters"])
    git_hash_object = "b8938636de91799d33e60efa24df39f6eeb5cf3b"
    sha256 = hashlib.sha256(FILES["adapters/factual.safetensors"]).hexdigest()
    assert answer[1:] == [True, ["a/b c"], git_hash_object, sha256, True]


def test_a_branch_is_made_written_to_and_read(hub, ask, folder):
    hub.put(REPO, {"first": b"1"})
    oid = ask(
        f"api.create_branch('{REPO}', branch='a/branch')\n"
        f"api.create_branch('{REPO}', branch='a/branch', exist_ok=True)\n"
        f"answer = api.upload_folder(repo_id='{REPO}', folder_path={str(folder)!r}, revision='a/branch').oid"
    )
    assert hub.repositories[REPO].refs["refs/heads/a/branch"] == oid
    assert hub.files(REPO).keys() == {".gitattributes", "first"}
    assert Path(ask(pull(revision="a/branch"))).name == oid
    refs = ask(f"answer = [(ref.name, ref.target_commit) for ref in api.list_repo_refs('{REPO}').branches]")
    assert ["a/branch", oid] in refs and len(refs) == 2


def test_a_pull_request_leaves_the_branch_alone(hub, ask, folder):
    hub.put(REPO, {"first": b"1"})
    answer = ask(
        f"info = api.upload_folder(repo_id='{REPO}', folder_path={str(folder)!r}, create_pr=True)\n"
        "answer = [info.pr_revision, info.pr_num, info.oid]"
    )
    assert answer[:2] == ["refs/pr/1", 1]
    assert hub.files(REPO).keys() == {".gitattributes", "first"}
    assert hub.files(REPO, "refs/pr/1").keys() == {".gitattributes", "first", *FILES}
    assert Path(ask(pull(revision="refs/pr/1"))).name == answer[2]
    again = (
        f"answer = api.upload_file(repo_id='{REPO}', path_in_repo='x', path_or_fileobj=b'x', revision='refs/pr/1').oid"
    )
    assert ask(again) == hub.repositories[REPO].refs["refs/pr/1"]


# ---- Refusals -----------------------------------------------------------------------------------------------------------


def test_a_private_repository_is_hidden_from_strangers(hub, ask):
    hub.tokens["other"] = "somebody"
    ask(f"answer = api.create_repo('{REPO}', private=True)")
    assert ask(pull(), token=None)[:2] == ["RepositoryNotFoundError", 401]
    assert ask(pull(), token="other")[:2] == ["RepositoryNotFoundError", 404]
    assert Path(ask(pull())).name == hub.repositories[REPO].refs[MAIN]


def test_a_missing_repository_is_reported_like_a_private_one(ask):
    assert ask(pull(), token=None)[:2] == ["RepositoryNotFoundError", 401]
    assert ask(pull())[:2] == ["RepositoryNotFoundError", 404]
    assert ask("answer = api.model_info('no-owner')")[:2] == ["RepositoryNotFoundError", 404]


def test_a_gated_repository_needs_permission(hub, ask):
    hub.put(REPO, FILES)
    hub.repositories[REPO].readers = set()
    assert ask(f"answer = api.hf_hub_download('{REPO}', 'README.md')", token=None)[:2] == ["GatedRepoError", 401]
    assert ask(f"answer = api.hf_hub_download('{REPO}', 'README.md')")[:2] == ["GatedRepoError", 403]
    hub.repositories[REPO].readers.add("user")
    assert ask(f"answer = api.hf_hub_download('{REPO}', 'README.md')").endswith("README.md")


def test_a_wrong_token_is_refused(hub, ask):
    hub.put(REPO, FILES)
    assert ask(pull(), token="wrong")[:2] == ["HfHubHTTPError", 401]
    assert ask("answer = api.whoami()['name']") == "user"


def test_others_repositories_are_not_written_to(hub, ask):
    hub.put("somebody/model", FILES)
    upload = "answer = api.upload_file(repo_id='somebody/{}', path_in_repo='x', path_or_fileobj=b'x')"
    assert ask(upload.format("model"))[:2] == ["HfHubHTTPError", 403]
    assert ask(upload.format("model"), token=None)[:2] == ["HfHubHTTPError", 401]
    assert ask("answer = api.create_repo('somebody/other')")[:2] == ["HfHubHTTPError", 403]


def test_a_missing_revision_is_reported(hub, ask):
    hub.put(REPO, FILES)
    assert ask(pull(revision="nowhere"))[:2] == ["RevisionNotFoundError", 404]
    assert ask(f"answer = api.hf_hub_download('{REPO}', 'README.md', revision='nowhere')")[:2] == [
        "RevisionNotFoundError",
        404,
    ]


def test_a_missing_file_is_reported(hub, ask):
    hub.put(REPO, FILES)
    assert ask(f"answer = api.hf_hub_download('{REPO}', 'nothing')")[:2] == ["RemoteEntryNotFoundError", 404]
    assert [request.path for request in hub.logged("HEAD", "")] == [f"/{REPO}/resolve/main/nothing"]


def test_a_commit_on_an_outdated_parent_is_refused(hub, ask):
    parent = hub.put(REPO, {"first": b"1"})
    hub.put(REPO, {"second": b"2"})
    commit = (
        "answer = api.create_commit('{}', [CommitOperationAdd('x', b'x')], commit_message='x', parent_commit='{}').oid"
    )
    assert ask(commit.format(REPO, parent))[:2] == ["HfHubHTTPError", 412]
    newest = hub.repositories[REPO].refs[MAIN]
    assert ask(commit.format(REPO, newest)) == hub.repositories[REPO].refs[MAIN] != newest


def test_another_commit_can_come_first(hub, ask):
    parent = hub.put(REPO, {"first": b"1"})
    hub.before_commit = lambda repo: hub.put(repo, {"second": b"2"})
    commit = f"[CommitOperationAdd('x', b'x')], commit_message='x', parent_commit='{parent}'"
    assert ask(f"answer = api.create_commit('{REPO}', {commit}).oid")[:2] == ["HfHubHTTPError", 412]
    assert hub.files(REPO).keys() == {".gitattributes", "first", "second"}


# ---- Faults -------------------------------------------------------------------------------------------------------------


def test_a_failure_lasts_as_many_requests_as_was_said(hub, ask):
    hub.put(REPO, FILES)
    hub.fail("GET", f"/api/models/{REPO}$", 404, times=2, headers={"X-Error-Code": "RevisionNotFound"})
    info = f"answer = api.model_info('{REPO}').sha"
    assert [ask(info)[0], ask(info)[0]] == ["RevisionNotFoundError"] * 2
    assert ask(info) == hub.repositories[REPO].refs[MAIN]
    assert [request.status for request in hub.logged("GET", "/api/models/")] == [404, 404, 200]


def test_a_broken_download_is_made_whole(hub, ask):
    hub.put(REPO, FILES)
    hub.break_download("factual", after=1000)
    found = Path(ask(pull()))
    assert (found / "adapters/factual.safetensors").read_bytes() == FILES["adapters/factual.safetensors"]
    assert len(hub.logged("GET", "^/cdn/.*factual")) == 2


def test_corrupt_files_have_the_right_size(hub, ask):
    hub.put(REPO, FILES)
    hub.corrupt("README")
    hub.corrupt("factual", at=-1)
    found = Path(ask(pull()))
    readme, factual = ((found / name).read_bytes() for name in ("README.md", "adapters/factual.safetensors"))
    assert len(readme) == len(FILES["README.md"]) and not any(map(int.__eq__, readme, FILES["README.md"]))
    assert factual[:-1] == FILES["adapters/factual.safetensors"][:-1] and factual[-1] == 0


def test_nothing_of_the_own_environment_is_used(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("https_proxy", "http://proxy")
    environment = hub.environment(tmp_path)
    assert environment["HF_ENDPOINT"] == hub.url and environment["HF_HUB_OFFLINE"] == "0"
    assert not environment.keys() & {"HF_TOKEN", "https_proxy"} and environment["PATH"] == os.environ["PATH"]


def test_a_stopped_server_can_not_be_reached(tmp_path):
    with HubServer() as hub:
        hub.stop()
    done = hub.run("import huggingface_hub; huggingface_hub.model_info('user/model')", tmp_path, check=False)
    assert done.returncode == 1 and "ConnectError" in done.stderr
