"""The service stops while clients send: complete requests are answered, others do not hold it up, none is reset."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.http import connect, head, response
from tests.support.images import encoded, random_image
from tests.support.processes import HTTP_WORKER, serving, wait_for_lines
from tests.support.server import Server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle

IMAGE = encoded(random_image())
REQUEST = head(len(IMAGE)) + IMAGE
CLOSING = head(len(IMAGE), "/v1/classify", "Connection: close") + IMAGE


class Hammer:
    """Clients that each open a connection, send a request at once, read the response, and begin again."""

    def __init__(self, running: Server, clients: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self._running, self._threads = running, [threading.Thread(target=self._run) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection = connect(self._running)
            except OSError:  # the service has stopped
                return
            with connection:
                self.outcomes[self._request(connection)] += 1

    def _request(self, connection: socket.socket) -> str:
        try:
            connection.sendall(CLOSING)
            received = b"".join(iter(lambda: connection.recv(65_536), b""))
        except OSError as error:
            return type(error).__name__
        return received[9:12].decode() or "closed"

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)


@pytest.fixture
def running(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[Server]:
    with serving("--bundle", str(bundle.path), "--workers", request.param) as running:
        wait_for_lines(running, "vitserve.http_worker: ready", int(request.param))
        yield running


@pytest.mark.parametrize("running", ["1"], indirect=True)
def test_unfinished_requests_do_not_hold_up_a_stop(running: Server) -> None:
    with ExitStack() as stack:
        bodies = [stack.enter_context(connect(running)) for _ in range(20)]
        heads = [stack.enter_context(connect(running)) for _ in range(5)]
        idle = [stack.enter_context(connect(running)) for _ in range(5)]
        for connection in bodies:
            connection.sendall(head(len(IMAGE)) + IMAGE[:10])
        for connection in heads:
            connection.sendall(REQUEST[:40])
        for connection in idle:
            connection.sendall(REQUEST)
            assert response(connection)[0] == 200
        late = bodies.pop()
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("draining")
        late.sendall(IMAGE[10:])  # in time
        assert response(late)[0] == 200
        for connection in bodies + heads:
            status, problem, _ = response(connection)
            assert (status, problem["code"]) == (503, "not_ready"), json.dumps(problem)
            assert connection.recv(1) == b""
        assert [connection.recv(1) for connection in idle] == [b""] * 5
        assert running.process.wait(60) == 0
        assert "forced" not in "".join(running.log)


@pytest.mark.parametrize("running", ["1", "2"], indirect=True)
def test_no_client_that_has_connected_is_reset(running: Server) -> None:
    """Every request gets its response: also the one of a client that connects in the last moment."""
    hammer = Hammer(running, clients=12)
    eventually(lambda: hammer.outcomes["200"] > 50, "the clients are under way")
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(60) == 0
    hammer.join()
    assert set(hammer.outcomes) == {"200"}, hammer.outcomes
    assert not running.pids(HTTP_WORKER)
