"""The liveness port of the supervisor: no request, and no number of connections, delays its response."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import httpx
import pytest

from tests.support.processes import HTTP_WORKER, serving
from tests.support.waiting import eventually_async
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.supervisor.probe import Probe


def with_probe(test: Callable[[int], Awaitable[None]]) -> None:
    """Runs ``test`` with the port of a probe listener."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            probe = asyncio.create_task(Probe().run(listener))
            await test(listener.getsockname()[1])
            await eventually_async(lambda: len(asyncio.all_tasks()) == 2, "all responses are sent")
            probe.cancel()

    asyncio.run(run())


async def get(port: int, request: bytes = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    received = await reader.read()
    writer.close()
    return received


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"200 OK"),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"404 Not Found"),
        (b"POST /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"404 Not Found"),
    ],
)
def test_only_liveness_is_answered(request_head: bytes, status: bytes) -> None:
    async def test(port: int) -> None:
        assert (await get(port, request_head)).startswith(b"HTTP/1.1 " + status)

    with_probe(test)


@pytest.mark.parametrize("sent", [b"", b"GET /livez", b"a" * 100_000], ids=["idle", "unfinished", "large"])
def test_other_connections_do_not_delay_a_probe(sent: bytes) -> None:
    async def test(port: int) -> None:
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
        for _, writer in opened:
            writer.write(sent)
        assert b"200 OK" in await get(port)
        for _, writer in opened:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    with_probe(test)


def test_the_service_is_live_while_its_http_workers_are_busy(bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving("--bundle", str(bundle.path), "--probe-port", str(port), "--hang-seconds", "60") as running:
        (worker,) = running.pids(HTTP_WORKER)
        os.kill(worker, signal.SIGSTOP)
        assert httpx.get(f"http://127.0.0.1:{port}/livez", timeout=10).json() == {"status": "live"}
        os.kill(worker, signal.SIGCONT)
        assert running.stop() == 0
