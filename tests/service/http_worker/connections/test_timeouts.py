"""Clients that send nothing, send too slowly, or do not read. A server with short limits closes their connections."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.support.http import connect, head, metric, response
from tests.support.images import encoded, random_image
from tests.support.server import Server, start_server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle

IMAGE = encoded(random_image())
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
LIMITS = {
    "first-request-seconds": "0.3",
    "header-seconds": "0.3",
    "body-gap-seconds": "0.4",
    "body-seconds": "1.2",
    "keep-alive-seconds": "0.4",
}


@pytest.fixture(scope="module")
def strict(bundle: Bundle) -> Iterator[Server]:
    options = [word for name, value in LIMITS.items() for word in (f"--{name}", value)]
    running = start_server("--bundle", str(bundle.path), *options)
    yield running
    assert running.stop() == 0


@pytest.fixture
def connection(strict: Server) -> Iterator[socket.socket]:
    with connect(strict) as opened:
        yield opened


def send_forever(connection: socket.socket, data: bytes) -> None:
    while True:
        connection.sendall(data)


def drip(connection: socket.socket, data: bytes, pause_seconds: float = 0.1) -> None:
    """Sends byte by byte, until the server has responded."""
    connection.settimeout(pause_seconds)
    for index in range(len(data)):
        connection.sendall(data[index : index + 1])
        try:
            if connection.recv(1, socket.MSG_PEEK) is not None:
                break
        except TimeoutError:
            continue
    connection.settimeout(60)


@pytest.mark.parametrize("sent", [b"", b"\r\n", LIVEZ], ids=["nothing", "an empty line", "a request"])
def test_a_connection_without_a_request_is_closed(connection: socket.socket, sent: bytes) -> None:
    connection.sendall(sent)
    if sent == LIVEZ:
        assert response(connection)[0] == 200
    assert connection.recv(1) == b""


@pytest.mark.parametrize("sent", [LIVEZ[:1], LIVEZ[:-2], head(10)[:-2]], ids=["a byte", "GET", "POST"])
def test_headers_that_are_not_completed_get_408(connection: socket.socket, sent: bytes) -> None:
    connection.sendall(sent)
    status, problem, received = response(connection)
    assert (status, problem["code"], received.headers["connection"]) == (408, "request_timeout", "close")
    assert problem["detail"] == "the headers did not arrive within 0.3 s"
    assert connection.recv(1) == b""


def test_headers_sent_byte_by_byte_get_408(connection: socket.socket) -> None:
    drip(connection, LIVEZ)
    assert response(connection)[0] == 408


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/classify?timeout_ms=500", "/v1/admin/reload", "/missing"])
@pytest.mark.parametrize("rest", [b"", b"a"], ids=["no byte", "a byte"])
def test_a_body_that_stops_does_not_hold_its_connection(connection: socket.socket, path: str, rest: bytes) -> None:
    """Routes that do not read the body have responded already."""
    connection.sendall(head(100, path) + rest)
    status, problem, _ = response(connection)
    if path.startswith("/v1/classify"):
        assert (status, problem["code"]) == (408, "request_timeout")
        assert problem["detail"] == "no byte of the body arrived for 0.4 s"
    else:
        assert status in (403, 404)
    assert connection.recv(1) == b""


def test_a_pipelined_body_that_stops_ends_after_the_first_response(connection: socket.socket) -> None:
    connection.sendall(head(len(IMAGE)) + IMAGE + head(100) + b"a")
    received = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert received.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in received


def test_a_body_sent_byte_by_byte_gets_408(connection: socket.socket) -> None:
    connection.sendall(head(1000))
    drip(connection, bytes(1000))
    status, problem, _ = response(connection)
    assert (status, problem["detail"]) == (408, "the request did not arrive within 1.2 s")


def test_a_slow_upload_is_no_overload(server: Server) -> None:
    """It takes longer than the deadline, which counts from the end of the body, and than the shortest gap.

    The clock ticks while the body arrives.
    """
    with connect(server) as connection:
        connection.sendall(head(len(IMAGE), "/v1/classify?timeout_ms=100"))
        for start in range(0, len(IMAGE), len(IMAGE) // 32):
            time.sleep(0.05)  # the client's link
            connection.sendall(IMAGE[start : start + len(IMAGE) // 32])
        assert response(connection)[0] == 200


def test_a_client_that_does_not_read_is_disconnected(strict: Server) -> None:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = strict.url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    connection.settimeout(60)
    with connection, pytest.raises((ConnectionResetError, BrokenPipeError)):
        send_forever(connection, b"GET /v1/model HTTP/1.1\r\nHost: x\r\n\r\n" * 20)


def test_timeouts_are_counted_and_the_service_goes_on(strict: Server) -> None:
    with httpx.Client(base_url=strict.url, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        for path, route in ((b"/v1/classify", "/v1/classify"), (b"/livez", "other")):
            before = metric(client, "vitserve_requests_total", route=route, status="408")
            with connect(strict) as connection:
                connection.sendall(head(10) if path == b"/v1/classify" else LIVEZ[:10])
                assert response(connection)[0] == 408
            eventually(
                lambda route=route, before=before: (  # type: ignore[misc]
                    metric(client, "vitserve_requests_total", route=route, status="408") > before
                ),
                "it is counted",
            )
    assert "Traceback" not in "".join(strict.log)
    strict.wait_for("rejected requests: ")
