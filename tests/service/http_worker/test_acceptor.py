"""Accepting connections: they are divided among the HTTP workers, and a worker that hangs holds up no client."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack

import httpx
import psutil
import pytest

from tests.support.http import connect
from tests.support.processes import HTTP_WORKER, READY, serving, wait_for_lines
from tests.support.server import Server
from vitserve.model.bundle.bundle import Bundle

CONNECTIONS = 20
REQUEST = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


def connections(running: Server) -> list[int]:
    """Of each HTTP worker."""
    port = int(running.url.rsplit(":", 1)[1])
    return [
        sum(
            each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port
            for each in psutil.Process(pid).net_connections("tcp")
        )
        for pid in running.pids(HTTP_WORKER)
    ]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_connections_are_divided_among_the_http_workers(bundle: Bundle, workers: int) -> None:
    with serving("--bundle", str(bundle.path), "--workers", str(workers)) as running, ExitStack() as stack:
        wait_for_lines(running, READY, workers)
        opened = [stack.enter_context(connect(running)) for _ in range(CONNECTIONS)]
        for connection in opened:
            connection.sendall(REQUEST)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        counts = connections(running)
        assert sum(counts) == CONNECTIONS
        assert max(counts) - min(counts) <= 2
        stack.close()
        assert running.stop() == 0


def test_other_workers_accept_while_one_hangs(bundle: Bundle) -> None:
    with serving("--bundle", str(bundle.path), "--workers", "2") as running:
        wait_for_lines(running, READY, 2)
        stopped, _ = running.pids(HTTP_WORKER)
        os.kill(stopped, signal.SIGSTOP)
        statuses = [httpx.get(f"{running.url}/livez", timeout=5).status_code for _ in range(CONNECTIONS)]
        os.kill(stopped, signal.SIGCONT)
        assert statuses == [200] * CONNECTIONS
        assert running.stop() == 0
