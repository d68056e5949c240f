"""A Hugging Face Hub in miniature, on loopback, for the real `huggingface_hub` client.

It holds repositories of models with commits, branches, tags and large files, serves and takes them by the Hub's own
protocol, and fails on demand. `Client` is a process that talks to it: the variables that it is started with decide
where `huggingface_hub` looks, which reads them once, when it is imported.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_secretThatMustNeverBeSeen"

Files = dict[str, bytes]


@dataclass
class Repository:
    """A model repository: commits in order, each with all of its files."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files) -> str:
        parent = self.refs.get("main", "")
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())
        sha = hashlib.sha1(json.dumps([parent, len(self.commits), content]).encode()).hexdigest()
        self.commits[sha] = files
        self.refs["main"] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = (self.refs | self.tags).get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class Fault:
    """What goes wrong with requests such as `GET /cdn/` for some times.

    Attributes:
        request: How the request's method and path begin.
        status: Answered instead of the right thing; 0 to answer rightly.
        headers: Of that answer.
        cut: Bytes of the body after which the connection breaks.
        times: How often.
    """

    request: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    times: int = 1


class HubServer:
    """Repositories, what was asked of them, and what is to go wrong."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256: what the Hub keeps outside git
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = Lock()
        self.url = ""
        self.leaks: list[str] = []  # requests that showed the token to the host of large files, another than the Hub's

    @property
    def cdn(self) -> str:
        """Where large files are: elsewhere, as far as a client can tell."""
        return f"{self.url.replace('127.0.0.1', 'localhost')}/cdn"

    def publish(self, repo: str, files: Files, *, private: bool = False) -> str:
        """Put a commit into a repository, as if it had been pushed; return its hash."""
        repository = self.repositories.setdefault(repo, Repository(private))
        self.large |= {hashlib.sha256(data).hexdigest(): data for path, data in files.items() if is_large(path)}
        return repository.commit(files)

    def asked(self, request: str) -> list[str]:
        """The requests so far that begin like this one."""
        return [each for each in self.requests if each.startswith(request)]

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            fault = next((each for each in self.faults if each.times and request.startswith(each.request)), None)
            if fault is not None:
                fault.times -= 1
            return fault


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entity_tag(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if is_large(path) else git_hash(data)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, and the second would wait for an answer
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the tests read `HubServer.requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {self.path}"
        self.hub.requests.append(request + (f" {span}" if (span := self.headers.get("Range")) else ""))
        fault = self.hub.fault(request)
        self.cut = fault.cut if fault is not None else None
        if fault is not None and fault.status:
            return self._send(fault.status, b"{}", fault.headers)
        for pattern, handle in _ROUTES:
            if match := re.fullmatch(pattern, request):
                return handle(self, **match.groupdict())
        return self._send(404, b"{}")

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, size: int = -1) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body) if size < 0 else size)} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut is None or self.cut >= len(body):
            self.wfile.write(body)
        else:
            self.wfile.write(body[: self.cut])
            self.close_connection = True

    def _json(self, data: object) -> None:
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str, status: int = 404) -> None:
        self._send(status, b'{"error": "none"}', {"X-Error-Code": code, "X-Error-Message": code})

    def _repository(self, repo: str, *, write: bool = False) -> Repository | None:
        """The repository, if it may be seen; otherwise the answer is sent."""
        repository = self.hub.repositories.get(repo)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or ((repository.private or write) and not known):
            self._missing("RepoNotFound", 404 if known else 401)
            return None
        return repository

    def _create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b'{"error": "Invalid username or password."}')
        if asked["organization"] == "somebody-else":
            return self._send(403, b'{"error": "forbidden"}')
        about = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repositories:
            return self._send(409, json.dumps({"error": "You already created this model repo"} | about).encode())
        self.hub.repositories[repo] = Repository(private=asked.get("visibility") == "private")
        self.hub.repositories[repo].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._json(about)

    def _validate(self) -> None:
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            return self._send(400, b'{"errors": [{"message": "no metadata"}], "warnings": []}')
        return self._json({"errors": [], "warnings": []})

    def _info(self, repo: str, revision: str | None = None) -> None:
        if (repository := self._repository(repo)) is None:
            return None
        sha = repository.resolve(revision or "main")
        if sha is None:
            return self._missing("RevisionNotFound")
        files = [{"rfilename": path} for path in repository.commits[sha]]
        return self._json({"id": repo, "sha": sha, "private": repository.private, "siblings": files, "tags": []})

    def _tree(self, repo: str, revision: str) -> None:
        if (repository := self._repository(repo)) is None:
            return None
        listed = []
        for path, data in repository.commits[repository.resolve(revision) or ""].items():
            large = {"lfs": {"oid": entity_tag(path, data), "size": len(data), "pointerSize": 134}}
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
            listed.append(entry | (large if is_large(path) else {}))
        return self._json(listed)

    def _list_refs(self, repo: str) -> None:
        if (repository := self._repository(repo)) is None:
            return None
        named = {
            kind: [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]
            for kind, refs in (("branches", repository.refs), ("tags", repository.tags))
        }
        return self._json(named | {"converts": []})

    def _tag(self, repo: str, revision: str) -> None:
        if (repository := self._repository(repo, write=True)) is None:
            return None
        tag = json.loads(self.body)["tag"]
        if tag in repository.tags:
            return self._send(409, b'{"error": "Tag reference exists already"}')
        repository.tags[tag] = repository.resolve(revision) or ""
        return self._json({})

    def _preupload(self, repo: str, revision: str) -> None:
        if (repository := self._repository(repo, write=True)) is None:
            return None
        there = repository.commits[repository.resolve(revision) or ""]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": entity_tag(file["path"], there[file["path"]]) if file["path"] in there else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        return self._json({"files": modes})

    def _batch(self, repo: str) -> None:
        objects = []
        for item in json.loads(self.body)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/upload/{item['oid']}"}}
            objects.append(item if item["oid"] in self.hub.large else item | {"actions": action})
        return self._json({"transfer": "basic", "objects": objects})

    def _upload(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            return self._send(400, b'{"error": "not what was announced"}')
        self.hub.large[digest] = self.body
        return self._send(200)

    def _commit(self, repo: str, revision: str) -> None:
        if (repository := self._repository(repo, write=True)) is None:
            return None
        files = dict(repository.commits[repository.resolve(revision) or ""])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        sha = repository.commit(files)
        return self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        if (repository := self._repository(repo)) is None:
            return None
        sha = repository.resolve(revision)
        if sha is None:
            return self._missing("RevisionNotFound")
        if path not in repository.commits[sha]:
            return self._missing("EntryNotFound")
        data = repository.commits[sha][path]
        tag = entity_tag(path, data)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{tag}"'}
        if not is_large(path):
            return self._send(200, data, headers)
        headers |= {"X-Linked-ETag": f'"{tag}"', "X-Linked-Size": str(len(data)), "Location": f"{self.hub.cdn}/{tag}"}
        return self._send(302, b"", headers)

    def _cdn(self, digest: str) -> None:
        if "Authorization" in self.headers:
            self.hub.leaks.append(self.path)
        data = self.hub.large[digest]
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if span is None:
            return self._send(200, data, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})
        start = int(span[1])
        return self._send(206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})


_NAME = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    ("POST /api/repos/create", _Handler._create),
    ("POST /api/validate-yaml", _Handler._validate),
    (f"GET /api/models/{_NAME}", _Handler._info),
    (f"GET /api/models/{_NAME}/revision/(?P<revision>.+)", _Handler._info),
    (f"GET /api/models/{_NAME}/tree/(?P<revision>.+)", _Handler._tree),
    (f"GET /api/models/{_NAME}/refs", _Handler._list_refs),
    (f"POST /api/models/{_NAME}/tag/(?P<revision>.+)", _Handler._tag),
    (f"POST /api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler._preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT /upload/(?P<digest>[0-9a-f]+)", _Handler._upload),
    (f"POST /api/models/{_NAME}/commit/(?P<revision>.+)", _Handler._commit),
    (f"(?:GET|HEAD) /{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._resolve),
    ("(?:GET|HEAD) /cdn/(?P<digest>[0-9a-f]+)", _Handler._cdn),
)


@contextmanager
def serve() -> Iterator[HubServer]:
    """Run a Hub until the block is left."""
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# What the process of a client does: run what it is sent, line by line, and say what came of it. Nothing waits in it:
# `sleeps` holds how long `huggingface_hub` would have.
_WORKER = """
import json, os, sys, time, traceback
sleeps = []
time.sleep = sleeps.append
names = {"sleeps": sleeps}
replies, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    code, values = json.loads(line)
    sleeps.clear()
    try:
        names.update(values)
        exec(code, names)
        reply = {"result": names.pop("result", None)}
    except BaseException as error:
        reply = {"error": [type(error).__name__, str(error)]}
        traceback.print_exc()
    sys.stderr.flush()
    print(json.dumps(reply), file=replies, flush=True)
