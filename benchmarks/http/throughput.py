"""Throughput of the HTTP path: a closed loop by wrk, with the CPU time that each process of the server uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.http import wrk
from benchmarks.processes import ServerFailedError, StartedServer

WARM_UP_SECONDS = 1


@dataclass(frozen=True)
class Throughput:
    """One server under one load."""

    images_per_second: float
    p50_ms: float  # of a request
    p99_ms: float
    cpu_ms: dict[str, float]  # CPU time per image, by the role of the process
    client_cores: float


def measure(
    port: int, server: StartedServer, requests: Sequence[bytes], images: int, connections: int, seconds: int
) -> Throughput:
    """``images`` is the number in each request. Raises ServerFailedError for any error response, ToolMissingError."""
    wrk.run(port, requests, connections, WARM_UP_SECONDS)
    before = server.cpu_seconds_by_role()
    result = wrk.run(port, requests, connections, seconds)
    after = server.cpu_seconds_by_role()
    if result.errors or not result.requests:
        raise ServerFailedError(f"{result.errors} errors and {result.requests} responses")
    count = result.requests * images
    return Throughput(
        images_per_second=count / result.seconds,
        p50_ms=result.p50_ms,
        p99_ms=result.p99_ms,
        cpu_ms={role: 1000 * (used - before.get(role, 0.0)) / count for role, used in after.items()},
        client_cores=result.cores,
    )
