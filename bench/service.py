"""Measures a service that runs: load after load, each row as soon as it is there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from vitserve.bench.client import Client, ConnectionGoneError, NoResponseError, run
from vitserve.bench.load import Run, closed_loop, open_loop
from vitserve.bench.report import ServiceRow, summary
from vitserve.bench.request import raw, read_pictures


@dataclass(frozen=True)
class Plan:
    """What is asked of the service."""

    url: str
    images: Path
    connections: Sequence[int]  # closed loops
    rates: Sequence[float]  # open loops, requests a second
    warm_up_seconds: float
    seconds: float
    deadline_ms: float  # 0: none
    seed: int = 0


def measure(plan: Plan) -> Iterator[ServiceRow]:
    """Raises ValueError for what cannot be asked, Gone where nobody listens."""
    host, port, path = _parts(plan)
    requests = [raw(path, picture) for picture in read_pictures(plan.images)]
    run(_first(host, port, requests[0]))
    deadline = plan.deadline_ms / 1000 if plan.deadline_ms else math.inf

    async def closed(connections: int) -> Run:
        client = Client(host, port)
        try:
            return await closed_loop(client, requests, connections, plan.warm_up_seconds, plan.seconds)
        finally:
            client.close()

    async def opened(rate: float) -> Run:
        client = Client(host, port)
        try:
            return await open_loop(client, requests, rate, plan.warm_up_seconds, plan.seconds, plan.seed)
        finally:
            client.close()

    for connections in plan.connections:
        yield summary(run(closed(connections)), deadline)
    for rate in plan.rates:
        yield summary(run(opened(rate)), deadline)


def _parts(plan: Plan) -> tuple[str, int, str]:
    """Where nothing but the service is named, images go to its own route, with the deadline."""
    url = urlsplit(plan.url)
    if url.scheme != "http" or not url.hostname:
        raise ValueError(f"{plan.url} is not http://HOST:PORT; TLS is not spoken here")
    path = url.path + (f"?{url.query}" if url.query else "")
    if path in ("", "/"):
        path = "/v1/classify" + (f"?timeout_ms={plan.deadline_ms:.0f}" if plan.deadline_ms else "")
    return url.hostname, url.port or 80, path


async def _first(host: str, port: int, request: bytes) -> None:
    """One request before all others: what is wrong from the start is said at once."""
    client = Client(host, port)
    try:
        answer = await client.ask(request)
    except NoResponseError as error:
        raise ConnectionGoneError(f"{host}:{port} did not answer the first image: {error}") from error
    finally:
        client.close()
    if answer.status not in (200, 429):
        raise ValueError(
            f"{host}:{port} answered the first image with {answer.status}: {answer.body[:300].decode(errors='replace')}"
        )
