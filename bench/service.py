"""Measures a running server, one load after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from vitserve.bench.client import Client, ConnectionGoneError, NoResponseError, run
from vitserve.bench.load import LoadResult, closed_loop, open_loop
from vitserve.bench.options import BenchOptions
from vitserve.bench.report import ServiceRow, summarize
from vitserve.bench.request import EncodedImage, raw

SECONDS = 10.0  # for each load, by default


def measure(options: BenchOptions, images: Sequence[EncodedImage]) -> Iterator[ServiceRow]:
    """Yields a row for each closed loop, then for each open loop.

    Raises ValueError for an invalid option or an error response, and ConnectionGoneError if no server is listening.
    """
    host, port, path = _address(options)
    requests = [raw(path, image) for image in images]
    run(_check(host, port, requests[0]))
    deadline = options.deadline_ms / 1000 if options.deadline_ms else math.inf
    warm_up, seconds = options.warm_up_seconds, options.seconds or SECONDS

    async def closed(connections: int) -> LoadResult:
        client = Client(host, port)
        try:
            return await closed_loop(client, requests, connections, warm_up, seconds)
        finally:
            client.close()

    async def opened(rate: float) -> LoadResult:
        client = Client(host, port)
        try:
            return await open_loop(client, requests, rate, warm_up, seconds)
        finally:
            client.close()

    for connections in options.connection_counts():
        yield summarize(run(closed(connections)), deadline)
    for rate in options.rates():
        yield summarize(run(opened(rate)), deadline)


def _address(options: BenchOptions) -> tuple[str, int, str]:
    """Host, port and path. A URL without a path stands for vitserve's own route, with the deadline as its timeout."""
    url = urlsplit(options.target)
    if url.scheme != "http" or not url.hostname:
        raise ValueError(f"{options.target} is not of the form http://HOST:PORT (TLS is not supported)")
    path = url.path + (f"?{url.query}" if url.query else "")
    if path in ("", "/"):
        path = "/v1/classify" + (f"?timeout_ms={options.deadline_ms:.0f}" if options.deadline_ms else "")
    return url.hostname, url.port or 80, path


async def _check(host: str, port: int, request: bytes) -> None:
    """Sends one request before the load, so that a wrong address or route is reported at once."""
    client = Client(host, port)
    try:
        response = await client.send(request)
    except NoResponseError as error:
        raise ConnectionGoneError(f"{host}:{port} sent no response to the first image: {error}") from error
    finally:
        client.close()
    if response.status not in (200, 429):
        body = response.body[:300].decode(errors="replace")
        raise ValueError(f"{host}:{port} responded to the first image with status {response.status}: {body}")
