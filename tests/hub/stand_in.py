"""
A small Hub on loopback: what `huggingface_hub` calls to make, fill and read repositories, and nothing else.

Files that the Hub would keep in LFS go by the batch API, in parts that a client uploads; others go with the commit.
Private repositories are there for their owner's token only, and missing for everyone else, as on the Hub.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard


LFS = {".safetensors", ".bin", ".pt", ".pth", ".parquet"}


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@dataclass
class Repository:
    """Commits of a repository: all files after each, by the commit's id, oldest first."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {sha1(b"made"): {}})
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def add(self, changes: dict[str, bytes], removed: set[str], message: str) -> str:
        files = {path: content for path, content in self.files.items() if path not in removed} | changes
        sha = sha1(f"{self.head} {message} {len(self.commits)}".encode())
        self.commits[sha] = files
        self.messages.append(message)
        return sha


class Hub:
    """
    Repositories by name, for one user with one token.

    Attributes:
        requests (`list[str]`): Method and path of each request, in order.
        unknown (`list[str]`): Those of them that this Hub has no answer for.
    """

    user = "somebody"
    token = "hf_standin"

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.lock = threading.Lock()
        self.address = ""

    def card(self, name: str) -> ModelCard:
        return ModelCard(self.repositories[name].files["README.md"].decode())

    # One method for each route, which returns (status, what to send, headers)

    def create(self, request: "Request") -> tuple:
        body = request.json()
        name = f"{body['organization'] or self.user}/{body['name']}"
        url = {"url": f"{self.address}/{name}", "name": name}
        if not request.is_user:
            return 401, {"error": "Invalid credentials"}, {}
        if name in self.repositories:
            return 409, url | {"error": "You already created this repo"}, {}
        self.repositories[name] = Repository(private=body.get("visibility") == "private")
        return 200, url, {}

    def who(self, request: "Request") -> tuple:
        if not request.is_user:
            return 401, {"error": "Invalid credentials"}, {}
        return 200, {"type": "user", "name": self.user, "orgs": []}, {}

    def check_card(self, request: "Request") -> tuple:
        ModelCard(request.json()["content"])
        return 200, {"errors": [], "warnings": []}, {}

    def info(self, request: "Request", name: str, revision: str = "main") -> tuple:
        repository, sha = request.repository(name), request.commit(name, revision)
        files = repository.commits[sha]
        card = ModelCard(files["README.md"].decode()).data.to_dict() if "README.md" in files else {}
        answer = {
            **{"id": name, "modelId": name, "sha": sha, "private": repository.private, "tags": card.get("tags", [])},
            **{"siblings": [{"rfilename": path} for path in sorted(files)], "cardData": card},
        }
        return 200, answer, {}

    def tree(self, request: "Request", name: str, revision: str, folder: str = "") -> tuple:
        files = request.repository(name).commits[request.commit(name, revision)]
        if folder and not any(path.startswith(f"{folder}/") for path in files):
            raise Refusal(404, "EntryNotFound")
        entries = [entry_of(path, content) for path, content in sorted(files.items()) if path.startswith(folder)]
        return 200, entries, {}

    def ask_upload(self, request: "Request", name: str, revision: str) -> tuple:
        request.repository(name, writes=True)
        modes = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if PurePosixPath(one["path"]).suffix in LFS else "regular",
                "shouldIgnore": False,
            }
            for one in request.json()["files"]
        ]
        return 200, {"files": modes}, {}

    def lfs_batch(self, request: "Request", name: str) -> tuple:
        request.repository(name, writes=True)
        objects = []
        for one in request.json()["objects"]:
            upload = {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}
            objects.append(one if one["oid"] in self.blobs else one | {"actions": upload})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_upload(self, request: "Request", oid: str) -> tuple:
        if hashlib.sha256(request.body).hexdigest() != oid:
            return 422, {"error": "not what was announced"}, {}
        self.blobs[oid] = request.body
        return 200, {}, {}

    def commit(self, request: "Request", name: str, revision: str) -> tuple:
        repository = request.repository(name, writes=True)
        changes, removed, message = {}, set(), ""
        for line in request.body.decode().splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                changes[value["path"]] = self.blobs[value["oid"]]
            else:
                removed.add(value["path"])
        sha = repository.add(changes, removed, message)
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{sha}", "commitOid": sha, "success": True}, {}

    def resolve(self, request: "Request", name: str, revision: str, path: str) -> tuple:
        sha = request.commit(name, revision)
        files = request.repository(name).commits[sha]
        if path not in files:
            raise Refusal(404, "EntryNotFound", {"X-Repo-Commit": sha})
        content = files[path]
        return 200, content, {"X-Repo-Commit": sha, "ETag": f'"{etag_of(path, content)}"'}


def etag_of(path: str, content: bytes) -> str:
    is_lfs = PurePosixPath(path).suffix in LFS
    return hashlib.sha256(content).hexdigest() if is_lfs else sha1(b"blob %d\0" % len(content) + content)


def entry_of(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": sha1(content)}
    if PurePosixPath(path).suffix in LFS:
        entry["lfs"] = {"oid": etag_of(path, content), "size": len(content), "pointerSize": 134}
    return entry


class Refusal(Exception):
    """An answer that is no success, with the code by which the client tells them apart."""

    def __init__(self, status: int, code: str, headers: dict[str, str] | None = None):
        super().__init__(code)
        self.status, self.headers = status, {"X-Error-Code": code} | (headers or {})


_NAME, _REVISION = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", Hub.create),
    ("GET", "/api/whoami-v2", Hub.who),
    ("POST", "/api/validate-yaml", Hub.check_card),
    ("GET", f"/api/models/{_NAME}", Hub.info),
    ("GET", f"/api/models/{_NAME}/revision/{_REVISION}", Hub.info),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}(?:/(.+))?", Hub.tree),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", Hub.ask_upload),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", Hub.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("PUT", r"/lfs/(\w+)", Hub.lfs_upload),
    ("GET", f"/{_NAME}/resolve/{_REVISION}/(.+)", Hub.resolve),
]


class Request:
    """One request, and what its token may see."""

    def __init__(self, hub: Hub, body: bytes, authorization: str | None):
        self.hub, self.body = hub, body
        self.is_user = authorization == f"Bearer {hub.token}"

    def json(self) -> Any:
        return json.loads(self.body)

    def repository(self, name: str, writes: bool = False) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or ((found.private or writes) and not self.is_user):
            # The Hub does not tell that there is one
            raise Refusal(404 if self.is_user else 401, "RepoNotFound")
        return found

    def commit(self, name: str, revision: str) -> str:
        repository = self.repository(name)
        sha = repository.head if revision == "main" else revision
        if sha not in repository.commits:
            raise Refusal(404, "RevisionNotFound")
        return sha


def handler_of(hub: Hub) -> type:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            with hub.lock:
                status, content, headers = self.find(path, Request(hub, body, self.headers.get("Authorization")))
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def find(self, path: str, request: Request) -> tuple:
            hub.requests.append(f"{self.command} {path}")
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command.replace("HEAD", "GET") == method:
                    try:
                        return action(hub, request, *(part for part in match.groups() if part is not None))
                    except Refusal as refusal:
                        return refusal.status, {"error": str(refusal)}, refusal.headers
            hub.unknown.append(f"{self.command} {path}")
            return 404, {"error": "not in this stand-in"}, {}

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers at `hub.address` until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
