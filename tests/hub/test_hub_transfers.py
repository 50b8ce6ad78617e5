"""Uploads to and downloads from a Hub, in fresh processes, with empty caches, and with failures."""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_ADAPTER
from hub_server import MAIN, HubServer, Repository
from huggingface_hub import constants

from kadapter_hf import KAdapterModel


BACKBONE, MODEL, PRIVATE, WIDE = "user/tiny-backbone", "user/model", "user/private-model", "user/wide-model"
FACTUAL = "adapters/factual.safetensors"
INDEX = "model.safetensors.index.json"
CHUNK = 10 * 2**20  # the client keeps what it has received in steps of this size
BROKEN_AFTER = CHUNK + 2**20
WIDE_ADAPTER = SMALL_ADAPTER | {"hidden_size": 320, "intermediate_size": 1280}  # its file is larger than that
AGAIN = {"Retry-After": "0"}
SECONDS = 3  # that the Hub's other header asks to wait
RATE_LIMIT = {"RateLimit": f'"api";r=0;t={SECONDS}'}

WITHOUT = {"adapter": FACTUAL, "head": "head.safetensors", "index": INDEX, "config": "config.json"}
# By repository: the file that is served with wrong bytes, and the single byte that is changed, if not all are.
DAMAGES = {
    "config": ("config.json", None),
    "index": (INDEX, None),
    "adapter": (FACTUAL, None),
    "adapter-header": (FACTUAL, 100),
    "adapter-byte": (FACTUAL, -1),
    "unsampled-byte": (FACTUAL, 8 * 2**20),
    "head-byte": ("head.safetensors", -1),
    "backbone-weights": ("model.safetensors", -1),
    "backbone-unsampled": ("model.safetensors", 4000),  # in the tensor of its word embeddings
    "backbone-config": ("config.json", None),
    "card": ("README.md", None),
}
# Where the Hub asks to wait, by name of the repository: method and path of the request.
BUSY_DOWNLOADS = {
    "revision": ("GET", "/api/models/{}/revision/"),
    "tree": ("GET", "/api/models/{}/tree/"),
    "metadata": ("HEAD", "/{}/resolve/[0-9a-f]*/config.json"),
    "file": ("GET", "/{}/resolve/[0-9a-f]*/config.json"),
    "object": ("GET", "/cdn/{}/.*factual"),
}
BUSY_UPLOADS = {
    "create": ("POST", "/api/repos/create"),
    "info": ("GET", "/api/models/{}$"),
    "preupload": ("POST", "/api/models/{}/preupload/"),
    "batch": ("POST", "/{}.git/info/lfs/objects/batch"),
    "put": ("PUT", "/upload/{}/"),
    "verify": ("POST", "/{}.git/info/lfs/objects/verify"),
    "commit": ("POST", "/api/models/{}/commit/"),
}

# Every program starts with this and sets `answer`.
BEGIN = """
import json, os, sys, time
import torch

def output(model):
    with torch.no_grad():
        return model.eval()(torch.arange(5, 17).view(2, 6)).last_hidden_state.flatten().tolist()

def attempt(function, *arguments, **kwargs):
    # What it returns, or the class and the text of its error.
    try:
        return function(*arguments, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]
"""

PUSH = """
from kadapter_hf import KAdapterModel, KnowledgeAdapterConfig
from transformers import AutoModelForMaskedLM, AutoTokenizer

torch.manual_seed(0)
folder, backbone, small, wide = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
for auto_class in (AutoModelForMaskedLM, AutoTokenizer):
    auto_class.from_pretrained(folder).push_to_hub(backbone)

def build(names, fields):
    model = KAdapterModel.from_backbone(backbone, {name: KnowledgeAdapterConfig(**fields) for name in names})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    return model

model = build(["factual", "linguistic"], small)
first = {"output": output(model), "oid": model.push_to_hub("user/model").oid}
for parameter in model.adapters["factual"].parameters():
    parameter.data.normal_(std=0.1)
second = {"output": output(model), "oid": model.push_to_hub("user/model").oid}
model.push_to_hub("user/private-model", private=True)
large = build(["factual"], wide)
large.push_to_hub("user/wide-model")
answer = [first, second, output(large)]
"""

