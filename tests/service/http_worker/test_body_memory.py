"""The memory of request bodies is bounded, and clients with large bodies leave room for small ones."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.http import classify, connect, metric
from tests.support.images import encoded, random_image
from tests.support.processes import serving
from tests.support.server import Server
from tests.support.waiting import eventually
from vitserve.service.errors import BodyTooLargeError
from vitserve.service.http_worker.inference.body_memory import SMALL_BYTES, BodyMemory

MIB = 2**20
SMALL = encoded(random_image(40, 30))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3 * MIB)), max_size=60))
def test_the_capacity_is_never_exceeded(chunks: list[tuple[int, int]]) -> None:
    memory, held = BodyMemory(8 * MIB), dict.fromkeys(range(10), 0)
    for request, size in chunks:
        try:
            fits = memory.fits(held[request], size)
        except BodyTooLargeError:
            fits = False
        if fits:
            held[request] += size
            memory.used += size
        else:  # the request ends
            memory.used -= held[request]
            held[request] = 0
        assert memory.used == sum(held.values()) <= memory.capacity
        large = sum(size for size in held.values() if size > SMALL_BYTES)
        assert large <= 0.75 * memory.capacity


def begin(server: Server, length: int, path: str) -> socket.socket:
    """Sends the headers and all of the body but the last byte."""
    connection = connect(server)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + bytes(length - 1))
    return connection


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/explain"])
def test_unfinished_bodies_fill_their_share_only(path: str) -> None:
    """40 MiB for bodies: 30 MiB for large ones."""
    with serving("--image-memory-bytes", str(160 * MIB)) as server, ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=server.url, timeout=60))
        held = [stack.enter_context(begin(server, 14 * MIB, path)) for _ in range(2)]
        body = bytes(14 * MIB)

        def is_full() -> bool:  # the server may still be reading the first two bodies
            response = client.post("/v1/classify", content=body, headers={"Content-Type": "image/png"})
            return response.status_code == 429

        eventually(is_full, "a third body is rejected")
        assert metric(client, "vitserve_images_shed_total", reason="memory") >= 1
        assert classify(client, SMALL).status_code == 200
        response = client.post("/v1/classify", content=b" " * (16 * MIB), headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
        held[0].close()
        eventually(lambda: not is_full(), "the memory of a client that has left is free")
