"""Requests that wait with their connections in the backlog of an overloaded worker: rejected at once, and in time."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from tests.support.http import connect, head, metric, response
from tests.support.images import encoded, random_image
from tests.support.processes import HTTP_WORKER
from tests.support.server import Server, start_server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle

IMAGE = encoded(random_image())
COUNT, BURST = 60, 400
TIMEOUT_SECONDS = 0.5
PATH = f"/v1/classify?timeout_ms={1000 * TIMEOUT_SECONDS:.0f}"


WORKERS = [pytest.param("1", id="one worker"), pytest.param("2", id="two workers", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=WORKERS)
def server(request: pytest.FixtureRequest, slow_bundle: Bundle) -> Iterator[Server]:
    running = start_server("--bundle", str(slow_bundle.path), "--workers", request.param)
    eventually(lambda: len(running.pids(HTTP_WORKER)) == int(request.param), "all workers run")
    yield running
    assert running.stop() == 0


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Its HTTP workers do nothing, as if they were busy."""
    workers = server.pids(HTTP_WORKER)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)


def have_long_turns(server: Server) -> None:
    """Many requests become ready at once, so that the workers accept by themselves from now on."""
    rejected = head(len(IMAGE), "/v1/classify?timeout_ms=1") + IMAGE
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(BURST)]
        for connection in connections:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert response(connection)[0] == 200
        with stopped(server):
            for connection in connections:
                connection.sendall(rejected)
        assert all(response(connection)[0] in (200, 429) for connection in connections)


def waiting_in_backlog(server: Server, requests: list[bytes], seconds: float, stack: ExitStack) -> list[socket.socket]:
    """A connection for each request, all of which wait for so long."""
    with stopped(server):
        connections = [stack.enter_context(connect(server)) for _ in requests]
        for connection, request in zip(connections, requests, strict=True):
            connection.sendall(request)
        sent = time.monotonic()
        eventually(lambda: time.monotonic() - sent > seconds, "the requests have waited")
    return connections


def test_requests_that_waited_too_long_are_rejected_and_counted(server: Server) -> None:
    late = head(len(IMAGE), PATH) + IMAGE
    named = head(len(IMAGE), PATH, "X-Request-ID: mine") + IMAGE
    live = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    have_long_turns(server)
    with httpx.Client(base_url=server.url, timeout=60) as client, ExitStack() as stack:
        labels = {"route": "/v1/classify", "status": "429"}
        requests = metric(client, "vitserve_requests_total", **labels)
        images = metric(client, "vitserve_images_total", outcome="overloaded")
        connections = waiting_in_backlog(server, [late] * COUNT + [named, live], TIMEOUT_SECONDS + 0.2, stack)
        answers = [response(connection) for connection in connections]
        assert [status for status, _, _ in answers] == [429] * (COUNT + 1) + [200]
        for _, body, received in answers[:COUNT]:
            assert body["code"] == "overloaded"
            assert int(received.headers["retry-after"]) >= 1
            assert received.headers["content-type"] == "application/problem+json"
        assert len({received.headers["x-request-id"] for _, _, received in answers[:COUNT]}) == COUNT
        assert answers[COUNT][2].headers["x-request-id"] == "mine"
        closed = [received.headers.get("connection") == "close" for _, _, received in answers[:COUNT]]
        assert sum(closed) >= COUNT / 2, "rejected without opening the connection"
        for connection, was_closed in zip(connections, closed, strict=False):
            assert not was_closed or connection.recv(1) == b"", "the stream ends without a reset"
        assert metric(client, "vitserve_requests_total", **labels) - requests == COUNT + 1
        assert metric(client, "vitserve_images_total", outcome="overloaded") - images == COUNT + 1


def test_a_large_body_is_dropped_after_its_rejection(server: Server) -> None:
    """The client sends all of it before it reads."""
    have_long_turns(server)
    body = bytes(2_000_000)
    with ExitStack() as stack:
        with stopped(server):
            connections = [stack.enter_context(connect(server)) for _ in range(4)]
            for connection in connections:
                connection.sendall(head(len(body), "/v1/classify?timeout_ms=1") + body[:1000])
        for connection in connections:
            connection.sendall(body[1000:])
            assert response(connection)[0] == 429


def test_others_are_served_as_before(server: Server) -> None:
    have_long_turns(server)
    requests = [
        head(len(IMAGE), "/v1/classify?timeout_ms=60000") + IMAGE,
        head(3) + b"abc",
        b"GET /nosuch HTTP/1.1\r\n",
    ]
    requests[2] += b"Host: x\r\n\r\n"
    with ExitStack() as stack:
        connections = waiting_in_backlog(server, requests, 0.0, stack)
        assert [response(connection)[0] for connection in connections] == [200, 422, 404]


def test_a_connection_without_a_request_has_not_waited(server: Server) -> None:
    """A client that connects early, as browsers do, has its whole timeout once it sends."""
    have_long_turns(server)
    with connect(server) as connection:
        opened = time.monotonic()
        eventually(lambda: time.monotonic() - opened > TIMEOUT_SECONDS + 0.2, "the connection has been idle")
        connection.sendall(head(len(IMAGE), PATH) + IMAGE)
        assert response(connection)[0] == 200


@pytest.mark.slow
def test_no_rejected_client_is_reset_where_descriptors_are_few(slow_bundle: Bundle) -> None:
    """More clients still send their bodies than may keep a connection that is not open on the event loop."""
    server = start_server("--bundle", str(slow_bundle.path), open_files=1600)
    have_long_turns(server)
    body = bytes(2_000_000)
    with ExitStack() as stack:
        with stopped(server):
            connections = [stack.enter_context(connect(server)) for _ in range(80)]
            for connection in connections:
                connection.sendall(head(len(body), "/v1/classify?timeout_ms=1") + body[:1000])
        client = stack.enter_context(httpx.Client(base_url=server.url, timeout=60))
        eventually(lambda: metric(client, "vitserve_requests_total", status="429") >= BURST + 80, "all are rejected")
        for connection in connections:
            connection.sendall(body[1000:])
            assert response(connection)[0] == 429
    assert server.stop() == 0


@pytest.mark.slow
def test_a_stop_waits_for_rejected_clients(slow_bundle: Bundle) -> None:
    """None of them gets a reset."""
    server = start_server("--bundle", str(slow_bundle.path))
    have_long_turns(server)
    with ExitStack() as stack:
        late = head(len(IMAGE), PATH) + IMAGE
        connections = waiting_in_backlog(server, [late] * 20, TIMEOUT_SECONDS + 0.2, stack)
        server.process.send_signal(signal.SIGTERM)
        assert {response(connection)[0] for connection in connections} <= {429, 503}
    assert server.process.wait(60) == 0