PULL = """
from kadapter_hf import KAdapterModel

backbone, first = sys.argv[1:]
model = KAdapterModel.from_pretrained("user/model")
answer = {"model": output(model), "backbone": [model.config.backbone_name_or_path, model.config.backbone_revision]}
answer["first"] = output(KAdapterModel.from_pretrained("user/model", revision=first))
other = KAdapterModel.from_backbone(backbone)
other.load_knowledge_adapter("user/model", "factual")
same = [torch.equal(*pair) for pair in zip(other.adapters.factual.parameters(), model.adapters.factual.parameters())]
answer["adapter"] = len(same) > 10 and all(same)
"""

# Makes requests that are refused, then one that succeeds; then, as `user`, requests that are cut off, delayed or damaged.
TROUBLES = """
from kadapter_hf import KAdapterModel

def load(*arguments, **kwargs):
    return output(KAdapterModel.from_pretrained(*arguments, **kwargs))

wide, without, downloads, uploads, damages = map(str.split, sys.argv[1:])
model = KAdapterModel.from_backbone("user/tiny-backbone")
refusals = {
    "private": attempt(load, "user/private-model"),
    "private, stranger": attempt(load, "user/private-model", token="other"),
    "private, wrong token": attempt(load, "user/private-model", token="wrong"),
    "private adapter": attempt(model.load_knowledge_adapter, "user/private-model", "factual"),
    "unknown": attempt(load, "user/unknown"),
    "unknown, token": attempt(load, "user/unknown", token="token"),
    "unknown adapter": attempt(model.load_knowledge_adapter, "user/unknown", "factual"),
    "unknown backbone": attempt(KAdapterModel.from_backbone, "user/unknown"),
    "unknown revision": attempt(load, "user/model", revision="nowhere"),
    "gated": attempt(load, "user/gated"),
    "orphan": attempt(load, "user/orphan"),
}
for name in without:
    refusals[f"without {name}"] = attempt(load, f"user/without-{name}")
refusals["private, token"] = attempt(load, "user/private-model", token="token")
answer = {"refusals": refusals, "broken": attempt(load, *wide)}

os.environ["HF_TOKEN"] = "token"
busy = answer["busy"] = {place: attempt(load, f"user/busy-{place}") for place in downloads}
model = KAdapterModel.from_pretrained("user/private-model")
for place in uploads:
    with torch.no_grad():
        next(model.adapters.factual.parameters()).add_(1)  # else the Hub would have it already
    busy[place] = attempt(lambda: model.push_to_hub(f"user/busy-{place}").oid)

damaged = answer["damaged"] = {"once": [], "twice": []}
for name in damages:
    if name.startswith("backbone"):
        damaged[name] = attempt(load, "user/model", backbone=f"user/{name}")
    else:
        damaged[name] = attempt(load, f"user/{name}")
model = KAdapterModel.from_pretrained("user/model")
answer["pushed"] = attempt(lambda: model.push_to_hub("user/card", tags=["new"]).oid)
for number in range(3):
    if number:
        time.sleep(2)  # as a user needs to read the message
    for name in ("once", "twice"):
        damaged[name].append(attempt(load, f"user/{name}"))
"""


def ask(hub: HubServer, code: str, home: Path, *arguments: str, token: str | None = None, **environment: str) -> Any:
    """What a new process with this Hub sets `answer` to."""
    done = hub.run(["-c", f"{BEGIN}{code}\nprint(json.dumps(answer))", *arguments], home, token, **environment)
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Pushed:
    repositories: dict[str, Repository]
    first: dict[str, Any]
    second: dict[str, Any]
    wide: list[float]


