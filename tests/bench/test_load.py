"""Closed and open loops against a stub server that can stall, and against the real server."""

from __future__ import annotations

import asyncio
import itertools
import math
import time

import httpx
import pytest

from tests.support.images import encoded, random_image
from tests.support.server import Server
from tests.support.stub_server import StubServer, listening
from vitserve.bench.client import Client, ConnectionGoneError
from vitserve.bench.load import LoadResult, arrivals, closed_loop, open_loop
from vitserve.bench.report import summarize
from vitserve.bench.request import EncodedImage, get, raw

IMAGE = EncodedImage(encoded(random_image(60, 45), "JPEG"), "image/jpeg")
REQUEST = raw("/", IMAGE)


@pytest.mark.parametrize("rate", [0.5, 40.0, 3000.0])
def test_arrivals_are_a_poisson_process(rate: float) -> None:
    count = 20_000
    moments = [0.0, *itertools.islice(arrivals(rate, seed=1), count)]
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    mean = sum(gaps) / count
    assert mean == pytest.approx(1 / rate, rel=5 / math.sqrt(count))  # five standard deviations
    variance = sum((gap - mean) ** 2 for gap in gaps) / count
    assert variance == pytest.approx(mean**2, rel=0.1)  # as in an exponential distribution
    assert moments[1:] == list(itertools.islice(arrivals(rate, seed=1), count))


def planned(rate: float, seconds: float) -> int:
    return len(list(itertools.takewhile(lambda moment: moment < seconds, arrivals(rate, 0))))


def test_an_open_loop_does_not_wait_for_responses() -> None:
    """The server stalls from its 20th request until its 100th, which a loop that waits would never send."""

    async def scenario() -> LoadResult:
        server = StubServer()
        server.at = {20: server.open.clear, 100: server.open.set}
        async with listening(server) as port:
            client = Client("127.0.0.1", port)
            try:
                result = await asyncio.wait_for(open_loop(client, [REQUEST], 300.0, 0.0, 0.5), 30)
            finally:
                client.close()
        assert server.requests == len(result.samples)
        return result

    result = asyncio.run(scenario())
    assert len(result.samples) == planned(300.0, 0.5) > 100
    assert all(sample.outcome == "200" for sample in result.samples)
    resumed = sorted(sample.sent for sample in result.samples)[99]  # the server resumed at this moment or later
    stalled = [sample for sample in result.samples if sample.sent < resumed <= sample.ended]
    assert len(stalled) >= 80
    longest = max(sample.latency_seconds for sample in stalled)
    row = summarize(result, deadline_seconds=longest / 2)
    assert 0 < row.goodput_per_second < row.throughput_per_second == len(result.samples) / 0.5


def test_latency_counts_from_the_planned_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the fifth request, 0.2 s pass in which the generator sends nothing, as if its event loop were blocked."""
    skipped_seconds, monotonic = 0.0, time.monotonic
    monkeypatch.setattr("vitserve.bench.load.time.monotonic", lambda: monotonic() + skipped_seconds)

    def skip() -> None:
        nonlocal skipped_seconds
        skipped_seconds = 0.2

    async def scenario() -> LoadResult:
        async with listening(StubServer(at={5: skip})) as port:
            client = Client("127.0.0.1", port)
            result = await open_loop(client, [REQUEST], 200.0, 0.0, 0.8)
            client.close()
            return result

    result = asyncio.run(scenario())
    assert len(result.samples) == planned(200.0, 0.8)
    late = [sample for sample in result.samples if sample.sent - sample.planned > 0.1]
    assert late
    assert all(sample.latency_seconds > 0.1 for sample in late)
    assert (summarize(result).send_delay_p99_ms or 0) > 100


def test_requests_without_a_response_count_as_errors() -> None:
    async def scenario() -> LoadResult:
        server = StubServer()
        server.open.clear()
        async with listening(server) as port:
            client = Client("127.0.0.1", port, timeout_seconds=0.1)
            result = await closed_loop(client, [REQUEST], 2, 0.0, 0.3)
            client.close()
            return result

    row = summarize(asyncio.run(scenario()))
    assert row.errors == row.requests > 0
    assert row.statuses == f"timeout: {row.requests}"
    assert row.p50_ms is None


@pytest.mark.parametrize("loop", ["closed", "open"])
def test_a_load_ends_when_the_server_is_gone(loop: str) -> None:
    async def scenario() -> None:
        async with listening(StubServer()) as port:
            pass
        client = Client("127.0.0.1", port)
        if loop == "closed":
            await closed_loop(client, [REQUEST], 2, 0.0, 60.0)
        else:
            await open_loop(client, [REQUEST], 50.0, 0.0, 60.0)

    with pytest.raises(ConnectionGoneError, match="no server is listening on"):
        asyncio.run(asyncio.wait_for(scenario(), 30))


def classified(server: Server) -> dict[str, int]:
    """Number of requests to /v1/classify by status, from the server's metrics."""
    counts = {}
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith("vitserve_requests_total{") and "/v1/classify" in line:
            counts[line.partition('status="')[2].partition('"')[0]] = int(float(line.rpartition(" ")[2]))
    return counts


def test_counts_agree_with_the_metrics_of_the_server(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    before = classified(server)

    async def scenario() -> tuple[LoadResult, LoadResult]:
        client = Client(host, int(port))
        closed = await closed_loop(client, [raw("/v1/classify", IMAGE)], 4, 0.1, 0.6)
        opened = await open_loop(client, [raw("/v1/classify", IMAGE)], 40.0, 0.0, 0.5)
        await client.send(get("/livez"))
        client.close()
        return closed, opened

    results = asyncio.run(scenario())
    assert all(sample.outcome == "200" for result in results for sample in result.samples)
    assert classified(server)["200"] - before.get("200", 0) == sum(len(result.samples) for result in results)
    assert summarize(results[0]).successful == len(results[0].measured()) > 0
