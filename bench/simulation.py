"""A discrete-event simulation of the service: the real slots, pending requests and schedulers in virtual time.

There is no HTTP, no decoding, no socket and no device. Run

    python -m vitserve.bench.simulation

to measure the cost of the core per image. tests/bench/test_simulation.py checks its guarantees.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from vitserve.service.engine_worker.pending import Completions, PendingRequests
from vitserve.service.ipc import memory_layout, wire_format
from vitserve.service.ipc.memory_layout import Shape
from vitserve.service.ipc.shared_memory import SlotTable, sort_key
from vitserve.service.ipc.slots import Slots, Ticket
from vitserve.service.scheduler import Batch, Rejection, Scheduler

# Seconds per batch size of a device whose throughput grows up to batches of four.
SECONDS = {1: 0.004, 2: 0.005, 3: 0.006, 4: 0.0065, 5: 0.0081, 6: 0.0097, 7: 0.0113, 8: 0.0129}
TIMEOUTS = (0.01, 0.02, 0.05, 0.2, 1.0)


class Arrival(NamedTuple):
    at: float
    worker: int
    priority: int
    deadline: float
    id: int


def capacity(engines: int, streams: int, seconds: Mapping[int, float] = SECONDS) -> float:
    """Images per second."""
    return engines * streams * max(size / duration for size, duration in seconds.items())


def poisson(
    count: int,
    rate: float,
    workers: int,
    seed: int,
    priorities: Sequence[int] = (5,),
    timeouts: Sequence[float] = TIMEOUTS,
) -> Iterator[Arrival]:
    """Poisson arrivals, ``rate`` per second, with occasional bursts of 10 to 60 simultaneous arrivals."""
    generator, now, ids = random.Random(seed), 0.0, itertools.count()
    while True:
        burst = generator.randint(10, 60) if generator.random() < 0.002 else 1
        now += generator.expovariate(rate / (1 + 0.002 * 34)) if burst == 1 else 0.0
        for _ in range(burst):
            number = next(ids)
            if number == count:
                return
            worker, priority = generator.randrange(workers), generator.choice(priorities)
            yield Arrival(now, worker, priority, now + generator.choice(timeouts), number)


class _Engine:
    def __init__(self, slot_table: SlotTable, index: int, seconds: Mapping[int, float]) -> None:
        self.index, self.slot_table = index, slot_table
        scheduler = Scheduler(seconds, slot_table.shape.streams, slot_table.shape.slots)
        self.pending = PendingRequests(slot_table, index, scheduler)
        self.running: dict[int, Batch] = {}
        self.publish()

    def publish(self) -> None:
        self.slot_table.publish(self.index, self.pending.scheduler)


class Simulation:
    """Batches take exactly the measured seconds, messages no time. Records the outcome of every image by its id."""

    def __init__(
        self,
        workers: int = 2,
        engines: int = 2,
        streams: int = 2,
        slots_per_worker: int = 128,
        seconds: Mapping[int, float] = SECONDS,
    ) -> None:
        memory = memory_layout.create(Shape(workers, slots_per_worker, engines, streams, len(seconds), 1, 1), b"")
        self.slot_table, self.seconds = SlotTable(memory), seconds
        os.close(memory)
        self.finished: dict[int, float] = {}  # completion times
        self.rejected: dict[int, float] = {}  # retry_after_seconds
        self.expired: set[int] = set()
        self.duplicates: set[int] = set()  # images with more than one completion: none, unless there is a bug
        self._slots = [Slots(self.slot_table, worker, worker) for worker in range(workers)]
        self._engines = [_Engine(self.slot_table, index, seconds) for index in range(engines)]
        self._available_at = dict.fromkeys(range(engines), 0.0)
        self._in_flight: dict[int, Arrival] = {}  # by sequence number
        self._running: list[tuple[float, int, int]] = []  # a heap: end of a batch, its engine, its stream

    def run(self, arrivals: Iterable[Arrival]) -> None:
        """``arrivals`` are ordered by time. The order of simultaneous arrivals does not matter."""
        for now, simultaneous in itertools.groupby(arrivals, key=lambda arrival: arrival.at):
            self._advance(now)
            for arrival in sorted(simultaneous, key=lambda arrival: (-arrival.priority, arrival.deadline, arrival.id)):
                self._arrive(arrival, now)
            self._start(now)
        self._advance(float("inf"))

    def leaks(self) -> int:
        """Slots and pending images that are left over after run()."""
        return (
            self.slot_table.count(memory_layout.HELD, memory_layout.WAITING, memory_layout.RUNNING)
            + sum(map(len, self._slots))
            + sum(len(engine.pending) for engine in self._engines)
        )

    def _arrive(self, arrival: Arrival, now: float) -> None:
        slots = self._slots[arrival.worker]
        admission = slots.admit(arrival.deadline, arrival.priority, now, self._available_at)
        if isinstance(admission, Rejection):
            self.rejected[arrival.id] = admission.retry_after_seconds
        else:
            self._in_flight[admission.sequence] = arrival
            self._submit(arrival, slots, admission, now)

    def _submit(self, arrival: Arrival, slots: Slots, ticket: Ticket, now: float) -> None:
        key = sort_key(arrival.priority, arrival.deadline)
        engine = self.slot_table.estimate_completion(key, now, self._available_at).engine
        slots.submit(ticket, engine)
        submission = wire_format.Submission(
            ticket.slot, wire_format.SUBMIT, ticket.priority, ticket.sequence, ticket.deadline
        )
        self._complete(self._engines[engine].pending.submit([(arrival.worker, submission)], now), now)

    def _advance(self, until: float) -> None:
        while self._running and self._running[0][0] <= until:
            now = self._running[0][0]
            while self._running and self._running[0][0] == now:
                _, index, stream = heapq.heappop(self._running)
                engine = self._engines[index]
                batch = engine.running.pop(stream)
                self._complete(engine.pending.complete(batch, now, failed=False), now)
                engine.pending.scheduler.done(batch, now)
                engine.publish()
            if now < until:
                self._start(now)

    def _start(self, now: float) -> None:
        for engine in self._engines:
            self._complete(engine.pending.expire(now), now)
            for stream in range(self.slot_table.shape.streams):
                if stream not in engine.running and (work := engine.pending.next_batch(stream, now)) is not None:
                    batch, slots = work
                    engine.running[stream] = batch
                    heapq.heappush(self._running, (now + self.seconds[len(slots)], engine.index, stream))
                    engine.publish()

    def _complete(self, completions: Completions, now: float) -> None:
        for worker, completion in completions:
            ticket = self._slots[worker].complete(completion.slot, completion.sequence)
            arrival = self._in_flight.pop(completion.sequence, None)
            if ticket is None or arrival is None:
                self.duplicates.add(completion.sequence)
            elif completion.outcome == wire_format.DONE:
                self.finished[arrival.id] = now
            elif completion.outcome == wire_format.EXPIRED:
                self.expired.add(arrival.id)
            else:
                self.rejected[arrival.id] = completion.retry_after_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--load", type=float, default=1.5, help="offered load as a multiple of the capacity")
    options = parser.parse_args()
    table = Table(
        "images",
        "µs per image",
        "finished",
        title=f"two HTTP workers, two engine workers of two streams each, {options.load} × their capacity",
    )
    for count in options.counts:
        simulation = Simulation()
        arrivals = list(poisson(count, options.load * capacity(2, 2), workers=2, seed=0))
        began = time.process_time()
        simulation.run(arrivals)
        table.add_row(
            f"{count:,}",
            f"{(time.process_time() - began) / count * 1e6:.1f}",
            f"{len(simulation.finished) / count:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