@pytest.fixture(scope="module")
def pushed(backbone, tmp_path_factory) -> Pushed:
    """What a user has on the Hub after pushing the backbone, a model twice and once privately, and a wide one."""
    with HubServer() as hub:
        home = tmp_path_factory.mktemp("pushing")
        fields = [json.dumps(SMALL_ADAPTER), json.dumps(WIDE_ADAPTER)]
        answer = ask(hub, PUSH, home, backbone, BACKBONE, *fields, token="token")
        assert not hub.errors
        return Pushed(hub.repositories, *answer)


@pytest.fixture
def filled(hub, pushed) -> HubServer:
    """A Hub with that on it."""
    hub.repositories = copy.deepcopy(pushed.repositories)
    return hub


@pytest.fixture(scope="module")
def pulled(pushed, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """What a process with an empty cache found in the models, and its cache; the backbone has changed since they were saved."""
    home = tmp_path_factory.mktemp("pulling")
    with HubServer() as hub:
        hub.repositories = copy.deepcopy(pushed.repositories)
        hub.put(BACKBONE, {"config.json": b"{}"})
        backbone = pushed.repositories[BACKBONE].refs[MAIN]
        code = PULL.replace("from_backbone(backbone)", f"from_backbone(backbone, revision='{backbone}')")
        answer = ask(hub, code, home, BACKBONE, pushed.first["oid"])
        assert not hub.errors
    return answer, home


@dataclass
class Troubled:
    """A Hub, and what a process found on it."""

    hub: HubServer
    found: dict[str, Any]


def place_of(tensor: str, content: bytes) -> int:
    """The offset of a tensor in a safetensors file."""
    header = int.from_bytes(content[:8], "little")
    return 8 + header + json.loads(content[8 : 8 + header])[tensor]["data_offsets"][0]


@pytest.fixture(scope="module")
def troubled(pushed, tmp_path_factory) -> Troubled:
    """A Hub with repositories that are missing, hidden, cut off, delayed or damaged, and the results of `TROUBLES` on it."""
    with HubServer() as hub:
        hub.tokens["other"] = "somebody"
        hub.repositories = copy.deepcopy(pushed.repositories)

        def copy_of(repo: str, name: str) -> Repository:
            hub.repositories[f"user/{name}"] = copy.deepcopy(pushed.repositories[repo])
            return hub.repositories[f"user/{name}"]

        for name, missing in WITHOUT.items():
            repository = copy_of(MODEL, f"without-{name}")
            files = repository.commits[repository.refs[MAIN]].files
            repository.commit(MAIN, {path: file for path, file in files.items() if path != missing}, "less", None)
        copy_of(MODEL, "gated").readers = set()
        config = json.loads(hub.files(MODEL)["config.json"]) | {"backbone_name_or_path": "user/gone"}
        hub.put("user/orphan", hub.files(MODEL) | {"config.json": json.dumps(config).encode()})

        hub.break_download(f"{WIDE}/.*{FACTUAL}", after=BROKEN_AFTER)
        for places in (BUSY_DOWNLOADS, BUSY_UPLOADS):
            for place, (method, path) in places.items():
                if places is BUSY_DOWNLOADS:
                    copy_of(PRIVATE, f"busy-{place}")
                hub.fail(
                    method, path.format(f"user/busy-{place}"), 429, headers=RATE_LIMIT if place == "info" else AGAIN
                )

        for name, (file, at) in DAMAGES.items():
            source = BACKBONE if name.startswith("backbone") else WIDE if name == "unsampled-byte" else MODEL
            if name == "backbone-unsampled":
                at = place_of("roberta.embeddings.word_embeddings.weight", hub.files(BACKBONE)[file]) + at
            copy_of(source, name)
            hub.corrupt(f"/user/{name}/.*{re.escape(file)}$", at)
        for name, damaged in {"once": [FACTUAL], "twice": [FACTUAL, "head.safetensors"]}.items():
            copy_of(MODEL, name)
            for file in damaged:
                hub.corrupt(f"/user/{name}/.*{file}$", -1, times=1)

        names = map(" ".join, ([WIDE], WITHOUT, BUSY_DOWNLOADS, BUSY_UPLOADS, DAMAGES))
        found = ask(hub, TROUBLES, tmp_path_factory.mktemp("troubles"), *names)
        assert not hub.errors
        yield Troubled(hub, found)


# ---- What was pushed comes back -----------------------------------------------------------------------------------------


def test_a_pushed_model_comes_back_in_a_process_with_an_empty_cache(pushed, pulled):
    assert pulled[0]["model"] == pushed.second["output"]


def test_the_backbone_comes_from_the_commit_that_the_model_was_made_with(pushed, pulled):
    assert pulled[0]["backbone"] == [BACKBONE, pushed.repositories[BACKBONE].refs[MAIN]]


def test_a_revision_chooses_an_earlier_push(pushed, pulled):
    assert pushed.first["output"] != pushed.second["output"]
    assert pulled[0]["first"] == pushed.first["output"]


def test_an_adapter_is_loaded_into_another_model(pulled):
    assert pulled[0]["adapter"]


def test_a_pushed_model_comes_back_and_is_pushed_again_where_the_package_is_not_installed(filled, pushed, tmp_path):
    """With transformers' own `push_to_hub`, which keeps the model card that is on the Hub."""
    code = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kadapter_hf":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Blocked())
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("user/model", trust_remote_code=True)
answer = [output(model), type(model).__module__.split(".")[0]]
for parameter in model.adapters["factual"].parameters():
    parameter.data.add_(0.1)
model.push_to_hub("user/model")
model.push_to_hub("user/new")
again = [AutoModel.from_pretrained(name, trust_remote_code=True) for name in ("user/model", "user/new")]
answer += [output(model), *map(output, again), "kadapter_hf" in sys.modules]
"""
    card = filled.files("user/model")["README.md"]
    first, module, changed, again, new, imported = ask(filled, code, tmp_path, token="token")
    assert (first, module, imported) == (pushed.second["output"], "transformers_modules", False)
    assert changed != first and again == new == changed
    assert filled.files("user/model")["README.md"] == card
    assert not any("backbone.safetensors" in filled.files(name) for name in ("user/model", "user/new"))


def test_a_pulled_model_is_loaded_from_the_cache_without_a_connection(pushed, pulled):
    with HubServer() as hub:
        hub.stop()
    code = """
from kadapter_hf import KAdapterModel
answer = output(KAdapterModel.from_pretrained("user/model"))
"""
    assert ask(hub, code, pulled[1]) == pushed.second["output"]


def test_a_pulled_model_is_loaded_from_the_cache_offline(pushed, pulled, monkeypatch):
    """In this process, which is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(pulled[1] / "hub"))
    model = KAdapterModel.from_pretrained("user/model")
    with torch.no_grad():
        found = model(torch.arange(5, 17).view(2, 6)).last_hidden_state
    assert found.flatten().tolist() == pushed.second["output"]


