"""The Hub's HTTP interface, as far as huggingface_hub uses it here, on a port of this machine.

Up: create a repository or branch, check a card, preupload, LFS batch and upload (safetensors; other
files go into the commit itself), commit. Down: info, tree, files. Not xet, nor data sets.
"""

import base64
import hashlib
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import datasets
import huggingface_hub
from huggingface_hub import HfFileSystem, constants

REFUSALS = {  # status and error code, as the Hub has them
    "someone/gated": (403, "GatedRepo"),
    "someone/down": (500, ""),
    "other/theirs": (403, ""),
}


class Repo:
    """Files by path of every commit; branches and tags are names of commits."""

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.numbers = itertools.count()
        self.commits: dict[str, dict[str, bytes]] = {}
        self.messages: dict[str, str] = {}
        self.refs: dict[str, str] = {}
        self.commit("main", {}, "initial commit")

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        name = hashlib.sha1(f"{next(self.numbers)} {message}".encode()).hexdigest()
        self.commits[name], self.messages[name], self.refs[ref] = files, message, name
        return name

    def at(self, revision: str) -> str | None:
        name = self.refs.get(revision, revision)
        return name if name in self.commits else None


class Hub:
    """What is on the stand-in, and what was asked of it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.stored: dict[str, bytes] = {}  # LFS: contents by SHA-256
        self.tokens: set[str | None] = set()

    def add(self, name: str, folder: Path) -> str:
        """A repository with the files of a folder, tagged v1; its commit."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        repo = self.repos[name] = Repo()
        repo.refs["v1"] = repo.commit("main", files, "files")
        return repo.refs["v1"]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return repo.commits[repo.at(revision)]

    # ---- what the handler asks: (path after /api/models/NAME/, body) -> status, JSON

    def create(self, body: dict) -> tuple[int, dict]:
        name = f"{body['organization']}/{body['name']}"
        if name in REFUSALS:
            return REFUSALS[name][0], {"error": "forbidden"}
        status = 409 if name in self.repos else 200
        self.repos.setdefault(name, Repo(body.get("visibility") == "private"))
        return status, {"url": f"{constants.ENDPOINT}/{name}"}

    def change(
        self, name: str, what: str, ref: str, lines: list[dict], in_pr: bool
    ) -> tuple[int, dict]:
        repo = self.repos[name]
        if what == "branch":
            known = ref in repo.refs
            repo.refs.setdefault(ref, repo.refs["main"])
            return (409 if known else 201), {}
        if what == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in lines[0]["files"]
            ]
            return 200, {"files": files}
        files = dict(repo.commits[repo.refs[ref]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.commit("refs/pr/1" if in_pr else ref, files, lines[0]["value"]["summary"])
        page = f"{constants.ENDPOINT}/{name}"
        pr = f"{page}/discussions/1" if in_pr else None
        about = {"commitUrl": f"{page}/commit/{commit}", "commitOid": commit, "pullRequestUrl": pr}
        return 200, about

    def batch(self, body: dict) -> dict:
        objects = [
            {**one, "actions": {"upload": {"href": f"{constants.ENDPOINT}/lfs/{one['oid']}"}}}
            for one in body["objects"]
        ]
        return {"transfer": "basic", "objects": objects}


class Handler(BaseHTTPRequestHandler):
    """Routes."""

    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content_Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def parts(self) -> list[str]:
        path = self.path.partition("?")[0]
        self.hub.requests.append(path)
        self.hub.tokens.add(self.headers.get("Authorization"))
        return [unquote(part) for part in path.strip("/").split("/")]

    def body(self) -> bytes:
        if length := self.headers["Content-Length"]:
            return self.rfile.read(int(length))
        content = b""  # in chunks, each after its size
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_GET(self):
        parts = self.parts()
        if parts[:2] == ["api", "models"]:
            name, what, revision = "/".join(parts[2:4]), *[*parts[4:6], "revision", "main"][:2]
        else:
            name, what, revision = "/".join(parts[:2]), "resolve", parts[3]
        if name in REFUSALS or name not in self.hub.repos:
            status, code = REFUSALS.get(name, (401, "RepoNotFound"))
            return self.answer(status, X_Error_Code=code)
        repo = self.hub.repos[name]
        if (commit := repo.at(revision)) is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = repo.commits[commit]
        if what == "revision":
            return self.answer(200, {"id": name, "sha": commit, "siblings": []})
        if what == "tree":
            rows = [
                {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                for path, content in files.items()
            ]
            return self.answer(200, rows)
        content = files["/".join(parts[4:])]
        return self.answer(200, content, ETag=f'"{_oid(content)}"', X_Repo_Commit=commit)

    do_HEAD = do_GET

    def do_POST(self):
        parts = self.parts()
        lines = [json.loads(line) for line in self.body().splitlines()]
        if parts == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            return self.answer(*self.hub.create(lines[0]))
        if parts[-1] == "batch":
            return self.answer(200, self.hub.batch(lines[0]))
        in_pr = "create_pr=1" in self.path
        return self.answer(*self.hub.change("/".join(parts[2:4]), *parts[4:6], lines, in_pr))

    def do_PUT(self):
        content, name = self.body(), self.parts()[-1]
        assert hashlib.sha256(content).hexdigest() == name
        self.hub.stored[name] = content
        self.answer(200)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(cache: Path, monkeypatch) -> Iterator[Hub]:
    """The Hub within reach, and an empty cache."""
    hub = Hub()
    with answering(type("Here", (Handler,), {"hub": hub}), cache, monkeypatch):
        yield hub


@contextmanager
def answering(handler: type, cache: Path, monkeypatch) -> Iterator[None]:
    """A handler of requests in the place of the Hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    HfFileSystem.clear_instance_cache()  # which remembers another address
    yield
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()
