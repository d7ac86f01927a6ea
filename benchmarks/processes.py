"""Process trees of foreign servers: started, waited for, and ended with all that they started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

START_SECONDS = 120.0


class ServerFailedError(RuntimeError):
    """A server that did not come up, or did not answer; the message has the end of what it said."""


@contextmanager
def process_tree(
    command: Sequence[str],
    directory: Path,
    environment: Mapping[str, str],
    port: int,
    answers: Callable[[], bool],
    pause_seconds: float = 0.2,
) -> Iterator[float]:
    """Yields as soon as it ``answers``, with the seconds that took. Raises Failed."""
    if _listens(port):
        raise ServerFailedError(f"somebody listens on port {port} already")
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            began = time.monotonic()
            while not answers():
                if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                    said.seek(0)
                    text = said.read()[-2000:].decode(errors="replace").strip()
                    raise ServerFailedError(
                        f"it {'ended' if process.poll() is not None else f'did not answer within {START_SECONDS:.0f} s'}: {text}"
                    )
                time.sleep(pause_seconds)  # a foreign server tells nobody that it is ready
            yield time.monotonic() - began
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started, in sessions of their own too."""
    family = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid, started in family.items():
        if _started(pid) == started:  # and not another that was given its number
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    while any(_started(pid) == started for pid, started in family.items()):
        time.sleep(0.05)


def descendants(pid: int) -> dict[int, str]:
    """Process ids below ``pid``, each with the moment at which it was started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, ahead = {}, [pid]
    while ahead:
        for child in children.get(ahead.pop(), []):
            ahead.append(child)
            found[child] = _started(child)
    return {child: started for child, started in found.items() if started}


def _started(pid: int) -> str:
    """Of a process that runs; empty for one that has ended, whether or not anybody has asked for its status."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
