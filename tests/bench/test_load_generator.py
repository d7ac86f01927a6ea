"""The load generator in C, against a server that answers in every way a server can."""

from __future__ import annotations

import shutil
import socketserver
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from benchmarks.http.load import load_generator
from benchmarks.http.load.load_generator import Load
from benchmarks.processes import free_port
from vitserve.bench.load import LoadResult
from vitserve.bench.request import EncodedImage, get, raw

pytestmark = pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("cc")), reason="no C compiler is installed")

LARGE_BODY = 300_000  # bytes; more than a socket's buffer and the generator's


class ScriptedHandler(socketserver.StreamRequestHandler):
    """Answers by the path of the request."""

    server: ScriptedServer

    def handle(self) -> None:
        self.server.connections += 1
        with suppress(ConnectionError):
            while line := self.rfile.readline():
                path = line.split()[1].decode()
                headers = self.read_headers()
                if path != "/reject":
                    self.rfile.read(int(headers.get("content-length", 0)))
                self.server.paths.append(path)
                if not self.respond(path):
                    return

    def read_headers(self) -> dict[str, str]:
        lines = iter(lambda: self.rfile.readline().decode().strip(), "")
        return dict(line.lower().split(": ", 1) for line in lines)

    def respond(self, path: str) -> bool:
        """Returns whether the connection stays open."""
        if path == "/silent":
            self.server.stopped.wait()
        elif path == "/pieces":
            for byte in b"HTTP/1.1 200 OK\r\nserver: x\r\ncontent-length: 3\r\n\r\nabc":
                self.wfile.write(bytes([byte]))
        elif path == "/large":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LARGE_BODY + bytes(LARGE_BODY))
        elif path == "/unlimited":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        elif path == "/close":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        elif path == "/reject":
            self.wfile.write(b"HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
        elif path != "/drop":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        return path not in ("/silent", "/close", "/reject", "/drop")


class ScriptedServer(socketserver.ThreadingTCPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        self.connections = 0
        self.paths: list[str] = []
        self.stopped = threading.Event()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield started
        started.stopped.set()
        started.shutdown()
        thread.join()


def outcomes(result: LoadResult) -> set[str]:
    return {sample.outcome for sample in result.samples}


@pytest.mark.parametrize(
    ("path", "outcome"),
    [
        ("/ok", "200"),
        ("/pieces", "200"),
        ("/large", "200"),
        ("/close", "200"),
        ("/reject", "429"),
        ("/drop", "connection lost"),
        ("/silent", "gave up"),
    ],
)
def test_every_request_has_an_outcome(server: ScriptedServer, path: str, outcome: str) -> None:
    request = raw(path, EncodedImage(b"x" * 200_000 if path == "/reject" else b"x", "image/jpeg"))
    give_up = 0.1 if path == "/silent" else 60.0
    result = load_generator.run(server.port, Load([request], 0.2, warm_up=0.1, connections=2, give_up=give_up))
    assert outcomes(result) == {outcome}
    assert len(result.samples) >= 2
    assert all(sample.planned <= sample.sent <= sample.ended for sample in result.samples)


def test_connections_are_kept_or_not(server: ScriptedServer) -> None:
    kept = load_generator.run(server.port, Load([get("/ok")], 0.2, warm_up=0.0, connections=3))
    assert server.connections == 3
    assert len(kept.samples) >= 3
    server.connections = 0
    new = load_generator.run(server.port, Load([get("/ok")], 0.2, warm_up=0.0, connections=3, reconnect=True))
    assert server.connections == len(new.samples) >= 3


def test_requests_are_sent_in_turn(server: ScriptedServer) -> None:
    load_generator.run(server.port, Load([get("/a"), get("/b"), get("/c")], 0.1, warm_up=0.0))
    turns = ["/a", "/b", "/c"] * len(server.paths)
    assert server.paths == turns[: len(server.paths)]


def test_arrivals_of_an_open_loop_do_not_wait_for_responses(server: ScriptedServer) -> None:
    load = Load([get("/silent")], 0.5, warm_up=0.1, rate=200.0, connections=0, give_up=0.2)
    result = load_generator.run(server.port, load)
    assert outcomes(result) == {"gave up"}
    assert 60 < len(result.samples) < 180, "Poisson with a mean of 120: a probability of 1e-7"


def test_arrivals_follow_the_seed_and_the_distribution(server: ScriptedServer) -> None:
    def planned(seed: int, uniform: bool = False) -> list[float]:
        load = Load([get("/ok")], 0.3, warm_up=0.0, rate=200.0, seed=seed, uniform=uniform)
        moments = sorted(sample.planned for sample in load_generator.run(server.port, load).samples)
        assert len(moments) > 40
        return [moment - moments[0] for moment in moments[:40]]  # the last one may fall on the end of the interval

    assert planned(1) == pytest.approx(planned(1), abs=1e-5)
    assert planned(1)[:10] != pytest.approx(planned(2)[:10], abs=1e-5)
    assert planned(1, uniform=True) == pytest.approx([number / 200 for number in range(40)], abs=1e-5)


def test_a_server_that_does_not_listen_is_reported() -> None:
    with pytest.raises(RuntimeError, match="the server does not accept connections"):
        load_generator.run(free_port(), Load([get("/")], 0.1, warm_up=0.0))
    load = Load([get("/")], 0.1, warm_up=0.0, rate=100.0, reconnect=True)
    assert outcomes(load_generator.run(free_port(), load)) == {"not connected"}


def test_a_response_without_a_length_is_reported(server: ScriptedServer) -> None:
    with pytest.raises(RuntimeError, match="a response has no Content-Length"):
        load_generator.run(server.port, Load([get("/unlimited")], 0.1, warm_up=0.0))
