"""A Hub of one user on 127.0.0.1: what huggingface_hub asks to fill a repository, and to read it.

It keeps every byte that is uploaded, checks the token of each request, and can be told to fail:

    with hub_server() as hub:
        hub.failures["commit"] = Failure(status=500, times=2)
        ...  # with HF_ENDPOINT=hub.address
        assert hub.files("me/model") == {"README.md": b"..."}

Files ending in .safetensors go the way of large files (LFS), all others are part of the commit.
"""

import base64
import hashlib
import http.server
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

TOKEN = "hf_TestTokenOfTheFakeHub0123456789"
USER = "me"
LARGEST = 64 * 2**20
"""Bytes of the largest request that is read."""
MOST_REQUESTS = 500

ROUTES = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "auth": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/auth-check/write"),
    "yaml": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main"),
    "batch": ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "put": ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})"),
    "commit": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main"),
    "tree": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/[^/]+"),
    "resolve": ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)"),
    "info": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+?)(/revision/main)?"),
}
"""What can be asked, by the names that `Hub.failures` has: the method, and the path's pattern."""


@dataclass
class Failure:
    """How a request fails: by a status, or, without one, in the middle of the connection."""

    status: int | None = None
    how: str = "status"
    """`status`; `close` the connection, which for an upload is half-way; or `hang`."""
    times: int = 10**9
    message: str = ""


@dataclass
class Hub:
    """The state of the server; tests read and change it."""

    address: str = ""
    failures: dict[str, Failure] = field(default_factory=dict)
    repos: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    """The states of each repository, one for each commit; its files by path."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    read_only: set[str] = field(default_factory=set)
    cards: dict[str, dict] = field(default_factory=dict)
    """Metadata that the answer about a repository has."""
    asked: list[str] = field(default_factory=list)
    """The name of each request, in order."""
    read: list[str] = field(default_factory=list)
    """The path of each file that was asked for, in order."""
    done: threading.Event = field(default_factory=threading.Event)

    def files(self, repo: str) -> dict[str, bytes]:
        """The files of a repository after its last commit."""
        return self.repos[repo][-1]


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    timeout = 20
    hub: Hub

    def log_message(self, *args):
        """Keep stderr clean."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        for name, (method, pattern) in ROUTES.items():
            found = re.fullmatch(pattern, path)
            if found and method == ("GET" if self.command == "HEAD" else self.command):
                return self.route(name, found.groupdict())
        return self.reply(404, {"error": f"{self.command} {path} is not part of this Hub"})

    do_POST = do_PUT = do_HEAD = do_GET

    def route(self, name: str, parts: dict[str, str]):
        hub = self.hub
        hub.asked.append(name)
        if len(hub.asked) > MOST_REQUESTS:
            return self.reply(429, {"error": "too many requests"})
        failure = hub.failures.get(name)
        if failure and failure.times > 0:
            failure.times -= 1
            return self.fail(failure)
        # A storage address carries its own permission.
        if name != "put" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid user token"})
        repo = parts.get("repo")
        if repo is not None and repo not in hub.repos and repo not in hub.cards:
            return self.reply(
                404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
        if repo in hub.read_only and name in ("auth", "preupload", "batch", "commit"):
            return self.reply(403, {"error": "You have no right to write here"})
        return getattr(self, f"answer_{name}")(**parts)

    def fail(self, failure: Failure):
        if failure.how == "hang":
            self.hub.done.wait(20)
        if failure.status is not None:
            return self.reply(failure.status, {"error": failure.message or "as the test told it"})
        if length := int(self.headers.get("Content-Length", 0)):
            self.rfile.read(min(length // 2, LARGEST))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(100), 16):
                parts.append(self.rfile.read(min(size, LARGEST)))
                self.rfile.readline(3)
            self.rfile.readline(3)
            return b"".join(parts)
        return self.rfile.read(min(int(self.headers.get("Content-Length", 0)), LARGEST))

    def reply(self, status: int, value: object, headers: dict[str, str] | None = None):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        if status >= 400:  # what was sent may not have been read
            sent["Connection"] = "close"
        for name, text in {**sent, **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_whoami(self):
        self.reply(200, {"name": USER, "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def answer_create(self):
        wanted = json.loads(self.body())
        repo = f"{wanted['organization'] or USER}/{wanted['name']}"
        url = {"url": f"{self.hub.address}/{repo}"}
        if not repo.startswith(f"{USER}/"):
            return self.reply(403, {"error": "You have no right to create a model there"})
        if repo in self.hub.repos:
            return self.reply(409, {"error": "You already created this model", **url})
        self.hub.repos[repo] = [{}]
        return self.reply(200, url)

    def answer_auth(self, repo: str):
        self.reply(200, {})

    def answer_yaml(self):
        self.body()
        self.reply(200, {"errors": [], "warnings": []})

    def answer_preupload(self, repo: str):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body())["files"]
        ]
        self.reply(200, {"files": files})

    def answer_batch(self, repo: str):
        objects = []
        for each in json.loads(self.body())["objects"]:
            if each["oid"] not in self.hub.stored:
                upload = {"href": f"{self.hub.address}/storage/{each['oid']}"}
                each["actions"] = {"upload": upload}
            objects.append(each)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def answer_put(self, oid: str):
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.reply(400, {"error": "these are other bytes"})
        self.hub.stored[oid] = content
        return self.reply(200, {})

    def answer_commit(self, repo: str):
        files = dict(self.hub.files(repo))
        for line in self.body().splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        self.hub.repos[repo].append(files)
        oid = f"{len(self.hub.repos[repo]):040x}"
        url = f"{self.hub.address}/{repo}/commit/{oid}"
        self.reply(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def answer_tree(self, repo: str):
        files = self.hub.files(repo)
        self.reply(
            200,
            [
                {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                for path, content in files.items()
            ],
        )

    def answer_resolve(self, repo: str, path: str):
        self.hub.read.append(path)
        content = self.hub.files(repo).get(path)
        if content is None:
            return self.reply(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        commit = {"X-Repo-Commit": "0" * 40, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        return self.reply(200, content, commit)

    def answer_info(self, repo: str):
        siblings = [{"rfilename": path} for path in self.hub.repos.get(repo, [{}])[-1]]
        card = self.hub.cards.get(repo, {})
        self.reply(
            200,
            {"id": repo, "modelId": repo, "sha": "0" * 40, "siblings": siblings, "cardData": card},
        )


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run the Hub in threads of this process."""
    hub = Hub()
    handler = type("Handler", (Answer,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.done.set()
        server.shutdown()
        server.server_close()
