"""Truthfulness of Retry-After: the advised time compared with the time until the same request is admitted."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.http.quantiles import short, spread
from vitserve.bench import client as bench_client
from vitserve.bench.client import Client
from vitserve.bench.request import EncodedImage, get, raw

# The queue must hold two seconds of work. The engine must not become faster when all queued images are decoded: no
# estimate can include that. Therefore it is a slow one, and leaves a core to the decode threads.
SERVE_OPTIONS = ("--precision", "fp32", "--threads", "1", "--slots", "1024")
_MOST_QUEUED, _MOST_RUNNING = 1000, 32
_PROBE_TIMEOUT_MS, _PROBE_PRIORITY = 250, 1
_QUEUED_TIMEOUT_MS, _QUEUED_PRIORITY = 60_000, 9


class Reply(NamedTuple):
    status: int
    retry_after_seconds: float


class ImageClient:
    """Sends one image with a given timeout and priority."""

    def __init__(self, client: Client, image: EncodedImage) -> None:
        self.client, self._image = client, image

    def request(self, timeout_ms: int, priority: int = 5) -> bytes:
        return raw(f"/v1/classify?timeout_ms={timeout_ms}", self._image, f"Vitserve-Priority: {priority}\r\n")

    async def post(self, timeout_ms: int, priority: int = 5) -> Reply:
        response = await self.client.send(self.request(timeout_ms, priority))
        retry_after = json.loads(response.body)["retry_after_seconds"] if response.status == 429 else 0.0
        return Reply(response.status, retry_after)

    async def all_wait(self, images: int) -> bool:
        """Whether nearly all of the images have been decoded, and most of them wait for the engine."""
        body = (await self.client.send(get("/metrics"))).body
        waiting, in_flight = (
            float(body.partition(b"\n%b " % name)[2].split(b"\n", 1)[0])
            for name in (b"vitserve_queue_length", b"vitserve_images_in_flight")
        )
        return waiting >= images / 2 and in_flight - waiting <= _MOST_RUNNING


@dataclass(frozen=True)
class RetryAfter:
    """The pairs of one round."""

    advised_seconds: list[float]  # in the first response with status 429
    actual_seconds: list[float]  # until the request was admitted

    def ratios(self) -> list[float]:
        return [advised / actual for advised, actual in zip(self.advised_seconds, self.actual_seconds, strict=True)]


def measure(port: int, image: EncodedImage, capacity: float, probes: int) -> RetryAfter:
    """Fills the queue with one to two seconds of urgent work, ``probes`` times. ``capacity`` is in images per second.

    The request that is repeated has a low priority and a timeout of 250 ms.
    """

    async def all_probes() -> list[tuple[float, float]]:
        client = ImageClient(Client("127.0.0.1", port), image)
        try:
            counts = [min(_MOST_QUEUED, int(capacity * (1 + number / probes)) + 1) for number in range(probes)]
            found = [await _probe(client, count) for count in counts]
        finally:
            client.client.close()
        return [pair for pair in found if pair is not None]

    pairs = bench_client.run(all_probes())
    return RetryAfter([advised for advised, _ in pairs], [actual for _, actual in pairs])


async def _probe(client: ImageClient, images: int) -> tuple[float, float] | None:
    """Queues ``images``, then repeats a request until it is admitted. None if it is admitted at once."""
    queued = [asyncio.create_task(client.post(_QUEUED_TIMEOUT_MS, _QUEUED_PRIORITY)) for _ in range(images)]
    while not await client.all_wait(images) and not all(task.done() for task in queued):
        await asyncio.sleep(0.01)
    first: tuple[float, float] | None = None
    while True:
        sent = time.monotonic()
        task = asyncio.create_task(client.post(_PROBE_TIMEOUT_MS, _PROBE_PRIORITY))
        await asyncio.wait([task], timeout=0.01)
        if not task.done() or task.result().status == 200:  # a request that waits has been admitted
            break
        if first is None:
            first = (sent, task.result().retry_after_seconds)
        await asyncio.sleep(0.001)
    await asyncio.gather(*queued, task)
    return (first[1], sent - first[0]) if first is not None else None


def cells(rounds: Sequence[RetryAfter]) -> dict[str, str]:
    ratios = [ratio for each in rounds for ratio in each.ratios()]
    actual = [seconds for each in rounds for seconds in each.actual_seconds]
    return {
        "Retry-After ÷ actual time": spread(ratios),
        "probes": str(len(ratios)),
        "actual time s, median": short(statistics.median(actual)) if actual else "–",
    }
