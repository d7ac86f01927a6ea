"""Headers that are too large or not allowed: a problem response, and the connection is closed. Through real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain, repeat
from pathlib import Path

import httpx
import pytest

from tests.support.http import connect, head, metric, response
from tests.support.images import encoded, random_image
from tests.support.processes import HTTP_WORKER, resident_bytes
from tests.support.server import Server
from tests.support.waiting import eventually

IMAGE = encoded(random_image())
LIMIT = 65_536  # max_header_bytes
START = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def connection(server: Server) -> Iterator[socket.socket]:
    with connect(server) as opened:
        yield opened


def send(connection: socket.socket, parts: Iterable[bytes]) -> int:
    """Until the server has closed the connection, or all is sent. Returns the number of bytes."""
    sent = 0
    with suppress(BrokenPipeError, ConnectionResetError):
        for part in parts:
            connection.sendall(part)
            sent += len(part)
    return sent


def bytes_until_closed(connection: socket.socket, start: bytes, part: bytes) -> int:
    """Sends ``part`` up to 200 MB."""
    return send(connection, chain([start], repeat(part, 200_000_000 // len(part))))


def rejected(connection: socket.socket) -> tuple[int, str]:
    """Status and code of a problem response, after which the connection is closed."""
    status, problem, received = response(connection)
    assert received.headers["content-type"] == "application/problem+json"
    assert received.headers["connection"] == "close"
    assert connection.recv(1) == b""
    return status, str(problem["code"])


def in_pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize(
    "header",
    [b"X: " + b"a" * LIMIT, b"a" * LIMIT + b": x", b"".join(b"X%d: %b\r\n" % (i, b"a" * 400) for i in range(180))],
    ids=["long value", "long name", "many bytes"],
)
@pytest.mark.parametrize("piece", [1_000_000, 4_096, 999])
def test_a_header_that_is_too_large_is_rejected_before_it_is_complete(
    connection: socket.socket, header: bytes, piece: int
) -> None:
    send(connection, in_pieces(START + header, piece))  # without its end
    assert rejected(connection) == (431, "headers_too_large")


def test_a_header_of_200_mb_is_read_up_to_the_limit(server: Server, connection: socket.socket) -> None:
    assert bytes_until_closed(connection, START + b"X: ", b"a" * 1_000_000) < 50_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_unfinished_headers_of_many_connections_are_bounded_together(server: Server) -> None:
    (worker,) = server.pids(HTTP_WORKER)
    before = resident_bytes(worker)
    with ExitStack() as stack:
        opened = [stack.enter_context(connect(server)) for _ in range(800)]
        for connection in opened:
            send(connection, [START + b"X: " + b"a" * 60_000])  # 48 MB together
        status, problem, _ = response(opened[-1])
        assert (status, problem["code"]) == (503, "too_many_connections")
        assert resident_bytes(worker) - before < 45_000_000
        with connect(server) as other:
            other.sendall(head(len(IMAGE)) + IMAGE)
            assert response(other)[0] == 200


@pytest.mark.parametrize("end", [b"\r\n", b""], ids=["complete", "not complete"])
def test_too_many_headers_are_rejected(connection: socket.socket, end: bytes) -> None:
    connection.sendall(START + b"X: y\r\n" * 202 + end)
    assert rejected(connection) == (431, "headers_too_large")


@pytest.mark.parametrize("end", [b" HTTP/1.1\r\nHost: x\r\n\r\n", b""], ids=["complete", "not complete"])
def test_a_target_that_is_too_long_is_rejected(connection: socket.socket, end: bytes) -> None:
    connection.sendall(b"GET /" + b"a" * 8_192 + end)
    assert rejected(connection) == (414, "uri_too_long")


@pytest.mark.parametrize("piece", [1_000_000, 999])
def test_headers_within_the_limits_are_accepted(connection: socket.socket, piece: int) -> None:
    """Also a body that makes the read with the headers larger than their limit."""
    large = [f"X{number}: {'a' * 300}" for number in range(190)]
    for request in (START + b"X: y\r\n" * 199 + b"\r\n", head(100_000, "/v1/classify", *large) + bytes(100_000)):
        send(connection, in_pieces(request, piece))
        status, _, received = response(connection)
        assert status in (200, 422)
        assert received.headers["connection"] is None


@pytest.mark.parametrize(
    "body",
    [
        b"3;x=" + b"a" * LIMIT + b"\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabc\r\n0\r\nX: " + b"a" * LIMIT + b"\r\n\r\n",
        b"3\r\nabc\r\n0\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"1;x\r\na\r\n" * 20 + b"3;x=" + b"a" * 2 * LIMIT,
    ],
    ids=["extension", "trailer", "trailers", "not complete"],
)
@pytest.mark.parametrize("piece", [1_000_000, 999])
def test_chunk_extensions_and_trailers_count_as_headers(connection: socket.socket, body: bytes, piece: int) -> None:
    send(connection, in_pieces(CHUNKED + body, piece))
    assert rejected(connection) == (431, "headers_too_large")


def test_many_small_chunks_are_not_headers(connection: socket.socket) -> None:
    chunks = b"".join(b"1\r\n%b\r\n" % IMAGE[index : index + 1] for index in range(len(IMAGE)))
    connection.sendall(CHUNKED + chunks * 20 + b"0\r\n\r\n")
    assert response(connection)[0] == 200  # Pillow ignores what follows the image


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        b"GET http://b/livez HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v1/classify HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /livez HTTP/1.1\r\nHost : a\r\n\r\n",
        b"\0\0\0\0",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
    ids=[
        "no Host",
        "two Hosts",
        "equal Hosts",
        "other host",
        "HTTP/1.0",
        "no Host for classify",
        "space",
        "0",
        "CONNECT",
    ],
)
def test_what_rfc_9112_forbids_is_rejected(connection: socket.socket, request_head: bytes) -> None:
    connection.sendall(request_head)
    assert rejected(connection) == (400, "bad_request")


@pytest.mark.parametrize("target", [b"http://A:80/livez", b"/livez"])
def test_an_absolute_uri_of_the_same_host_is_accepted(connection: socket.socket, target: bytes) -> None:
    connection.sendall(b"GET %b HTTP/1.1\r\nHost: a:80\r\n\r\n" % target)
    assert response(connection)[0] == 200


def test_http_1_0_needs_no_host(connection: socket.socket) -> None:
    connection.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
    assert response(connection)[0] == 200


@pytest.mark.parametrize("first", [head(len(IMAGE)) + IMAGE, START + b"\r\n"], ids=["classify", "application"])
def test_a_request_is_answered_before_the_malformed_one_behind_it(connection: socket.socket, first: bytes) -> None:
    connection.sendall(first + b"\0\0\0\0")
    received = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert received.count(b"HTTP/1.1 400 Bad Request") == 1


@pytest.mark.parametrize("count", [50, 100_000])
def test_pipelined_requests_are_bounded(connection: socket.socket, count: int) -> None:
    """Those that fit are answered, and the connection is closed behind them."""
    send(connection, [(START + b"\r\n") * count])
    received = b""
    while received.count(b"HTTP/1.1 200 OK") < min(count, 50):
        more = connection.recv(65_536)
        assert more, "the connection was closed before all responses"
        received += more
    if count > 50:
        received += b"".join(iter(lambda: connection.recv(65_536), b""))
        assert received.count(b"HTTP/1.1 200 OK") < 100
        assert received.count(b"HTTP/1.1 400 Bad Request") == 1


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
def test_an_upgrade_with_a_body_is_answered(connection: socket.socket, upgrade: str) -> None:
    connection.sendall(head(len(IMAGE), "/v1/classify", f"Upgrade: {upgrade}", "Connection: Upgrade") + IMAGE)
    assert response(connection)[0] == 200


def test_an_endless_body_is_read_up_to_a_limit(server: Server, connection: socket.socket) -> None:
    """Chunked, beyond max_body_bytes."""
    assert 2**25 < bytes_until_closed(connection, CHUNKED, b"10000\r\n" + bytes(65_536) + b"\r\n") < 2**27


def test_rejected_requests_are_counted_and_logged_in_one_line(server: Server, client: httpx.Client) -> None:
    def counts() -> list[float]:
        routes = (("other", "400"), ("other", "404"), ("/v1/classify", "405"))
        return [metric(client, "vitserve_requests_total", route=route, status=status) for route, status in routes]

    before, lines = counts(), len(server.log)
    for _ in range(50):
        with connect(server) as connection:
            connection.sendall(b"\0\0\0\0")
            assert rejected(connection)[0] == 400
    assert client.get("/missing").status_code == 404
    assert client.get("/v1/classify").status_code == 405
    eventually(lambda: counts() == [before[0] + 50, before[1] + 1, before[2] + 1], "each request is counted")

    def logged() -> list[str]:
        return [line for line in server.log[lines:] if "rejected requests: " in line]

    eventually(lambda: sum(int(line.split(" × 400")[0].split()[-1]) for line in logged()) >= 50, "each is logged")
    assert len(logged()) < 25
    assert "not valid HTTP/1.1 (from 127.0.0.1)" in logged()[-1]
    assert len(server.pids(HTTP_WORKER)) == 1
