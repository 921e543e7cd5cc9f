"""A small Hugging Face hub on localhost: the parts of its protocol that downloads meet, and its ways to fail.

Repositories live in memory. Files above 1 kB are LFS files: the hub redirects to a second name of the same server (as
the real one does to its storage), which knows ranges. Every request is noted in `seen`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    files: dict[str, bytes]
    gated: bool = False
    card: dict[str, str] = field(default_factory=dict)
    commit: str = "1" * 40


@dataclass
class Request:
    method: str
    path: str
    host: str
    range: str | None
    authorised: bool


class Hub:
    """Start it with `with`; `url` is its endpoint. The fields below may be changed while it runs."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, set[str]] = {}
        """token -> gated repositories that it may read"""
        self.cuts: list[int] = []
        """the next storage answers end after so many bytes, with the connection"""
        self.stall_after: int | None = None
        """storage answers send so many bytes, then wait for `release`"""
        self.release = threading.Event()
        self.damage = False
        """flip a byte of every storage answer"""
        self.ranges = True
        """whether the storage honours Range"""
        self.seen: list[Request] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://localhost:{self.server.server_port}"

    def add(self, name: str, files: dict[str, bytes], **more: object) -> Repo:
        self.repos[name] = Repo(files, **more)
        return self.repos[name]

    def bodies(self) -> list[Request]:
        """The requests for LFS files' bytes."""
        return [request for request in self.seen if request.path.startswith("/storage/") and request.method == "GET"]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(content: bytes) -> bool:
    return len(content) > 1000


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        request = Request(self.command, path, self.headers["Host"], self.headers.get("Range"), bool(token))
        self.hub.seen.append(request)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path):
            self.info(found[1])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(found[1], found[3], token)
        elif found := re.fullmatch(r"/storage/(\w+)", path):
            self.storage(found[1])
        else:
            self.fail(404)

    def fail(self, status: int, code: str = "", message: str = "") -> None:
        self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def info(self, name: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self.fail(401, "RepoNotFound", "Repository not found")
            return
        siblings = []
        for path, content in repo.files.items():
            entry = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
            if is_lfs(content):
                entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        data = {"id": name, "modelId": name, "sha": repo.commit, "private": False, "siblings": siblings, "tags": []}
        data |= {"gated": "auto" if repo.gated else False, "cardData": repo.card, "downloads": 0, "likes": 0}
        self.reply(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, path: str, token: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self.fail(401, "RepoNotFound")
        elif repo.gated and name not in self.hub.tokens.get(token, set()):
            self.fail(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        elif path not in repo.files:
            self.fail(404, "EntryNotFound")
        else:
            content = repo.files[path]
            headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
            if is_lfs(content):
                place = f"http://127.0.0.1:{self.hub.server.server_port}/storage/{sha256(content)}"
                linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256(content)}"'}
                self.reply(302, b"", headers | linked | {"Location": place})
            else:
                self.reply(200, content, headers | {"ETag": f'"{git_sha1(content)}"'})

    def storage(self, digest: str) -> None:
        contents = (content for repo in self.hub.repos.values() for content in repo.files.values())
        content = next(content for content in contents if sha256(content) == digest)
        start = 0
        if (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")) and self.hub.ranges:
            start = int(asked[1])
        if start and start >= len(content):
            self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        body = bytearray(content[start:])
        if self.hub.damage:
            body[-1] ^= 1
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{digest}"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.send_body(bytes(body))

    def send_body(self, body: bytes) -> None:
        if self.hub.cuts:
            self.wfile.write(body[: self.hub.cuts.pop(0)])
            self.close_connection = True
            self.connection.close()
        elif self.hub.stall_after is not None:
            self.wfile.write(body[: self.hub.stall_after])
            self.wfile.flush()
            self.hub.release.wait()
        else:
            self.wfile.write(body)