os._exit(0)  # to take apart what torch has built would take seconds
"""


class ClientError(Exception):
    """What was raised in the client's process.

    Attributes:
        kind: Name of its class.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Client:
    """A Python process beside this one, whose `huggingface_hub` takes a server for the Hub."""

    def __init__(self, home: Path, url: str, **variables: str) -> None:
        settings = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        command, environment = [sys.executable, "-c", _WORKER], inherited | settings | variables
        self._output = home / "output.txt"
        with self._output.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, stderr=file, text=True)

    @property
    def output(self) -> str:
        """All that it has printed, tracebacks too."""
        return self._output.read_text()

    def run(self, code: str, **values: object) -> Any:
        """Execute some lines there, where these values have their names; return what the lines call `result`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([code, values], default=str), file=self.process.stdin, flush=True)
        reply = json.loads(self.process.stdout.readline())
        if "error" in reply:
            raise ClientError(*reply["error"])
        return reply["result"]

    def refusal(self, code: str, **values: object) -> str:
        """Execute some lines there that end in an error for the user; return its one line."""
        with pytest.raises(ClientError) as caught:
            self.run(code, **values)
        assert caught.value.kind == "WeightsError"
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def offline(self, switch: bool) -> None:
        """Forbid `huggingface_hub` to ask the Hub, as HF_HUB_OFFLINE does when the process begins."""
        reset = "getattr(utils, 'reset_sessions', lambda: None)()"  # until 1.0, a session remembers it
        code = f"from huggingface_hub import constants, utils\nconstants.HF_HUB_OFFLINE = switch\n{reset}"
        self.run(code, switch=switch)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
