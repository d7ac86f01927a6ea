"""A discrete-event simulation of the service: the real slots, pending requests and schedulers in virtual time.

HTTP workers decode images with the real queue of decode threads. There is no HTTP, no socket and no device. Run

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

from vitserve.service.decode_queue import DecodeQueue
from vitserve.service.engine_worker.pending import Completions, PendingRequests
from vitserve.service.ipc import memory_layout, wire_format
from vitserve.service.ipc.memory_layout import Shape
from vitserve.service.ipc.shared_memory import SlotTable, sort_key
from vitserve.service.ipc.slots import Slots, Ticket
from vitserve.service.scheduler import Batch, Scheduler

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


class _Worker:
    """An HTTP worker: its slots, and the images that wait for one of its decode threads."""

    def __init__(self, slot_table: SlotTable, index: int, decode_threads: int, decode_seconds: float) -> None:
        self.slots = Slots(slot_table, index, index)
        self.decode_queue = DecodeQueue[tuple[Arrival, Ticket]](decode_threads, decode_seconds)
        self.idle_threads = decode_threads


class Simulation:
    """Batches and decoding take exactly the measured seconds, messages no time.

    Records the outcome of every image by its id.
    """

    def __init__(
        self,
        workers: int = 2,
        engines: int = 2,
        streams: int = 2,
        slots_per_worker: int = 128,
        seconds: Mapping[int, float] = SECONDS,
        decode_seconds: float = 0.0,
        decode_threads: int = 2,
    ) -> None:
        """``decode_threads`` is the number per HTTP worker. Each takes ``decode_seconds`` for an image."""
        memory = memory_layout.create(Shape(workers, slots_per_worker, engines, streams, len(seconds), 1, 1), b"")
        self.slot_table, self.seconds = SlotTable(memory), seconds
        os.close(memory)
        self.finished: dict[int, float] = {}  # completion times
        self.rejected: dict[int, float] = {}  # retry_after_seconds
        self.expired: set[int] = set()
        self.rejected_decoded: set[int] = set()  # those of the rejected images that had been decoded
        self.duplicates: set[int] = set()  # images with more than one completion: none, unless there is a bug
        self._decode_seconds = decode_seconds
        self._workers = [_Worker(self.slot_table, index, decode_threads, decode_seconds) for index in range(workers)]
        self._engines = [_Engine(self.slot_table, index, seconds) for index in range(engines)]
        self._available_at = dict.fromkeys(range(engines), 0.0)
        self._in_flight: dict[int, Arrival] = {}  # by sequence number
        # Two heaps: the end of a batch, its engine, its stream; the end of decoding, a number, the image.
        self._running: list[tuple[float, int, int]] = []
        self._decoding: list[tuple[float, int, Arrival, Ticket]] = []

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
            + sum(len(worker.slots) + len(worker.decode_queue) for worker in self._workers)
            + sum(len(engine.pending) for engine in self._engines)
        )

    def _arrive(self, arrival: Arrival, now: float) -> None:
        worker = self._workers[arrival.worker]
        key = sort_key(arrival.priority, arrival.deadline)
        self.slot_table.count_arrivals(arrival.worker, arrival.priority)
        decoded_at = worker.decode_queue.decoded_at(key, 9 - arrival.priority, now)
        rejection = worker.slots.check(arrival.deadline, arrival.priority, now, self._available_at, decoded_at)
        if rejection is not None:
            self.rejected[arrival.id] = rejection.retry_after_seconds
            return
        ticket = worker.slots.take(arrival.deadline, arrival.priority)
        self._in_flight[ticket.sequence] = arrival
        if self._decode_seconds:
            worker.decode_queue.push(key, 9 - arrival.priority, (arrival, ticket), now)
            self._decode_next(worker, now)
        else:
            self._submit(arrival, ticket, now)

    def _decode_next(self, worker: _Worker, now: float) -> None:
        if worker.idle_threads and len(worker.decode_queue):
            worker.idle_threads -= 1
            arrival, ticket = worker.decode_queue.pop()
            heapq.heappush(self._decoding, (now + self._decode_seconds, ticket.sequence, arrival, ticket))

    def _submit(self, arrival: Arrival, ticket: Ticket, now: float) -> None:
        key = sort_key(arrival.priority, arrival.deadline)
        engine = self.slot_table.estimate_completion(key, now, self._available_at).engine
        self._workers[arrival.worker].slots.submit(ticket, engine)
        submission = wire_format.Submission(
            ticket.slot, wire_format.SUBMIT, ticket.priority, ticket.sequence, ticket.deadline
        )
        self._complete(self._engines[engine].pending.submit([(arrival.worker, submission)], now), now)

    def _advance(self, until: float) -> None:
        while (now := min(self._next_end(), self._next_decoded())) <= until and now < float("inf"):
            while self._next_end() == now:
                self._end_batch(now)
            while self._next_decoded() == now:
                self._end_decoding(now)
            if now < until:
                self._start(now)

    def _next_end(self) -> float:
        return self._running[0][0] if self._running else float("inf")

    def _next_decoded(self) -> float:
        return self._decoding[0][0] if self._decoding else float("inf")

    def _end_batch(self, now: float) -> None:
        _, index, stream = heapq.heappop(self._running)
        engine = self._engines[index]
        batch = engine.running.pop(stream)
        self._complete(engine.pending.complete(batch, now, failed=False), now)
        engine.pending.scheduler.done(batch, now)
        engine.publish()

    def _end_decoding(self, now: float) -> None:
        _, _, arrival, ticket = heapq.heappop(self._decoding)
        worker = self._workers[arrival.worker]
        worker.idle_threads += 1
        worker.decode_queue.done(self._decode_seconds)
        self._submit(arrival, ticket, now)
        self._decode_next(worker, now)

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
            ticket = self._workers[worker].slots.complete(completion.slot, completion.sequence)
            arrival = self._in_flight.pop(completion.sequence, None)
            if ticket is None or arrival is None:
                self.duplicates.add(completion.sequence)
            elif completion.outcome == wire_format.DONE:
                self.finished[arrival.id] = now
            elif completion.outcome == wire_format.EXPIRED:
                self.expired.add(arrival.id)
            else:
                self.rejected[arrival.id] = completion.retry_after_seconds
                self.rejected_decoded.add(arrival.id)


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
