"""Starts a server with its child processes, waits until it responds, and stops all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

START_TIMEOUT_SECONDS = 120.0
STOP_TIMEOUT_SECONDS = 20.0


class ServerFailedError(RuntimeError):
    """A server did not start or did not respond. The message contains the end of its output."""


class StartedServer(NamedTuple):
    process: psutil.Process
    start_seconds: float  # until the first response

    def cpu_seconds(self) -> float:
        """CPU time that the server and its child processes have used."""
        return sum(self.cpu_seconds_by_role().values())

    def cpu_seconds_by_role(self) -> dict[str, float]:
        """CPU time of the server and its child processes. Processes with the same role are added up."""
        seconds: dict[str, float] = {}
        for process in process_family(self.process):
            with suppress(psutil.NoSuchProcess):
                times, role = process.cpu_times(), role_of(process.cmdline())
                seconds[role] = seconds.get(role, 0.0) + times.user + times.system
        return seconds


def role_of(command: Sequence[str]) -> str:
    """A short name for a process: the module that Python runs, or the name of the program."""
    if "-m" not in command:
        return Path(command[0]).name.replace("_", " ") if command else "exited"
    module = command[command.index("-m") + 1]
    if module == "vitserve":
        return "supervisor"
    return module.removeprefix("vitserve.service.").removesuffix(".main").replace("_", " ")


@contextmanager
def process_tree(
    command: Sequence[str],
    directory: Path,
    environment: Mapping[str, str],
    port: int,
    responds: Callable[[], bool],
    pause_seconds: float = 0.2,
) -> Iterator[StartedServer]:
    """Starts a server and yields as soon as ``responds`` returns True. Raises ServerFailedError."""
    if _is_used(port):
        raise ServerFailedError(f"port {port} is already in use")
    with tempfile.TemporaryFile() as output:
        process = psutil.Popen(
            command,
            cwd=directory,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            began = time.monotonic()
            while not responds():
                exited = process.poll() is not None
                if exited or time.monotonic() - began > START_TIMEOUT_SECONDS:
                    reason = "exited" if exited else f"no response within {START_TIMEOUT_SECONDS:.0f} s"
                    output.seek(0)
                    raise ServerFailedError(f"{reason}: {output.read()[-2000:].decode(errors='replace').strip()}")
                time.sleep(pause_seconds)  # a server of another project sends no event when it is ready
            yield StartedServer(process, time.monotonic() - began)
        finally:
            _stop(process)


def process_family(process: psutil.Process) -> list[psutil.Process]:
    """The process and its descendants, without those that have exited."""
    return [member for member in (process, *process.children(recursive=True)) if _runs(member)]


def _stop(process: psutil.Popen) -> None:
    """Stops the process and its descendants, including those in sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        family = process_family(process)
        process.terminate()
        with suppress(psutil.TimeoutExpired):
            process.wait(STOP_TIMEOUT_SECONDS)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        while any(_runs(member) for member in family):
            time.sleep(0.05)


def _runs(process: psutil.Process) -> bool:
    """False also for a zombie, which nothing may reap in a container."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _is_used(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
