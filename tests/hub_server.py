"""A real HTTP server on the loopback interface that speaks the protocol of the Hugging Face hub, as far as models go.

What it keeps is in memory. A commit is there whole or not at all, as on the hub; connections break where a test says so.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, OWNER = "hf_of_someone", "someone"
_OLDEST = "0" * 40


@dataclass
class Repo:
    """A model and its states, the newest last."""

    private: bool
    commits: list = field(default_factory=lambda: [(_OLDEST, {})])  # (sha, {path: bytes})

    def state(self, revision):
        """Sha and files of `main` or of a sha; None if there is no such revision."""
        found = [commit for commit in self.commits if commit[0] == revision]
        return self.commits[-1] if revision == "main" else found[0] if found else None


@contextmanager
def hub():
    """A server at work in a thread."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.requests, self.lock = {}, [], threading.Lock()
        self.down = False
        self.breaks = {}  # after so many bytes of a body, by the end of a path: of what is sent, or of a commit received

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name):
        """Those of a model's newest state."""
        return self.repos[name].commits[-1][1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.handle_one()

    do_HEAD = do_POST = do_GET

    def handle_one(self):
        if self.server.down:
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        limit = self.broken_after(path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.chunks(limit) if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if self.command == "POST" and limit is not None:
            self.close_connection = True
            return self.connection.close()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            return self.fail(401, message="Invalid credentials in Authorization header")
        for pattern, answer in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, *found.groups(), body=body, known=token == TOKEN)
        return self.fail(404, message=f"no {self.command} {path}")

    def chunks(self, limit):
        """The body of a request that says its length piece by piece."""
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
            if limit is not None and len(body) > limit:
                return body
        self.rfile.readline()
        return body

    def broken_after(self, path):
        return next((limit for end, limit in self.server.breaks.items() if path.endswith(end)), None)

    def create(self, body, known):
        if not known:
            return self.fail(401, message="Invalid username or password.")
        asked = json.loads(body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if not name.startswith(f"{OWNER}/"):
            return self.fail(403, message="You don't have the rights to create a model under this namespace")
        if name in self.server.repos:
            return self.fail(409, message="You already created this model repo", url=f"{self.server.url}/{name}")
        self.server.repos[name] = Repo(asked.get("visibility") == "private")
        return self.answer({"url": f"{self.server.url}/{name}", "name": name})

    def validate(self, body, known):
        head = json.loads(body)["content"].split("---")[1]
        good = isinstance(yaml.safe_load(head), dict)
        errors = [] if good else [{"message": "the metadata are no mapping"}]
        return self.answer({"errors": errors, "warnings": []}, 200 if good else 400)

    def preupload(self, name, revision, body, known):
        if self.state(name, revision, known) is None:
            return
        files = [
            {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]
        ]
        self.answer({"files": files})

    def commit(self, name, revision, body, known):
        if self.state(name, revision, known) is None:
            return
        files = dict(self.server.files(name))
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"], validate=True)
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
            else:
                assert line["key"] == "header", line["key"]
        with self.server.lock:
            commits = self.server.repos[name].commits
            sha = hashlib.sha1(body + commits[-1][0].encode()).hexdigest()
            commits.append((sha, files))
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def info(self, name, revision=None, body=b"", known=False):
        if (found := self.state(name, revision or "main", known)) is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            self.answer({"id": name, "sha": found[0], "private": self.server.repos[name].private, "siblings": siblings})

    def tree(self, name, revision, body, known):
        if (found := self.state(name, revision, known)) is not None:
            self.answer(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in found[1].items()
                ]
            )

    def resolve(self, name, revision, path, body, known):
        if (found := self.state(name, revision, known)) is None:
            return
        if path not in found[1]:
            return self.fail(404, code="EntryNotFound", message="Entry not found", commit=found[0])
        content = found[1][path]
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": found[0],
            "Accept-Ranges": "bytes",
        }
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.send(206 if first else 200, content[first:], headers)

    def state(self, name, revision, known):
        """Sha and files of a revision of a model; None, and the client is told so, if there is none."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not known):
            return self.fail(404 if known else 401, code="RepoNotFound", message="Repository not found")
        if (found := repo.state(revision)) is None:
            return self.fail(404, code="RevisionNotFound", message=f"Invalid rev id: {revision}")
        return found

    def answer(self, value, status=200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, status, message, code="", commit="", **more):
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.send(status, json.dumps({"error": message} | more).encode(), {k: v for k, v in headers.items() if v})

    def send(self, status, content, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.broken_after(unquote(urlsplit(self.path).path))
        self.wfile.write(content if limit is None else content[:limit])
        if limit is not None:
            self.close_connection = True

    def log_message(self, format, *args):
        pass


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{_NAME}/preupload/(\w+)", Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/(\w+)", Handler.commit),
    (rf"GET /api/models/{_NAME}", Handler.info),
    (rf"GET /api/models/{_NAME}/revision/([\w.-]+)", Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([\w.-]+)", Handler.tree),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([\w.-]+)/(.+)", Handler.resolve),
]
