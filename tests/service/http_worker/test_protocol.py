"""HTTP/1.1 through raw sockets: bodies in pieces, pipelining, and responses that are sent before the body is read."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.support.http import connect, head, metric, response
from tests.support.images import encoded, random_image
from tests.support.server import Server, start_server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle

IMAGE = encoded(random_image())
REJECTED = "/v1/classify?timeout_ms=1"  # no image can be classified within a millisecond
ALLOWED_BYTES = 1_048_576  # of a rejected body, after which the connection is kept


@pytest.fixture(scope="module")
def slow(slow_bundle: Bundle) -> Iterator[Server]:
    """A server whose network takes more than a millisecond for an image."""
    running = start_server("--bundle", str(slow_bundle.path))
    yield running
    assert running.stop() == 0


@pytest.fixture
def rejecting(slow: Server) -> Iterator[socket.socket]:
    with connect(slow) as opened:
        yield opened


@pytest.fixture
def connection(server: Server) -> Iterator[socket.socket]:
    with connect(server) as opened:
        yield opened


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_request_may_arrive_in_pieces(connection: socket.socket, size: int) -> None:
    request = head(len(IMAGE)) + IMAGE
    for start in range(0, len(request), size):
        connection.sendall(request[start : start + size])
    assert response(connection)[0] == 200


def test_a_body_may_be_chunked(connection: socket.socket) -> None:
    connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    for start in range(0, len(IMAGE), 1000):
        chunk = IMAGE[start : start + 1000]
        connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    connection.sendall(b"0\r\n\r\n")
    assert response(connection)[0] == 200


def test_pipelined_requests_are_answered_in_order(connection: socket.socket) -> None:
    """Of both kinds: handled by the protocol and by the application."""
    classify, other = head(len(IMAGE)) + IMAGE, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"
    connection.sendall(classify + other + classify + head(3) + b"abc" + other)
    stream = connection.makefile("rb")
    statuses = []
    for _ in range(5):
        statuses.append(int(stream.readline().split()[1]))
        length = 0
        while (line := stream.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        stream.read(length)
    assert statuses == [200, 200, 200, 422, 200]


def test_http_1_0_closes_the_connection(connection: socket.socket) -> None:
    connection.sendall(head(len(IMAGE)).replace(b"HTTP/1.1", b"HTTP/1.0") + IMAGE)
    status, _, received = response(connection)
    assert (status, received.headers["connection"]) == (200, "close")
    assert connection.recv(1) == b""


def test_a_body_is_sent_after_100_continue(connection: socket.socket) -> None:
    connection.sendall(head(len(IMAGE), "/v1/classify", "Expect: 100-continue"))
    assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(IMAGE)
    assert response(connection)[0] == 200


def test_a_rejected_client_gets_no_100_continue(rejecting: socket.socket) -> None:
    rejecting.sendall(head(len(IMAGE), REJECTED, "Expect: 100-continue"))
    status, _, received = response(rejecting)
    assert (status, received.headers["connection"]) == (429, "close")


@pytest.mark.parametrize("content_type", ["image/png", "multipart/form-data; boundary=x", "application/json"])
@pytest.mark.parametrize("priority", ["0", "9"])
def test_a_request_that_cannot_be_in_time_is_rejected_from_its_headers(
    slow: Server, rejecting: socket.socket, content_type: str, priority: str
) -> None:
    with httpx.Client(base_url=slow.url) as client:
        before = [metric(client, "vitserve_images_shed_total"), metric(client, "vitserve_images_total")]
        request = head(ALLOWED_BYTES, REJECTED, f"Vitserve-Priority: {priority}")
        rejecting.sendall(request.replace(b"image/png", content_type.encode()))
        status, problem, received = response(rejecting)  # although no byte of the body has been sent
        assert (status, problem["code"], received.headers["retry-after"]) == (429, "overloaded", "1")
        rejecting.sendall(b"x" * ALLOWED_BYTES + head(len(IMAGE)) + IMAGE)
        assert response(rejecting)[0] == 200, "the rejected body was dropped, and the connection is kept"
        after = [metric(client, "vitserve_images_shed_total"), metric(client, "vitserve_images_total")]
    assert after[0] >= before[0] + 1
    assert after[1] >= before[1] + 2


@pytest.mark.parametrize("length", [ALLOWED_BYTES + 1, 10**9])
def test_after_a_large_rejected_body_the_connection_is_closed(rejecting: socket.socket, length: int) -> None:
    """The client sends a part of the body before it reads the response: the connection is not reset."""
    rejecting.sendall(head(length, REJECTED) + b"x" * min(length, 5_000_000))
    status, _, received = response(rejecting)
    assert received.headers["connection"] == "close"
    assert status == (429 if length <= 33_554_432 else 413)
    assert rejecting.recv(1) == b""


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        (("Vitserve-Priority: 11",), "/v1/classify", 400),
        ((), "/v1/classify?topk=1", 400),
        ((), "/v1/classify?timeout_ms=0", 400),
    ],
    ids=["priority", "unknown option", "timeout"],
)
def test_an_invalid_head_is_rejected_before_the_body(
    connection: socket.socket, headers: tuple[str, ...], path: str, status: int
) -> None:
    connection.sendall(head(1000, path, *headers))
    assert response(connection)[0] == status


def test_a_disconnect_frees_the_slots(server: Server, client: httpx.Client) -> None:
    before = metric(client, "vitserve_requests_total", route="/v1/classify", status="499")
    for sent in (head(len(IMAGE)) + IMAGE[:10], head(len(IMAGE)) + IMAGE):
        with connect(server) as connection:
            connection.sendall(sent)
    eventually(lambda: metric(client, "vitserve_images_in_flight") == 0, "no image in flight")
    eventually(
        lambda: metric(client, "vitserve_requests_total", route="/v1/classify", status="499") > before,
        "a request without its body is counted",
    )


def test_an_upgrade_to_http_2_is_ignored(connection: socket.socket) -> None:
    """Java's HttpClient and curl --http2 offer it with their first request, and continue with HTTP/1.1."""
    headers = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
    connection.sendall(head(len(IMAGE), "/v1/classify", *headers) + IMAGE)
    assert response(connection)[0] == 200


def unexpected(lines: list[str]) -> list[str]:
    """Log lines apart from the one that counts rejected requests, at most once a second."""
    return [line for line in lines if "rejected requests: " not in line]


@pytest.mark.parametrize("headers", ["", "Upgrade: h2c\r\nConnection: Upgrade\r\n", "Content-Length: 3\r\n"])
def test_a_tunnel_is_rejected_and_logs_nothing(server: Server, connection: socket.socket, headers: str) -> None:
    lines = len(server.log)
    connection.sendall(f"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n{headers}\r\nabc".encode())
    assert connection.recv(65536).startswith(b"HTTP/1.1 400")
    with connect(server) as other:  # when it is answered, the log of the first request has been written
        other.sendall(head(len(IMAGE)) + IMAGE)
        assert response(other)[0] == 200
    assert unexpected(server.log[lines:]) == []


@pytest.mark.parametrize(
    "tail", [b"\0" * 100, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 3], ids=["garbage", "requests"]
)
def test_data_after_a_closing_request_is_ignored(server: Server, connection: socket.socket, tail: bytes) -> None:
    lines = len(server.log)
    connection.sendall(head(len(IMAGE), "/v1/classify", "Connection: close") + IMAGE + tail)
    assert connection.recv(65536).startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))
    with connect(server) as other:
        other.sendall(head(len(IMAGE)) + IMAGE)
        assert response(other)[0] == 200
    assert not [line for line in server.log[lines:] if "Traceback" in line or "Error" in line]