# ---- What breaks off is taken up again ----------------------------------------------------------------------------------


def test_a_broken_download_goes_on_where_it_stopped(troubled, pushed):
    assert troubled.found["broken"] == pushed.wide
    requests = troubled.hub.logged("GET", f"^/cdn/{WIDE}/.*{FACTUAL}")
    assert len(troubled.hub.files(WIDE)[FACTUAL]) > BROKEN_AFTER
    assert [(r.headers.get("range"), r.status) for r in requests] == [(None, 200), (f"bytes={CHUNK}-", 206)]


@pytest.mark.parametrize("place", BUSY_DOWNLOADS)
def test_a_download_waits_when_it_is_told_to(troubled, pushed, place):
    assert troubled.found["busy"][place] == pushed.second["output"]


@pytest.mark.parametrize("place", BUSY_UPLOADS)
def test_an_upload_waits_when_it_is_told_to(troubled, place):
    assert troubled.found["busy"][place] == troubled.hub.repositories[f"user/busy-{place}"].refs[MAIN]


def test_an_upload_waits_for_as_long_as_the_rate_limit_says(troubled):
    refused, answered = [r.time for r in troubled.hub.log if r.method == "GET" and r.path.endswith("/user/busy-info")][
        :2
    ]
    assert answered - refused >= SECONDS


