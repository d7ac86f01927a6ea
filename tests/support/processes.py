"""Real processes of a running service: find them, kill them, look at their memory and connections."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from tests.support.server import Server, start_server
from tests.support.waiting import eventually
from vitserve.service.ipc.shared_memory import SlotTable

ENGINE_WORKER = "vitserve.service.engine_worker.main"
HTTP_WORKER = "vitserve.service.http_worker.main"
READY = "vitserve.http_worker: ready"
ADMIN_KEY = "key of the tests 0123"
LONG_TIMEOUT = ("--timeout-ms", "60000")


@contextmanager
def serving(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    open_files: int | None = None,
) -> Iterator[Server]:
    """A service that is ready. Processes that still run at the end of the test are killed."""
    running = start_server(*arguments, environment=environment, prefix=prefix, open_files=open_files)
    try:
        yield running
    finally:
        for pid in [*running.pids(HTTP_WORKER), *running.pids(ENGINE_WORKER), running.process.pid]:
            kill(pid)
        running.process.wait(60)


def kill(pid: int, with_signal: signal.Signals = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, with_signal)


def has_exited(pid: int) -> bool:
    """A zombie counts as exited: its parent may have exited before it."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def line_count(running: Server, pattern: str) -> int:
    return len(re.findall(pattern, "".join(running.log)))


def wait_for_lines(running: Server, pattern: str, count: int) -> None:
    eventually(lambda: line_count(running, pattern) >= count, f"{count} log lines with {pattern!r}")


def remote_ports(pid: int) -> set[int]:
    """The clients' ports of the TCP connections that a process has."""
    return {
        connection.raddr.port
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED
    }


def slot_table_of(engine_worker: int) -> SlotTable:
    """The shared memory of the engine worker with this process id."""
    for link in Path(f"/proc/{engine_worker}/fd").iterdir():
        if "vitserve-slots" in os.readlink(link):
            descriptor = os.open(link, os.O_RDWR)
            try:
                return SlotTable(descriptor)
            finally:
                os.close(descriptor)
    raise AssertionError("the engine worker has no slot table")


def resident_bytes(pid: int) -> int:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match.group(1)) * 1024


class BundleLink:
    """A symbolic link to a bundle, replaced atomically."""

    def __init__(self, directory: Path, target: Path) -> None:
        self.path = directory / "current"
        self.point_to(target)

    def point_to(self, target: Path) -> None:
        new = self.path.with_name("new")
        new.symlink_to(target)
        new.replace(self.path)


def reload(client: httpx.Client, key: str = ADMIN_KEY) -> httpx.Response:
    return client.post("/v1/admin/reload", headers={"Authorization": f"Bearer {key}"})
