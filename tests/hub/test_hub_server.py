"""The Hub of these tests behaves like the real one towards `huggingface_hub`."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import pytest
from conftest import contents
from hub_server import LFS_FROM, MAIN, OWN_SETTINGS, HubServer
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    close_session,
    constants,
    get_session,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


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
def api_of(hub, tmp_path, monkeypatch):
    """`api_of(token)`: the client of somebody with this token, with an empty cache."""
    for name in [name for name in os.environ if OWN_SETTINGS.match(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):  # as in hub_server.py
        monkeypatch.setattr(constants, name, True)
    close_session()  # its proxies are those of the environment in which it was opened
    count = 0

    def api_of(token: str | None) -> HfApi:
        nonlocal count
        count += 1
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{count}"))
        return HfApi(endpoint=hub.url, token=token or False)

    yield api_of
    close_session()


@pytest.fixture
def api(api_of) -> HfApi:
    return api_of("token")


def upload(api: HfApi, folder: Path, **arguments) -> CommitInfo:
    api.create_repo(REPO, exist_ok=True)
    return api.upload_folder(repo_id=REPO, folder_path=folder, **arguments)


@contextlib.contextmanager
def refused(error: type[HfHubHTTPError], status: int):
    with pytest.raises(error) as raised:
        yield
    assert (raised.type, raised.value.response.status_code) == (error, status)


# ---- Up and down --------------------------------------------------------------------------------------------------------


def test_an_uploaded_folder_comes_back_as_it_was(hub, api, folder):
    oid = upload(api, folder).oid
    assert {path: hub.files(REPO)[path] for path in FILES} == FILES
    found = Path(api.snapshot_download(REPO))
    assert found.name == oid
    assert {path: digest for path, digest in contents(found).items() if path in FILES} == contents(folder)


def test_files_above_the_limit_and_safetensors_are_lfs_objects(hub, api, folder):
    (folder / "large.json").write_bytes(b"x" * (LFS_FROM + 1))
    upload(api, folder)
    lfs = {
        path
        for path, file in hub.repositories[REPO].commits[hub.repositories[REPO].refs[MAIN]].files.items()
        if file.lfs
    }
    assert lfs == {"adapters/factual.safetensors", "adapters/größe.safetensors", "large.json"}
    assert sorted(size for _, size in hub.uploaded) == [3000, 25600, LFS_FROM + 1]
    assert contents(api.snapshot_download(REPO))["large.json"] == contents(folder)["large.json"]


def test_what_is_there_already_is_not_sent_again(hub, api, folder):
    oid = upload(api, folder).oid
    assert len(hub.uploaded) == 2
    assert upload(api, folder).oid == oid
    (folder / "README.md").write_text("new")
    assert upload(api, folder).oid != oid
    assert len(hub.uploaded) == 2
    last = [json.loads(line) for line in hub.logged("POST", "/commit/")[-1].body.splitlines()]
    assert [line["value"].get("path") for line in last] == [None, "README.md"]


def test_an_ignored_file_is_not_taken(hub, api, folder):
    (folder / ".gitignore").write_text("*.txt\n")
    upload(api, folder)
    assert hub.files(REPO).keys() == {".gitattributes", ".gitignore", *FILES} - {"empty.txt"}


def test_files_and_folders_are_deleted(hub, api):
    hub.put(REPO, FILES)
    api.create_commit(REPO, [CommitOperationDelete("a/"), CommitOperationDelete("README.md")], commit_message="less")
    assert hub.files(REPO).keys() == {".gitattributes", *FILES} - {"a/b c/d%20e/ü#1?.json", "README.md"}


def test_a_part_of_a_file_is_served(hub, api):
    hub.put(REPO, FILES)
    for path in ("adapters/factual.safetensors", "README.md"):
        found = get_session().get(
            f"{hub.url}/{REPO}/resolve/main/{path}", headers={"Range": "bytes=3-9"}, follow_redirects=True
        )
        assert (found.status_code, found.headers["Content-Range"]) == (206, f"bytes 3-9/{len(FILES[path])}")
        assert found.content == FILES[path][3:10]


def test_the_token_is_not_sent_to_where_the_objects_are(hub, api):
    hub.put(REPO, FILES)
    api.snapshot_download(REPO)
    assert all(request.user == "user" for request in hub.logged("GET", "^/api/"))
    objects = hub.logged("GET", "^/cdn/")
    assert len(objects) == 2 and not any("authorization" in request.headers for request in objects)


# ---- What is in a repository --------------------------------------------------------------------------------------------


def test_files_are_listed_with_their_sizes_and_ids(hub, api):
    hub.put(REPO, FILES)
    listed = {file.path: file for file in api.list_repo_tree(REPO, recursive=True)}
    assert list(listed) == sorted([".gitattributes", *FILES, "a", "a/b c", "a/b c/d%20e", "adapters"])
    assert api.get_paths_info(REPO, list(listed)) == list(listed.values())
    assert [file.path for file in api.list_repo_tree(REPO, "a")] == ["a/b c"]
    small, large = listed["README.md"], listed["adapters/factual.safetensors"]
    assert small.blob_id == "b8938636de91799d33e60efa24df39f6eeb5cf3b"  # by git hash-object
    assert large.lfs.sha256 == hashlib.sha256(FILES["adapters/factual.safetensors"]).hexdigest()
    siblings = {file.rfilename: file for file in api.model_info(REPO, files_metadata=True).siblings}
    assert (siblings["README.md"].blob_id, siblings["README.md"].size) == (small.blob_id, small.size)


def test_a_branch_is_made_written_to_and_read(hub, api, folder):
    hub.put(REPO, {"first": b"1"})
    for _ in range(2):
        api.create_branch(REPO, branch="a/branch", exist_ok=True)
    oid = upload(api, folder, revision="a/branch").oid
    assert hub.repositories[REPO].refs["refs/heads/a/branch"] == oid
    assert hub.files(REPO).keys() == {".gitattributes", "first"}
    assert Path(api.snapshot_download(REPO, revision="a/branch")).name == oid
    refs = [(ref.name, ref.target_commit) for ref in api.list_repo_refs(REPO).branches]
    assert ("a/branch", oid) in refs and len(refs) == 2


def test_a_pull_request_leaves_the_branch_alone(hub, api, folder):
    hub.put(REPO, {"first": b"1"})
    made = upload(api, folder, create_pr=True)
    assert (made.pr_revision, made.pr_num) == ("refs/pr/1", 1)
    assert hub.files(REPO).keys() == {".gitattributes", "first"}
    assert hub.files(REPO, "refs/pr/1").keys() == {".gitattributes", "first", *FILES}
    assert Path(api.snapshot_download(REPO, revision="refs/pr/1")).name == made.oid
    again = api.upload_file(repo_id=REPO, path_in_repo="x", path_or_fileobj=b"x", revision="refs/pr/1")
    assert again.oid == hub.repositories[REPO].refs["refs/pr/1"] != made.oid


# ---- Refusals -----------------------------------------------------------------------------------------------------------


def test_a_private_repository_is_hidden_from_strangers(hub, api, api_of):
    hub.tokens["other"] = "somebody"
    api.create_repo(REPO, private=True)
    assert Path(api.snapshot_download(REPO)).name == hub.repositories[REPO].refs[MAIN]
    with refused(RepositoryNotFoundError, 401):
        api_of(None).snapshot_download(REPO)
    with refused(RepositoryNotFoundError, 404):
        api_of("other").snapshot_download(REPO)


def test_a_missing_repository_is_reported_like_a_private_one(api, api_of):
    with refused(RepositoryNotFoundError, 404):
        api.snapshot_download(REPO)
    with refused(RepositoryNotFoundError, 404):
        api.model_info("no-owner")
    with refused(RepositoryNotFoundError, 401):
        api_of(None).snapshot_download(REPO)


def test_a_gated_repository_needs_permission(hub, api, api_of):
    hub.put(REPO, FILES)
    hub.repositories[REPO].readers = set()
    with refused(GatedRepoError, 401):
        api_of(None).hf_hub_download(REPO, "README.md")
    with refused(GatedRepoError, 403):
        api.hf_hub_download(REPO, "README.md")
    hub.repositories[REPO].readers.add("user")
    assert api.hf_hub_download(REPO, "README.md").endswith("README.md")


def test_a_wrong_token_is_refused(hub, api, api_of):
    hub.put(REPO, FILES)
    assert api.whoami()["name"] == "user"
    with refused(HfHubHTTPError, 401):
        api_of("wrong").snapshot_download(REPO)


def test_others_repositories_are_not_written_to(hub, api, api_of):
    hub.put("somebody/model", FILES)
    file = {"repo_id": "somebody/model", "path_in_repo": "x", "path_or_fileobj": b"x"}
    with refused(HfHubHTTPError, 403):
        api.upload_file(**file)
    with refused(HfHubHTTPError, 403):
        api.create_repo("somebody/other")
    with refused(HfHubHTTPError, 401):
        api_of(None).upload_file(**file)


def test_a_missing_revision_is_reported(hub, api):
    hub.put(REPO, FILES)
    with refused(RevisionNotFoundError, 404):
        api.snapshot_download(REPO, revision="nowhere")
    with refused(RevisionNotFoundError, 404):
        api.hf_hub_download(REPO, "README.md", revision="nowhere")


def test_a_missing_file_is_reported(hub, api):
    hub.put(REPO, FILES)
    with refused(RemoteEntryNotFoundError, 404):
        api.hf_hub_download(REPO, "nothing")
    assert [request.path for request in hub.logged("HEAD", "")] == [f"/{REPO}/resolve/main/nothing"]


def test_a_commit_on_an_outdated_parent_is_refused(hub, api):
    parent = hub.put(REPO, {"first": b"1"})
    newest = hub.put(REPO, {"second": b"2"})
    commit = {"operations": [CommitOperationAdd("x", b"x")], "commit_message": "x"}
    with refused(HfHubHTTPError, 412):
        api.create_commit(REPO, **commit, parent_commit=parent)
    made = api.create_commit(REPO, **commit, parent_commit=newest)
    assert made.oid == hub.repositories[REPO].refs[MAIN] != newest


def test_another_commit_can_come_first(hub, api):
    parent = hub.put(REPO, {"first": b"1"})
    hub.before_commit = lambda repo: hub.put(repo, {"second": b"2"})
    with refused(HfHubHTTPError, 412):
        api.create_commit(REPO, [CommitOperationAdd("x", b"x")], commit_message="x", parent_commit=parent)
    assert hub.files(REPO).keys() == {".gitattributes", "first", "second"}


# ---- Faults -------------------------------------------------------------------------------------------------------------


def test_a_failure_lasts_as_many_requests_as_was_said(hub, api):
    hub.put(REPO, FILES)
    hub.fail("GET", f"/api/models/{REPO}$", 404, times=2, headers={"X-Error-Code": "RevisionNotFound"})
    for _ in range(2):
        with refused(RevisionNotFoundError, 404):
            api.model_info(REPO)
    assert api.model_info(REPO).sha == hub.repositories[REPO].refs[MAIN]
    assert [request.status for request in hub.logged("GET", "/api/models/")] == [404, 404, 200]


def test_a_broken_download_is_made_whole(hub, api):
    hub.put(REPO, FILES)
    hub.break_download("factual", after=1000)
    found = Path(api.snapshot_download(REPO))
    assert (found / "adapters/factual.safetensors").read_bytes() == FILES["adapters/factual.safetensors"]
    assert len(hub.logged("GET", "^/cdn/.*factual")) == 2


def test_corrupt_files_have_the_right_size(hub, api):
    hub.put(REPO, FILES)
    hub.corrupt("README")
    hub.corrupt("factual", at=-1)
    found = Path(api.snapshot_download(REPO))
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
