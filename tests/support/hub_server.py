"""A hub on loopback with the part of the Hugging Face hub's HTTP API that downloading a model uses. Without Xet."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha → files by name
    branches: dict[str, str] = field(default_factory=dict)  # name → sha
    token: str | None = None  # gated: the token that downloads require


@dataclass(frozen=True)
class Cut:
    after_bytes: int  # of the body
    reset: bool  # RST instead of FIN


class HubServer:
    """``with HubServer() as hub``: listens at ``hub.url``; leaving the block closes the port."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.cuts: dict[str, Cut] = {}  # by file name; used once
        self.sent_bytes: Counter[str] = Counter()  # of bodies, by file name
        self.override: tuple[int, bytes] | None = None  # status and body of every response
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def commit(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commits the files to the branch. Returns the commit's sha."""
        target = self.repositories.setdefault(repository, Repository())
        contents = sorted((name, _etag(body)) for name, body in files.items())
        sha = hashlib.sha1(repr((sorted(target.commits), contents)).encode()).hexdigest()
        target.commits[sha] = files
        target.branches[branch] = sha
        return sha

    def downloaded(self) -> list[str]:
        """The file name of every GET request for a file."""
        paths = [RESOLVE.fullmatch(request.path) for request in self.requests if request.method == "GET"]
        return [match[3] for match in paths if match]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, unquote(path), self.headers["Range"]))
        if self.hub.override:
            self._respond(*self.hub.override)
        elif match := API.fullmatch(path):
            self._api(match[1], match[2], unquote(match[3] or "main"))
        elif match := RESOLVE.fullmatch(path):
            self._resolve(match[1], unquote(match[2]), unquote(match[3]))
        else:
            self._respond(404, b"{}")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _api(self, name: str, kind: str | None, revision: str) -> None:
        if (sha := self._sha(name, revision)) is None:
            return
        files = self.hub.repositories[name].commits[sha]
        if kind == "tree":
            tree = [
                {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for path, body in files.items()
            ]
            self._respond(200, json.dumps(tree).encode())
        else:
            model = {"id": name, "modelId": name, "sha": sha, "siblings": [{"rfilename": path} for path in files]}
            self._respond(200, json.dumps(model).encode())

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if (sha := self._sha(name, revision)) is None:
            return
        repository = self.hub.repositories[name]
        authorization = self.headers["Authorization"]
        if repository.token is not None and authorization != f"Bearer {repository.token}":
            return self._reject(403 if authorization else 401, "GatedRepo", "Access to model is restricted")
        if file not in repository.commits[sha]:
            return self._reject(404, "EntryNotFound", "Entry not found")
        self._file(file, repository.commits[sha][file], {"X-Repo-Commit": sha})

    def _file(self, file: str, body: bytes, headers: dict[str, str]) -> None:
        headers |= {"ETag": f'"{_etag(body)}"', "X-Linked-Size": str(len(body)), "Accept-Ranges": "bytes"}
        if (match := RANGE.fullmatch(self.headers["Range"] or "")) is None:
            return self._respond(200, body, headers, file)
        start, end = int(match[1]), int(match[2] or len(body) - 1)
        self._respond(206, body[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(body)}"}, file)

    def _sha(self, name: str, revision: str) -> str | None:
        """The commit; None after responding with an error."""
        repository = self.hub.repositories.get(name)
        sha = repository and repository.branches.get(revision, revision)
        if repository is None:
            self._reject(404, "RepoNotFound", "Repository not found")
        elif sha not in repository.commits:
            self._reject(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return sha
        return None

    def _reject(self, status: int, code: str, message: str) -> None:
        self._respond(
            status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message}
        )

    def _respond(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, file: str | None = None
    ) -> None:
        self.send_response(status)
        content_type = "application/octet-stream" if file else "application/json"
        for key, value in ({"Content-Type": content_type} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cuts.pop(file, None) if file else None
        sent = body[: cut.after_bytes] if cut else body
        self.hub.sent_bytes[file or ""] += len(sent)
        self.wfile.write(sent)
        if cut:
            self._close_connection(cut.reset)

    def _close_connection(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # Closing a socket without lingering sends RST. The server itself would send FIN first.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()


def _etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
