"""Load on a server: closed loop and open loop, with one sample for each request."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vitserve.bench.client import Client, NoResponseError

Loop = Literal["closed", "open"]


class Sample(NamedTuple):
    """One request. Times are in seconds since the end of the warm-up, and negative during it."""

    planned: float  # planned arrival in an open loop; the same as `sent` in a closed loop
    sent: float
    ended: float
    outcome: str  # the status code, or why there was no response
    body: bytes  # empty for status 200

    @property
    def latency_seconds(self) -> float:
        """Counts from the planned arrival, so that a stalled server is charged for the requests sent late (no
        coordinated omission)."""
        return self.ended - self.planned


@dataclass(frozen=True)
class LoadResult:
    loop: Loop
    connections: int  # 0 in an open loop, which opens as many as it needs
    rate: float  # planned arrivals per second; 0 in a closed loop
    seconds: float  # measured time, after the warm-up
    samples: tuple[Sample, ...]  # including those of the warm-up
    client_cores: float  # CPU cores that this process used during the measured time

    def measured(self) -> list[Sample]:
        """Samples after the warm-up: in a closed loop by when they ended, in an open loop by when they were planned."""
        if self.loop == "closed":
            return [sample for sample in self.samples if 0 <= sample.ended < self.seconds]
        return [sample for sample in self.samples if 0 <= sample.planned < self.seconds]


async def closed_loop(
    client: Client, requests: Sequence[bytes], connections: int, warm_up: float, seconds: float
) -> LoadResult:
    """Keeps one request in flight on each connection. Raises ConnectionGoneError."""
    samples: list[Sample] = []
    order = itertools.cycle(requests)
    clock = _Clock(time.monotonic() + warm_up)
    tasks = [asyncio.create_task(_send_repeatedly(client, order, clock, seconds, samples)) for _ in range(connections)]
    try:
        await asyncio.gather(clock.measure_cpu(seconds), *tasks)
    finally:
        for task in tasks:
            task.cancel()
    return LoadResult("closed", connections, 0.0, seconds, tuple(samples), clock.cores)


async def open_loop(
    client: Client, requests: Sequence[bytes], rate: float, warm_up: float, seconds: float, seed: int = 0
) -> LoadResult:
    """Sends Poisson arrivals, ``rate`` per second, without waiting for responses. Raises ConnectionGoneError."""
    samples: list[Sample] = []
    order = itertools.cycle(requests)
    clock = _Clock(time.monotonic() + warm_up)
    tasks: set[asyncio.Task[None]] = set()
    failures: list[BaseException] = []

    def finished(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            failures.append(error)

    cpu = asyncio.create_task(clock.measure_cpu(seconds))
    for arrival in itertools.takewhile(lambda moment: moment < warm_up + seconds, arrivals(rate, seed)):
        planned = arrival - warm_up
        if (delay := planned - clock.now()) > 0:
            await asyncio.sleep(delay)
        elif len(tasks) % 16 == 0:  # behind schedule: still give the event loop time to read responses
            await asyncio.sleep(0)
        if failures:
            break
        task = asyncio.create_task(_send(client, next(order), clock, planned, samples))
        tasks.add(task)
        task.add_done_callback(finished)
    while tasks:
        await asyncio.wait(set(tasks))
        await asyncio.sleep(0)  # lets the tasks' callbacks run
    if failures:
        cpu.cancel()
        raise failures[0]
    await cpu
    return LoadResult("open", 0, rate, seconds, tuple(samples), clock.cores)


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Yields the times of a Poisson process with ``rate`` arrivals per second, starting at 0, without end."""
    generator, moment = random.Random(seed), 0.0
    while True:
        moment += generator.expovariate(rate)
        yield moment


class _Clock:
    """Time since the end of the warm-up, and the CPU time used after it."""

    def __init__(self, zero: float) -> None:
        self._zero = zero
        self.cores = 0.0

    def now(self) -> float:
        return time.monotonic() - self._zero

    async def measure_cpu(self, seconds: float) -> None:
        await asyncio.sleep(-self.now())
        began, used = time.monotonic(), time.process_time()
        await asyncio.sleep(seconds)
        self.cores = (time.process_time() - used) / (time.monotonic() - began)


async def _send_repeatedly(
    client: Client, order: Iterator[bytes], clock: _Clock, seconds: float, samples: list[Sample]
) -> None:
    while (now := clock.now()) < seconds:
        await _send(client, next(order), clock, now, samples)


async def _send(client: Client, request: bytes, clock: _Clock, planned: float, samples: list[Sample]) -> None:
    sent = clock.now()
    try:
        response = await client.send(request)
        outcome, body = str(response.status), b"" if response.status == 200 else response.body
    except NoResponseError as error:
        outcome, body = str(error), b""
    # uvloop rounds timers to milliseconds, so a request may leave up to 0.5 ms early. Its latency counts from then.
    samples.append(Sample(min(planned, sent), sent, clock.now(), outcome, body))
