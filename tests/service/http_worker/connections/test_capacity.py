"""More connections than the service may have: slow and idle clients take those of each other, and others are served."""

from __future__ import annotations

import resource
import signal
import socket
from contextlib import ExitStack, suppress
from itertools import cycle, islice

import httpx
import pytest

from tests.support.http import classify, connect, head, response
from tests.support.images import encoded, random_image
from tests.support.processes import (
    ENGINE_WORKER,
    HTTP_WORKER,
    LONG_TIMEOUT,
    READY,
    kill,
    serving,
    slot_table_of,
    wait_for_lines,
)
from tests.support.server import Server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.http_worker.connections.limits import EXTRA_CONNECTIONS, RESERVED_DESCRIPTORS, ConnectionLimits
from vitserve.service.ipc.memory_layout import WAITING
from vitserve.service.settings import Settings

IMAGE = encoded(random_image())
# Nothing, an unfinished head, an unfinished body, and a connection that is idle after a response
SENT = (b"", b"GET /livez HT", head(1000) + b"a", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")


def hold(stack: ExitStack, running: Server, count: int) -> list[socket.socket]:
    """Opens ``count`` connections of all kinds that are slow or idle."""
    opened = []
    for sent in islice(cycle(SENT), count):
        connection = stack.enter_context(connect(running))
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sent)
        opened.append(connection)
    return opened


def others_are_served(running: Server, times: int) -> None:
    """With new connections, as probes use them, and with one that is kept."""
    with httpx.Client(base_url=running.url, timeout=10) as kept:
        for _ in range(times):
            assert httpx.get(f"{running.url}/livez", timeout=10).status_code == 200
            assert classify(kept, IMAGE).status_code == 200


@pytest.mark.parametrize(
    ("count", "open_files", "options"),
    [
        (300, 200, ()),
        pytest.param(100, None, ("--max-connections", "40", "--workers", "2"), marks=pytest.mark.slow),
        pytest.param(4_000, 400, (), marks=pytest.mark.slow),
        pytest.param(4_000, None, (), marks=pytest.mark.slow),
    ],
)
def test_slow_and_idle_connections_do_not_take_the_service_from_others(
    bundle: Bundle, count: int, open_files: int | None, options: tuple[str, ...]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with (
        ExitStack() as stack,
        serving("--bundle", str(bundle.path), *options, open_files=open_files) as running,
    ):
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        ready = ("--workers" in options and 2) or 1
        wait_for_lines(running, READY, ready)
        opened = hold(stack, running, count)
        others_are_served(running, 10)
        kill(running.pids(ENGINE_WORKER)[0])
        wait_for_lines(running, READY, 2 * ready)
        opened += hold(stack, running, count // 4)
        others_are_served(running, 10)
        for connection in opened:
            connection.close()
        others_are_served(running, 10)
        assert len(running.pids(HTTP_WORKER)) == ready
        assert "Traceback" not in "".join(running.log)
        assert running.stop() == 0


def test_descriptors_are_kept_back_for_the_service() -> None:
    kept = RESERVED_DESCRIPTORS + EXTRA_CONNECTIONS
    assert ConnectionLimits(Settings(), 400).connections == 400 - kept
    assert ConnectionLimits(Settings(), 10**6).connections == Settings().max_connections
    assert ConnectionLimits(Settings(), 10).connections == 1


PATIENT = ("--hang-seconds", "60", *LONG_TIMEOUT)


def test_probes_are_answered_while_all_connections_wait_for_a_response(bundle: Bundle) -> None:
    with ExitStack() as stack, serving("--bundle", str(bundle.path), "--max-connections", "8", *PATIENT) as running:
        (engine,) = running.pids(ENGINE_WORKER)
        slot_table = slot_table_of(engine)
        kill(engine, signal.SIGSTOP)
        waiting = [stack.enter_context(connect(running)) for _ in range(8)]
        for connection in waiting:
            connection.sendall(head(len(IMAGE)) + IMAGE)
        eventually(lambda: slot_table.count(WAITING) == 8, "all requests wait for the engine worker")
        for _ in range(EXTRA_CONNECTIONS + 1):
            assert httpx.get(f"{running.url}/livez", timeout=10).status_code == 200
            rejected = httpx.post(f"{running.url}/v1/classify", content=IMAGE, timeout=10)
            assert (rejected.status_code, rejected.json()["code"]) == (503, "too_many_connections")
        kill(engine, signal.SIGCONT)
        assert [response(connection)[0] for connection in waiting] == [200] * 8
        assert running.stop() == 0
