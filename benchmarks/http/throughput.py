"""Throughput of the HTTP path: a closed loop by wrk, with the CPU time that each process of the server uses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.http.load import wrk
from benchmarks.http.quantiles import short, spread
from benchmarks.processes import ServerFailedError, StartedServer

WARM_UP_SECONDS = 1


@dataclass(frozen=True)
class Throughput:
    """One server under one load."""

    per_second: float  # images, or rejections
    p50_ms: float  # of a request
    p99_ms: float
    cpu_ms: dict[str, float]  # CPU time per image, by the role of the process
    client_cores: float


@dataclass(frozen=True)
class ClosedLoop:
    requests: Sequence[bytes]  # sent in turn
    connections: int
    seconds: int
    images: int = 1  # in each request
    rejected: bool = False  # whether all responses must be rejections, instead of none


def measure(port: int, server: StartedServer, load: ClosedLoop) -> Throughput:
    """Raises ServerFailedError if not all responses are as expected, and ToolMissingError."""
    wrk.run(port, load.requests, load.connections, WARM_UP_SECONDS)
    before = server.cpu_seconds_by_role()
    result = wrk.run(port, load.requests, load.connections, load.seconds)
    after = server.cpu_seconds_by_role()
    if not result.requests or result.errors != (result.requests if load.rejected else 0):
        raise ServerFailedError(f"{result.errors} of {result.requests} responses are errors")
    count = result.requests * load.images
    return Throughput(
        per_second=count / result.seconds,
        p50_ms=result.p50_ms,
        p99_ms=result.p99_ms,
        cpu_ms={role: 1000 * (used - before.get(role, 0.0)) / count for role, used in after.items()},
        client_cores=result.cores,
    )


def cells(rounds: Sequence[Throughput]) -> dict[str, str]:
    """The columns of a table: median (minimum – maximum) of the rounds."""
    roles = dict.fromkeys(role for each in rounds for role in each.cpu_ms)
    cpu = {role: statistics.median(each.cpu_ms.get(role, 0.0) for each in rounds) for role in roles}
    total = spread([sum(each.cpu_ms.values()) for each in rounds], 2)
    return {
        "per second": spread([each.per_second for each in rounds], 4),
        "p50 ms": spread([each.p50_ms for each in rounds]),
        "p99 ms": spread([each.p99_ms for each in rounds]),
        "CPU ms": total,
        "by process": ", ".join(f"{role} {short(used, 2)}" for role, used in cpu.items() if used >= 0.0005),
        "client cores": short(statistics.median(each.client_cores for each in rounds), 2),
    }
