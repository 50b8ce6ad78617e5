"""
A small Hugging Face Hub that runs inside a test: the part of its HTTP interface that `huggingface_hub` uses for models, and
`datasets` to read data sets. Both kinds of repositories share their names.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit


MAIN = "refs/heads/main"
LFS_FROM = 10 * 2**20  # bytes from which any file is an LFS object
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
OTHER_BYTES = bytes(range(255, -1, -1))  # a translation that leaves no byte as it was
OWN_SETTINGS = re.compile(r"HF_|HUGGING|TRANSFORMERS_|.*_PROXY$", re.IGNORECASE)
PATTERNS = {"repo": "[^/]+/[^/]+", "name": "[^/]+", "revision": "[^/]+", "oid": "[0-9a-f]{64}", "path": ".+"}
ROUTES: list[tuple[str, re.Pattern, Callable]] = []


@dataclass(frozen=True)
class File:
    """One version of a file, either in git or as an LFS object with a pointer in git."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    files: dict[str, File]
    message: str
    parent: str | None


@dataclass
class Repository:
    private: bool = False
    readers: set[str] | None = None  # if it is gated, the users that may read its files
    refs: dict[str, str] = field(default_factory=dict)  # full name -> commit
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by SHA-256

    def __post_init__(self) -> None:
        self.commit(MAIN, {".gitattributes": File(GITATTRIBUTES, lfs=False)}, "initial commit", None)

    def commit(self, ref: str, files: dict[str, File], message: str, parent: str | None) -> str:
        content = repr((parent, message, len(self.commits), sorted((path, file.etag) for path, file in files.items())))
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = Commit(files, message, parent)
        self.refs[ref] = oid
        return oid

    def ref(self, revision: str) -> str:
        """The full name of a branch, tag or pull request."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return name
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit_id(self, revision: str) -> str:
        return revision if revision in self.commits else self.refs[self.ref(revision)]


@dataclass
class Request:
    """What a client sent; `path` is unquoted and without the query."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # by lower-case name
    body: bytes
    user: str | None = None
    status: int | None = None  # of the answer
    time: float = field(default_factory=time.monotonic)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    sent: int | None = None  # close the connection after so many bytes of the body


@dataclass
class Fault:
    kind: str
    method: str
    path: re.Pattern
    times: float
    value: Any


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | headers
        self.reply = as_json({"error": message}, status, headers)


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and path.endswith(".safetensors") or size > LFS_FROM


def route(methods: str, path: str) -> Callable[[Callable], Callable]:
    """Routes requests for a path to the decorated method, which gets the named parts unquoted."""
    pattern = re.compile(re.sub(r"\{(\w+)\}", lambda part: f"(?P<{part[1]}>{PATTERNS[part[1]]})", path))

    def register(method: Callable) -> Callable:
        ROUTES.extend((name, pattern, method) for name in methods.split())
        return method

    return register


