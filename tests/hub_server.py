"""A Hub on the loopback interface: repositories, branches, pull requests, LFS, and faults."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

import huggingface_hub.constants
import pytest

TOKEN = "hf_SecretOfTheTests"


class Stored(NamedTuple):
    content: bytes
    lfs: bool


Tree = dict[str, Stored]


@dataclass
class Repo:
    private: bool = False
    refs: dict[str, Tree] = field(
        default_factory=lambda: {"main": {".gitattributes": Stored(b"", False)}}
    )

    def tree(self, revision: str) -> Tree | None:
        by_commit = {sha_of(tree): tree for tree in self.refs.values()}
        return self.refs.get(revision, by_commit.get(revision))


@dataclass
class Hub:
    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By pattern of the request: the status, and what the server says."""
    drops: str = "$^"
    """Pattern of a request that is served, and whose connection is lost before the answer."""
    spoils: bool = False
    """Whether it keeps other bytes than it was sent."""
    yaml: dict[str, Any] = field(default_factory=lambda: {"warnings": [], "errors": []})

    def names(self, repo: str, revision: str = "main") -> set[str]:
        return set(self.repos[repo].refs[revision]) - {".gitattributes"}


def sha_of(tree: Tree) -> str:
    total = hashlib.sha1(b"commit")
    for name in sorted(tree):
        total.update(name.encode() + b"\0" + tree[name].content + b"\0")
    return total.hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_request(self, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        body = self._body()
        path, _, query = self.path.partition("?")
        path = unquote(path)
        request = f"{self.command} {path}"
        self.hub.asked.append(request)
        self.dropped = re.search(self.hub.drops, request)
        for pattern, (status, said) in self.hub.faults.items():
            if re.search(pattern, request):
                self._send(status, {"error": said})
                return
        if not path.startswith("/lfs/") and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
            return
        routes: dict[str, Callable[..., None]] = {
            r"PUT /lfs/(\w+)": self._store,
            r"POST /api/repos/create": self._create,
            r"POST /api/validate-yaml": self._validate,
            r"POST /(.+)\.git/info/lfs/objects/batch": self._batch,
            r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?": self._info,
            r"POST /api/models/([^/]+/[^/]+)/branch/(.+)": self._branch,
            r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)": self._preupload,
            r"POST /api/models/([^/]+/[^/]+)/paths-info/(.+)": self._paths,
            r"POST /api/models/([^/]+/[^/]+)/commit/(.+)": self._commit,
        }
        for route, answer in routes.items():
            if match := re.fullmatch(route, request):
                answer(body, query, *match.groups())
                return
        self._send(404, {"error": f"no route for {request}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, value: Any, code: str | None = None) -> None:
        if self.dropped:
            self.close_connection = True
            return
        sent = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(sent)

    def _store(self, body: bytes, query: str, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.lfs[oid] = body
        self._send(200, {})

    def _create(self, body: bytes, query: str) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        self._send(200, {"url": f"{self.hub.address}/{name}"})

    def _validate(self, body: bytes, query: str) -> None:
        self._send(400 if self.hub.yaml["errors"] else 200, self.hub.yaml)

    def _batch(self, body: bytes, query: str, repo: str) -> None:
        objects = [
            one
            if one["oid"] in self.hub.lfs
            else one | {"actions": {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _tree(self, repo: str, revision: str | None) -> Tree | None:
        """Or answers that there is none."""
        if repo not in self.hub.repos:
            self._send(404, {"error": "Repository not found"}, "RepoNotFound")
            return None
        tree = self.hub.repos[repo].tree(revision or "main")
        if tree is None:
            self._send(404, {"error": "Invalid rev id"}, "RevisionNotFound")
        return tree

    def _info(self, body: bytes, query: str, repo: str, revision: str | None) -> None:
        if (tree := self._tree(repo, revision)) is None:
            return
        siblings = [{"rfilename": name} for name in tree]
        private = self.hub.repos[repo].private
        told = {"id": repo, "sha": sha_of(tree), "private": private, "siblings": siblings}
        self._send(200, told)

    def _branch(self, body: bytes, query: str, repo: str, branch: str) -> None:
        refs = self.hub.repos[repo].refs
        refs[branch] = dict(refs["main"])
        self._send(200, {})

    def _preupload(self, body: bytes, query: str, repo: str, revision: str) -> None:
        if (tree := self._tree(repo, revision)) is None:
            return
        files = []
        for one in json.loads(body)["files"]:
            mode = "lfs" if one["path"].endswith(".safetensors") else "regular"
            there = tree.get(one["path"])
            oid = there and (digest(there) if there.lfs else git_digest(there.content))
            files.append(
                {"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self._send(200, {"files": files})

    def _paths(self, body: bytes, query: str, repo: str, revision: str) -> None:
        if (tree := self._tree(repo, revision)) is None:
            return
        told = []
        for name in parse_qs(body.decode())["paths"]:
            if (one := tree.get(name)) is not None:
                entry = {"type": "file", "path": name, "size": len(one.content)}
                entry["oid"] = git_digest(one.content)
                if one.lfs:
                    lfs = {"oid": digest(one), "size": len(one.content), "pointerSize": 130}
                    entry |= {"lfs": lfs, "oid": "0" * 40}
                told.append(entry)
        self._send(200, told)

    def _commit(self, body: bytes, query: str, repo: str, revision: str) -> None:
        if (tree := self._tree(repo, revision)) is None:
            return
        tree = dict(tree)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in (None, sha_of(tree)):
            self._send(412, {"error": "A commit has happened since."})
            return
        self.hub.messages.append(header["value"]["summary"])
        for one in operations:
            value = one["value"]
            if one["key"] == "deletedFile":
                del tree[value["path"]]
            elif one["key"] == "file":
                tree[value["path"]] = Stored(base64.b64decode(value["content"]), False)
            else:
                content = self.hub.lfs[value["oid"]]
                content = content[:-1] + b"?" if self.hub.spoils else content
                tree[value["path"]] = Stored(content, True)
        refs = self.hub.repos[repo].refs
        url = f"{self.hub.address}/{repo}/commit/{sha_of(tree)}"
        told = {"commitUrl": url, "commitOid": sha_of(tree), "pullRequestUrl": None}
        if "create_pr=1" in query:
            number = sum(name.startswith("refs/pr/") for name in refs) + 1
            revision = f"refs/pr/{number}"
            told["pullRequestUrl"] = f"{self.hub.address}/{repo}/discussions/{number}"
        refs[revision] = tree
        self._send(200, told)


def digest(one: Stored) -> str:
    return hashlib.sha256(one.content).hexdigest()


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub of everything inside, to which HF_TOKEN logs in."""
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
