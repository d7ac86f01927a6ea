"""A hub on loopback: as much of the Hugging Face hub's HTTP as huggingface_hub asks for when it downloads a model. It has no Xet."""

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
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by sha: the files by name
    branches: dict[str, str] = field(default_factory=dict)  # name → sha
    token: str | None = None  # gated: its files only for whoever brings this one


@dataclass(frozen=True)
class Cut:
    after: int  # bytes of the body
    reset: bool  # RST instead of FIN


class HubServer:
    """``with HubServer() as hub``: listens at ``hub.url``; leaving the block closes the port."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.cuts: dict[str, Cut] = {}  # by file name; each is used once
        self.sent: Counter[str] = Counter()  # bytes of the bodies of each file
        self.instead: tuple[int, bytes] | None = None  # status and page that answer everything
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
        """Makes these files what the branch stands for. Returns the commit's sha."""
        into = self.repositories.setdefault(repository, Repository())
        sha = hashlib.sha1(
            repr((sorted(into.commits), sorted((name, _etag(body)) for name, body in files.items()))).encode()
        ).hexdigest()
        into.commits[sha] = files
        into.branches[branch] = sha
        return sha

    def downloaded(self) -> list[str]:
        """Names of the files of which a body was asked for, each as often as it was."""
        return [
            RESOLVE.fullmatch(each.path)[3]
            for each in self.requests
            if each.method == "GET" and RESOLVE.fullmatch(each.path)
        ]  # type: ignore[index]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, unquote(path), self.headers["Range"]))
        if self.hub.instead:
            self._answer(*self.hub.instead)
        elif match := API.fullmatch(path):
            self._api(match[1], match[2], unquote(match[3] or "main"))
        elif match := RESOLVE.fullmatch(path):
            self._resolve(match[1], unquote(match[2]), unquote(match[3]))
        else:
            self._answer(404, b"{}")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _api(self, name: str, kind: str | None, revision: str) -> None:
        if (sha := self._sha(name, revision)) is None:
            return
        files = self.hub.repositories[name].commits[sha]
        if kind == "tree":
            tree = [
                {"type": "file", "path": each, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for each, body in files.items()
            ]
            self._answer(200, json.dumps(tree).encode())
        else:
            model = {"id": name, "modelId": name, "sha": sha, "siblings": [{"rfilename": each} for each in files]}
            self._answer(200, json.dumps(model).encode())

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if (sha := self._sha(name, revision)) is None:
            return
        repository = self.hub.repositories[name]
        if repository.token is not None and (said := self.headers["Authorization"]) != f"Bearer {repository.token}":
            return self._rejection(403 if said else 401, "GatedRepo", "Access to model is restricted")
        if file not in repository.commits[sha]:
            return self._rejection(404, "EntryNotFound", "Entry not found")
        self._file(file, repository.commits[sha][file], {"X-Repo-Commit": sha})

    def _file(self, file: str, body: bytes, headers: dict[str, str]) -> None:
        headers |= {"ETag": f'"{_etag(body)}"', "X-Linked-Size": str(len(body)), "Accept-Ranges": "bytes"}
        if (match := RANGE.fullmatch(self.headers["Range"] or "")) is None:
            return self._answer(200, body, headers, file)
        start, end = int(match[1]), int(match[2] or len(body) - 1)
        self._answer(206, body[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(body)}"}, file)

    def _sha(self, name: str, revision: str) -> str | None:
        """The commit; or None, and the request is answered."""
        repository = self.hub.repositories.get(name)
        sha = repository and repository.branches.get(revision, revision)
        if repository is None:
            self._rejection(404, "RepoNotFound", "Repository not found")
        elif sha not in repository.commits:
            self._rejection(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return sha
        return None

    def _rejection(self, status: int, code: str, message: str) -> None:
        self._answer(
            status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message}
        )

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, file: str | None = None) -> None:
        self.send_response(status)
        for key, value in (
            {"Content-Type": "application/octet-stream" if file else "application/json"} | (headers or {})
        ).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cuts.pop(file, None) if file else None
        said = body[: cut.after] if cut else body
        self.hub.sent[file or ""] += len(said)
        self.wfile.write(said)
        if cut:
            self._hang_up(cut.reset)

    def _hang_up(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # No time to linger and nobody else holding the socket: that is how closing sends RST. The server itself would first send FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()


def _etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