def test_each_place_told_to_wait_once(troubled):
    waits = [request for request in troubled.hub.log if request.status == 429]
    assert len(waits) == len(BUSY_DOWNLOADS) + len(BUSY_UPLOADS)


# ---- What can't be had is named -----------------------------------------------------------------------------------------


def test_a_private_model_is_loaded_with_a_token(troubled, pushed):
    assert troubled.found["refusals"]["private, token"] == pushed.second["output"]


@pytest.mark.parametrize(
    "name, repo, way_out",
    [
        ("private", PRIVATE, "private or gated repo, make sure you are authenticated"),
        ("private, stranger", PRIVATE, "your token has the required permissions"),
        ("private, wrong token", PRIVATE, "Invalid credentials"),
        ("private adapter", PRIVATE, "private or gated repo, make sure you are authenticated"),
        ("unknown", "user/unknown", "correct `repo_id`"),
        ("unknown, token", "user/unknown", "correct `repo_id`"),
        ("unknown adapter", "user/unknown", "correct `repo_id`"),
        ("unknown backbone", "user/unknown", "token=<your_token>"),
        ("unknown revision", MODEL, "Invalid rev id: nowhere"),
        ("gated", "user/gated", "Ask for access"),
        ("orphan", "user/gone", "backbone=<folder or model>"),
    ],
)
def test_what_can_not_be_reached_is_named_with_a_way_out(troubled, name, repo, way_out):
    error, message = troubled.found["refusals"][name]
    assert error == "KAdapterLoadError" and f"'{repo}'" in message and way_out in message


@pytest.mark.parametrize("name", WITHOUT)
def test_a_file_that_the_repository_lacks_is_named_with_a_way_out(troubled, name):
    error, message = troubled.found["refusals"][f"without {name}"]
    assert error == "KAdapterLoadError" and WITHOUT[name] in message and "ownload" in message
    assert f"models--user--without-{name}" in message  # its place in the cache


# ---- What arrives damaged is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "card"])
def test_a_damaged_download_is_refused_and_named(troubled, name):
    error, message = troubled.found["damaged"][name]
    assert error in ("KAdapterLoadError", "BackboneMismatchError")
    assert Path(DAMAGES[name][0]).name in message or name.startswith("backbone") and f"user/{name}" in message


def test_a_damaged_download_does_not_stay_in_the_cache(troubled, pushed):
    first, second, third = troubled.found["damaged"]["once"]
    assert first[0] == "KAdapterLoadError"
    assert second == third == pushed.second["output"]


def test_two_damaged_downloads_do_not_stay_in_the_cache(troubled, pushed):
    first, second, third = troubled.found["damaged"]["twice"]
    assert first[0] == "KAdapterLoadError" and FACTUAL in first[1] and "head.safetensors" in first[1]
    assert second == third == pushed.second["output"]


def test_a_damaged_card_does_not_matter_to_a_model_and_stays_when_it_is_pushed(troubled, pushed):
    assert troubled.found["damaged"]["card"] == pushed.second["output"]
    assert troubled.found["pushed"] == troubled.hub.repositories["user/card"].refs[MAIN]
    assert troubled.hub.files("user/card")["README.md"] == troubled.hub.files(MODEL)["README.md"]
