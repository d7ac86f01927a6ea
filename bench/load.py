"""Closed and open loop: who asks when, and what became of each request."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vitserve.bench.alarm import alarm
from vitserve.bench.client import Client, NoResponseError

Loop = Literal["closed", "open"]


class Sample(NamedTuple):
    """One request. Times are seconds since the warm-up ended; before that they are negative."""

    planned: float  # when it was to leave; in a closed loop that is when it left
    sent: float
    ended: float
    outcome: str  # the status, or why there is none
    body: bytes  # of a rejection; answers' own are read and dropped

    @property
    def seconds(self) -> float:
        """Counted from the planned arrival: a service that stalls is not spared those that would have come meanwhile."""
        return self.ended - self.planned


@dataclass(frozen=True)
class Run:
    loop: Loop
    connections: int  # 0 in an open loop, which opens what it needs
    rate: float  # planned arrivals a second; 0 in a closed loop
    seconds: float  # of measurement, after the warm-up
    samples: tuple[Sample, ...]  # of the warm-up too
    client_cores: float  # of CPU that this process took meanwhile

    def counted(self) -> list[Sample]:
        """Those of the measurement: in a closed loop what ended in it, in an open loop what was planned in it."""
        if self.loop == "closed":
            return [each for each in self.samples if 0 <= each.ended < self.seconds]
        return [each for each in self.samples if 0 <= each.planned < self.seconds]


async def closed_loop(
    client: Client, requests: Sequence[bytes], connections: int, warm_up: float, seconds: float
) -> Run:
    """So many clients, each asking again as soon as it is answered. Raises Gone."""
    samples: list[Sample] = []
    order = itertools.cycle(requests)
    measured = _Span(time.monotonic() + warm_up)
    tasks = [asyncio.create_task(_caller(client, order, measured, seconds, samples)) for _ in range(connections)]
    await _all(tasks, measured, seconds)
    return Run("closed", connections, 0.0, seconds, tuple(samples), measured.cores())


async def open_loop(
    client: Client, requests: Sequence[bytes], rate: float, warm_up: float, seconds: float, seed: int = 0
) -> Run:
    """Poisson arrivals, which wait for nobody. Raises Gone."""
    samples: list[Sample] = []
    order = itertools.cycle(requests)
    measured = _Span(time.monotonic() + warm_up)
    tasks: set[asyncio.Task[None]] = set()
    failures: list[BaseException] = []

    def finished(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            failures.append(error)

    watch = asyncio.create_task(measured.watch(seconds))
    with alarm() as clock:
        for arrival in itertools.takewhile(lambda moment: moment < warm_up + seconds, arrivals(rate, seed)):
            due = arrival - warm_up
            if measured.zero + due > time.monotonic():
                await clock.until(measured.zero + due)
            elif len(tasks) % 16 == 0:  # behind: still let answers be read in between
                await asyncio.sleep(0)
            if failures:
                break
            task = asyncio.create_task(_ask(client, next(order), measured, due, samples))
            tasks.add(task)
            task.add_done_callback(finished)
    while tasks:
        await asyncio.wait(set(tasks))
        await asyncio.sleep(0)  # their callbacks
    if failures:
        watch.cancel()
        raise failures[0]
    await watch
    return Run("open", 0, rate, seconds, tuple(samples), measured.cores())


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Moments of a Poisson process, ``rate`` a second, from 0 on, without end."""
    chance, moment = random.Random(seed), 0.0
    while True:
        moment += chance.expovariate(rate)
        yield moment


class _Span:
    """The time of measurement, and the CPU that this process takes in it."""

    def __init__(self, zero: float) -> None:
        self.zero = zero
        self._cores = 0.0

    def now(self) -> float:
        return time.monotonic() - self.zero

    async def watch(self, seconds: float) -> None:
        await asyncio.sleep(-self.now())
        began, used = time.monotonic(), time.process_time()
        await asyncio.sleep(seconds)
        self._cores = (time.process_time() - used) / (time.monotonic() - began)

    def cores(self) -> float:
        return self._cores


async def _all(tasks: Sequence[asyncio.Task[None]], measured: _Span, seconds: float) -> None:
    try:
        await asyncio.gather(measured.watch(seconds), *tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _caller(
    client: Client, order: Iterator[bytes], measured: _Span, seconds: float, samples: list[Sample]
) -> None:
    while (now := measured.now()) < seconds:
        await _ask(client, next(order), measured, now, samples)


async def _ask(client: Client, request: bytes, measured: _Span, planned: float, samples: list[Sample]) -> None:
    sent = measured.now()
    try:
        answer = await client.ask(request)
        outcome, body = str(answer.status), b"" if answer.status == 200 else answer.body
    except NoResponseError as error:
        outcome, body = str(error), b""
    samples.append(Sample(planned, sent, measured.now(), outcome, body))
