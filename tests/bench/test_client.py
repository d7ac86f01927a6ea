"""The load generator's client: complete responses however they are split, and errors for all others."""

from __future__ import annotations

import asyncio
import itertools

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.images import encoded, random_image
from tests.support.stub_server import RESPONSE, StubServer, listening
from vitserve.bench.client import Client, ConnectionGoneError, NoResponseError, Response, ResponseReader
from vitserve.bench.request import EncodedImage, raw

REQUEST = raw("/", EncodedImage(encoded(random_image(60, 45), "JPEG"), "image/jpeg"))


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4), st.data())
def test_split_responses_are_read_completely(bodies: list[bytes], data: st.DataObject) -> None:
    received = b""
    for body in bodies:
        received += b"HTTP/1.1 100 Continue\r\n\r\n" if data.draw(st.booleans()) else b""
        if data.draw(st.booleans()):
            parts = (body[:7], body[7:]) if len(body) > 7 else (body,)
            chunks = [b"%x;note=1\r\n%b\r\n" % (len(part), part) for part in parts if part]
            received += b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            received += b"".join(chunks) + b"0\r\nTrailer: 1\r\n\r\n"
        else:
            received += b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(received)), max_size=8)))
    reader = ResponseReader()
    responses: list[Response] = []
    for start, end in itertools.pairwise([0, *cuts, len(received)]):
        responses += reader.feed(received[start:end])
    assert [response.body for response in responses] == bodies
    assert all(response.keep_alive for response in responses)


@given(st.binary(min_size=1, max_size=60))
def test_no_response_before_the_last_byte(body: bytes) -> None:
    for head, end in (
        (b"Content-Length: %d\r\n\r\n%b" % (len(body), body), b""),
        (b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(body), body), b"0\r\n\r\n"),
    ):
        reader = ResponseReader()
        received = b"HTTP/1.1 200 OK\r\n" + head + end
        assert reader.feed(received[:-1]) == []
        assert reader.end() is None, "a body with a length does not end with the connection"
        assert reader.feed(received[-1:]) == [Response(200, body, True)]


def test_a_body_without_length_ends_with_the_connection() -> None:
    reader = ResponseReader()
    assert reader.feed(b"HTTP/1.0 200 OK\r\n\r\nwhole ") == []
    assert reader.feed(b"body") == []
    assert reader.end() == Response(200, b"whole body", False)


@pytest.mark.parametrize("status", [204, 304])
def test_a_status_without_body_needs_no_length(status: int) -> None:
    assert ResponseReader().feed(b"HTTP/1.1 %d X\r\n\r\n" % status) == [Response(status, b"", True)]


@pytest.mark.parametrize(
    "received",
    [
        b"no HTTP\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nsize\r\n",
        RESPONSE + b"more than the length",
    ],
)
def test_malformed_responses_are_errors(received: bytes) -> None:
    with pytest.raises(httptools.HttpParserError):
        ResponseReader().feed(received)


async def send_to(server: StubServer, requests: int = 1, timeout_seconds: float = 30.0) -> list[Response]:
    async with listening(server) as port:
        client = Client("127.0.0.1", port, timeout_seconds)
        try:
            return [await client.send(REQUEST) for _ in range(requests)]
        finally:
            client.close()


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (b"no HTTP\r\n\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 9\r\n\r\nshort", "disconnected"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "timeout"),
    ],
)
def test_incomplete_and_malformed_responses_are_named(response: bytes, reason: str) -> None:
    with pytest.raises(NoResponseError, match=reason):
        asyncio.run(send_to(StubServer(response), timeout_seconds=30.0 if reason != "timeout" else 0.05))


def test_an_idle_connection_is_used_again() -> None:
    server = StubServer()
    assert asyncio.run(send_to(server, requests=3)) == [Response(200, b"{}", True)] * 3
    assert len(server.connections) == 1


def test_a_closed_connection_is_not_used_again() -> None:
    server = StubServer(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
    assert asyncio.run(send_to(server, requests=3)) == [Response(200, b"{}", False)] * 3
    assert len(server.connections) == 3


def test_a_port_without_a_server_is_reported() -> None:
    async def scenario() -> None:
        async with listening(StubServer()) as port:
            pass
        await Client("127.0.0.1", port).send(REQUEST)

    with pytest.raises(ConnectionGoneError, match="no server is listening on"):
        asyncio.run(scenario())