class HubServer:
    """
    The Hub at `url`, as long as the `with` block lasts.

    Attributes:
        tokens: user by token. A user may write to the repositories under the own name, and read those that are private.
        repositories: by id.
        log: all requests in the order in which they came.
        uploaded: SHA-256 and size of each LFS object that came, in that order.
        before_commit: called with the repository's id and before a client's commit is looked at, so that another commit
            can come first: by `put`, or by another client (which calls this too).
        errors: what the server itself did wrong, and requests for what it does not have.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, str] = {"token": "user"}
        self.repositories: dict[str, Repository] = {}
        self.log: list[Request] = []
        self.uploaded: list[tuple[str, int]] = []
        self.before_commit: Callable[[str], None] | None = None
        self.errors: list[str] = []
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.cdn = f"http://localhost:{port}"  # a different host for the client, which does not send its token there

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on nobody can connect."""
        self._server.shutdown()
        self._server.server_close()

    # ---- For tests --------------------------------------------------------------------------------------------------

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process whose Hub is this one, with its cache in `home`."""
        inherited = {name: value for name, value in os.environ.items() if not OWN_SETTINGS.match(name)}
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",  # hf_xet, if installed, would be used for uploads regardless of the server
        }
        return inherited | own | ({"HF_TOKEN": token} if token else {})

    def run(
        self, code: str | Sequence[str], home: Path, token: str | None = None, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs Python code, or Python with these arguments, in a new process in the folder `home`."""
        Path(home).mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, *(["-c", code] if isinstance(code, str) else code)],
            env=self.environment(home, token) | environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, done.stderr[-6000:]
        return done

    def put(self, repo: str, files: Mapping[str, bytes], *, private: bool = False, message: str = "put") -> str:
        """Commits files to the main branch without any client, in a new repository if needed; returns the commit's id."""
        with self._lock:
            repository = self.repositories.setdefault(repo, Repository(private))
            parent = repository.refs[MAIN]
            added = {path: File(content, is_lfs(path, len(content))) for path, content in files.items()}
            repository.objects |= {file.sha256: file.content for file in added.values() if file.lfs}
            return repository.commit(MAIN, repository.commits[parent].files | added, message, parent)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        with self._lock:
            repository = self.repositories[repo]
            commit = repository.commits[repository.commit_id(revision)]
            return {path: file.content for path, file in commit.files.items()}

    def logged(self, method: str, path: str) -> list[Request]:
        """The requests whose path the regular expression `path` is found in."""
        return [request for request in self.log if request.method == method and re.search(path, request.path)]

    def fail(
        self, method: str, path: str, status: int, times: float = 1, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answers the next requests whose path the regular expression is found in with an error."""
        reply = as_json({"error": "told to fail"}, status, headers)
        self._faults.append(Fault("fail", method, re.compile(path), times, reply))

    def break_download(self, path: str, after: int, times: float = 1) -> None:
        """Closes the connection after so many bytes. An LFS object's path ends in its file's, as a file's own does."""
        self._faults.append(Fault("break", "GET", re.compile(path), times, after))

    def corrupt(self, path: str, at: int | None = None, times: float = float("inf")) -> None:
        """Serves other bytes of the same number: all of them, or only the one at `at` is another one."""
        self._faults.append(Fault("corrupt", "GET", re.compile(path), times, at))

    # ---- Requests ---------------------------------------------------------------------------------------------------

    def answer(self, request: Request, quoted_path: str) -> Reply:
        self.log.append(request)
        quoted_path = re.sub("^(/api)?/datasets/", lambda found: "/api/models/" if found[1] else "/", quoted_path)
        try:
            failure = self._fault("fail", request)
            if failure is not None:
                return failure.value
            for method, pattern, function in ROUTES:
                match = pattern.fullmatch(quoted_path)
                if match and method == request.method:
                    parts = {name: unquote(value) for name, value in match.groupdict().items()}
                    if function is HubServer._commit and self.before_commit is not None:
                        self.before_commit(parts["repo"])  # without the lock: other clients are to come first
                    with self._lock:
                        request.user = self._user(request)
                        return function(self, request, **parts)
            self.errors.append(f"no route for {request.method} {request.path}")
            return as_json({"error": self.errors[-1]}, 404)
        except Refusal as refusal:
            return refusal.reply
        except Exception:
            self.errors.append(traceback.format_exc())
            return as_json({"error": self.errors[-1]}, 500)

    def _fault(self, kind: str, request: Request) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                right = fault.kind == kind and fault.method == request.method and fault.times > 0
                if right and fault.path.search(request.path):
                    fault.times -= 1
                    return fault
        return None

    def _user(self, request: Request) -> str | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def _repository(self, request: Request, repo: str, write: bool = False) -> Repository:
        """One that is missing and one that is private look the same to a stranger."""
        repository, owner = self.repositories.get(repo), repo.split("/")[0]
        if repository is None or repository.private and request.user != owner:
            if request.user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and request.user is None:
            raise Refusal(401, "Invalid username or password.")
        if write and request.user != owner:
            raise Refusal(403, f"You don't have write access to {repo}")
        return repository

    def _serve(self, request: Request, content: bytes, headers: dict[str, str]) -> Reply:
        """The content, or the range of it that was asked for, with the faults that are set for it."""
        if request.method == "HEAD":
            return Reply(200, content, headers)
        corrupt, broken = self._fault("corrupt", request), self._fault("break", request)
        if corrupt is not None:
            part = slice(None) if corrupt.value is None else slice(corrupt.value, corrupt.value + 1 or None)
            content = bytearray(content)
            content[part] = content[part].translate(OTHER_BYTES)
            content = bytes(content)
        sent = broken.value if broken is not None else None
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if wanted is None:
            return Reply(200, content, headers, sent)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first > last:
            raise Refusal(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return Reply(206, content[first : last + 1], headers, sent)

    # ---- Users and repositories -------------------------------------------------------------------------------------

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Reply:
        """Whose token it is."""
        if request.user is None:
            raise Refusal(401, "Invalid username or password.")
        return as_json({"type": "user", "name": request.user, "orgs": [], "auth": {"type": "access_token"}})

    @route("POST", "/api/repos/create")
    def _create(self, request: Request) -> Reply:
        """Creates a repository with one commit; 409, with its address, if the name exists."""
        if request.user is None:
            raise Refusal(401, "Invalid username or password.")
        wanted = request.json
        owner = wanted.get("organization") or request.user
        repo = f"{owner}/{wanted['name']}"
        if owner != request.user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        reply = {"url": f"{self.url}/{repo}", "name": repo}
        if repo in self.repositories:
            return as_json(reply | {"error": "You already created this model repo"}, 409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.repositories[repo] = Repository(private)
        return as_json(reply)

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Reply:
        """The Hub checks a model card's metadata before a commit; here all are right."""
        return as_json({"errors": [], "warnings": []})

    # ---- What is in a repository ------------------------------------------------------------------------------------

    @route("GET", "/api/models/{name}")
    @route("GET", "/api/models/{name}/revision/{revision}")
    @route("GET HEAD", "/{name}/resolve/{revision}/{path}")
    def _without_owner(self, request: Request, name: str, **parts: str) -> Reply:
        """Names without an owner, which don't exist here."""
        self._repository(request, name)
        raise AssertionError(f"{name} has no owner")

    @route("GET", "/api/models/{repo}")
    @route("GET", "/api/models/{repo}/revision/{revision}")
    def _info(self, request: Request, repo: str, revision: str = "main") -> Reply:
        """A commit of a repository: its id, and the names of its files."""
        repository = self._repository(request, repo)
        oid = repository.commit_id(revision)
        siblings: list[dict[str, Any]] = []
        for path, file in sorted(repository.commits[oid].files.items()):
            entry = self._entry(path, file)
            more = {"size": entry["size"], "blobId": entry["oid"]} if "blobs" in request.query else {}
            if more and file.lfs:
                more["lfs"] = entry["lfs"] | {"sha256": file.sha256}
            siblings.append({"rfilename": path, **more})
        gated = "manual" if repository.readers is not None else False
        info = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": oid, "private": repository.private}
        return as_json(info | {"gated": gated, "tags": [], "siblings": siblings})

    @route("GET", "/api/models/{repo}/refs")
    def _refs(self, request: Request, repo: str) -> Reply:
        """Branches, tags and pull requests."""
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        refs = self._repository(request, repo).refs.items()
        found = {
            kind: [
                {"name": name.removeprefix(prefix), "ref": name, "targetCommit": oid}
                for name, oid in refs
                if name.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
        }
        return as_json(found | {"converts": []})

    @route("POST", "/api/models/{repo}/branch/{revision}")
    def _create_branch(self, request: Request, repo: str, revision: str) -> Reply:
        """Creates a branch from main or another commit; 409 if the name exists."""
        repository = self._repository(request, repo, write=True)
        name = f"refs/heads/{revision}"
        if name in repository.refs:
            raise Refusal(409, f"Reference already exists: {name}")
        repository.refs[name] = repository.commit_id(request.json.get("startingPoint", "main"))
        return as_json({"success": True})

    @route("GET", "/api/models/{repo}/tree/{revision}")
    @route("GET", "/api/models/{repo}/tree/{revision}/{path}")
    def _tree(self, request: Request, repo: str, revision: str, path: str = "") -> Reply:
        """Files and folders with their sizes and ids, below a folder or directly in it."""
        repository = self._repository(request, repo)
        entries = self._entries(repository.commits[repository.commit_id(revision)].files)
        prefix = f"{path}/" if path else ""
        below = {name: entry for name, entry in entries.items() if name.startswith(prefix)}
        if path and not below:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        everything = request.query.get("recursive", "").lower() == "true"
        return as_json([entry for name, entry in below.items() if everything or "/" not in name[len(prefix) :]])

    @route("POST", "/api/models/{repo}/paths-info/{revision}")
    def _paths_info(self, request: Request, repo: str, revision: str) -> Reply:
        """The same for the given paths; missing ones are skipped."""
        repository = self._repository(request, repo)
        entries = self._entries(repository.commits[repository.commit_id(revision)].files)
        return as_json([entries[p] for p in parse_qs(request.body.decode()).get("paths", []) if p in entries])

    def _entries(self, files: Mapping[str, File]) -> dict[str, dict[str, Any]]:
        folders = {parent.as_posix() for path in files for parent in Path(path).parents} - {"."}
        entries = {path: {"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders}
        return dict(sorted((entries | {path: self._entry(path, file) for path, file in files.items()}).items()))

    @staticmethod
    def _entry(path: str, file: File) -> dict[str, Any]:
        size = len(file.content)
        lfs = {"lfs": {"oid": file.sha256, "size": size, "pointerSize": len(file.pointer)}} if file.lfs else {}
        return {"type": "file", "oid": file.blob_id, "size": size, "path": path} | lfs

    # ---- Downloads --------------------------------------------------------------------------------------------------

    @route("GET HEAD", "/{repo}/resolve/{revision}/{path}")
    def _resolve(self, request: Request, repo: str, revision: str, path: str) -> Reply:
        """A file, or the location of its LFS object; its commit, size and id are in the headers."""
        repository = self._repository(request, repo)
        if repository.readers is not None and request.user not in repository.readers:
            status = 401 if request.user is None else 403
            raise Refusal(status, f"Access to model {repo} is restricted. Ask for access first.", "GatedRepo")
        oid = repository.commit_id(revision)
        file = repository.commits[oid].files.get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
        if not file.lfs:
            headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
            return self._serve(request, file.content, headers)
        headers = {
            "Location": f"{self.cdn}/cdn/{repo}/{file.sha256}/{quote(path)}",
            "X-Repo-Commit": oid,
            "X-Linked-Size": str(len(file.content)),
            "X-Linked-ETag": f'"{file.etag}"',
        }
        return Reply(302, b"Found. Redirecting", headers)

    @route("GET HEAD", "/cdn/{repo}/{oid}/{path}")
    def _download(self, request: Request, repo: str, oid: str, path: str) -> Reply:
        """An LFS object: whoever was sent here may read it."""
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        return self._serve(request, self.repositories[repo].objects[oid], headers)

    # ---- Uploads ----------------------------------------------------------------------------------------------------

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def _preupload(self, request: Request, repo: str, revision: str) -> Reply:
        """Which files to upload as LFS objects, which to ignore, and the existing ids of the names (`oid`)."""
        repository = self._repository(request, repo, write="create_pr" not in request.query)
        there = repository.commits[repository.commit_id(revision)].files
        ignored = there[".gitignore"].content.decode() if ".gitignore" in there else ""
        ignored = request.json.get("gitIgnore", ignored).split()
        replies = []
        for file in request.json["files"]:
            path = file["path"]
            reply = {"path": path, "uploadMode": "lfs" if is_lfs(path, file["size"]) else "regular"}
            names = [path, path.rsplit("/", 1)[-1]]
            reply["shouldIgnore"] = any(fnmatch.fnmatch(name, pattern) for name in names for pattern in ignored)
            replies.append(reply | ({"oid": there[path].etag} if path in there else {}))
        return as_json({"files": replies})

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, repo: str) -> Reply:
        """Where to send LFS objects; those that are here already need not be sent."""
        repository = self._repository(request, repo)
        replies = []
        for wanted in request.json["objects"]:
            verify = {"href": f"{self.url}/{repo}.git/info/lfs/objects/verify"}
            actions = {"upload": {"href": f"{self.cdn}/upload/{repo}/{wanted['oid']}"}, "verify": verify}
            replies.append(wanted if wanted["oid"] in repository.objects else wanted | {"actions": actions})
        return as_json({"transfer": "basic", "objects": replies})

    @route("PUT", "/upload/{repo}/{oid}")
    def _upload(self, request: Request, repo: str, oid: str) -> Reply:
        """Takes an LFS object: whoever was sent here may write it."""
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "The content is not what its SHA-256 says")
        self.repositories[repo].objects[oid] = request.body
        self.uploaded.append((oid, len(request.body)))
        return Reply(200, headers={"ETag": f'"{oid}"'})

    @route("POST", "/{repo}.git/info/lfs/objects/verify")
    def _lfs_verify(self, request: Request, repo: str) -> Reply:
        """Whether an LFS object has arrived."""
        stored = self._repository(request, repo).objects.get(request.json["oid"])
        if stored is None or len(stored) != request.json["size"]:
            raise Refusal(404, "The object is not here")
        return as_json({"message": "ok"})

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def _commit(self, request: Request, repo: str, revision: str) -> Reply:
        """A commit, one JSON object a line: to a branch or pull request that is there, or as a new pull request."""
        as_pull_request = "create_pr" in request.query
        repository = self._repository(request, repo, write=not as_pull_request)
        ref = repository.ref(revision)
        parent = repository.refs[ref]
        files, header = dict(repository.commits[parent].files), {}
        for line in request.body.splitlines():
            key, value = json.loads(line)["key"], json.loads(line)["value"]
            if key == "header":
                header = value
                if value.get("parentCommit", parent) != parent:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in repository.objects:
                    raise Refusal(400, f"The LFS object of {value['path']} is not here")
                files[value["path"]] = File(repository.objects[value["oid"]], lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                below = value["path"].rstrip("/") + "/"
                gone = [path for path in files if path == value["path"] or (f"{path}/").startswith(below)]
                if not gone:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                files = {path: file for path, file in files.items() if path not in gone}
            else:
                raise Refusal(400, f"unknown operation {key}")
        number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
        oid = repository.commit(f"refs/pr/{number}" if as_pull_request else ref, files, header["summary"], parent)
        reply = {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}", "hookOutput": ""}
        return as_json(
            reply | ({"pullRequestUrl": f"{self.url}/{repo}/discussions/{number}"} if as_pull_request else {})
        )


class _Handler(BaseHTTPRequestHandler):
    """Reads requests and sends replies; connections stay open for more."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each reply waits for the client's delayed acknowledgment of its headers
    server: "_Server"

    def _handle(self) -> None:
        address = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(address.path), query, headers, body)
        if "transfer-encoding" in headers:
            reply = as_json({"error": "bodies must come with their length"}, 411, {"Connection": "close"})
        else:
            reply = self.server.hub.answer(request, address.path)
        request.status = reply.status
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: reply.sent])
        if reply.sent is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def log_message(self, *arguments) -> None:
        """The requests are in `HubServer.log`."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: HubServer

    def handle_error(self, *arguments) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client has gone
            super().handle_error(*arguments)
