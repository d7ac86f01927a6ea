"""Memory and CPU time of a server without requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.http.quantiles import spread
from benchmarks.processes import StartedServer, process_family


@dataclass(frozen=True)
class Idle:
    memory_mb: float  # proportional set size of all processes
    cpu_ms: float  # CPU time of all processes, per second


def measure(server: StartedServer, seconds: float) -> Idle:
    """Needs Linux."""
    before, began = _cpu_nanoseconds(server), time.monotonic()
    time.sleep(seconds)
    used, elapsed = _cpu_nanoseconds(server) - before, time.monotonic() - began
    memory = sum(process.memory_full_info().pss for process in process_family(server.process))
    return Idle(memory / 1e6, used / 1e6 / elapsed)


def _cpu_nanoseconds(server: StartedServer) -> int:
    """Of all threads that run. CPU times as psutil reports them have steps of 10 ms: more than an idle server uses."""
    families = (Path(f"/proc/{process.pid}/task") for process in process_family(server.process))
    return sum(int(file.read_text().split()[0]) for tasks in families for file in tasks.glob("*/schedstat"))


def cells(rounds: Sequence[Idle]) -> dict[str, str]:
    return {
        "memory MB": spread([each.memory_mb for each in rounds]),
        "CPU ms per second": spread([each.cpu_ms for each in rounds], 2),
    }
