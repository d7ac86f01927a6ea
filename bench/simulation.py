"""The serving core in virtual time: the slots, intakes and schedulers that serve, without HTTP, decoding, sockets and a device.

    python -m vitserve.bench.simulation

measures what the core itself costs an image, from a thousand images to a million. tests/bench/test_simulation.py checks what it promises.
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

from vitserve.service.engine_worker.pending import PendingRequests
from vitserve.service.ipc import memory_layout, wire_format
from vitserve.service.ipc.memory_layout import Shape
from vitserve.service.ipc.shared_memory import SlotTable, sort_key
from vitserve.service.ipc.slots import Slots, Ticket
from vitserve.service.scheduler import Batch, Rejection, Scheduler

# A device whose throughput grows until batches of four.
SECONDS = {1: 0.004, 2: 0.005, 3: 0.006, 4: 0.0065, 5: 0.0081, 6: 0.0097, 7: 0.0113, 8: 0.0129}
TIMEOUTS = (0.01, 0.02, 0.05, 0.2, 1.0)


class Arrival(NamedTuple):
    at: float
    worker: int
    priority: int
    deadline: float
    id: int


def capacity(engines: int, streams: int, seconds: Mapping[int, float] = SECONDS) -> float:
    """Images a second."""
    return engines * streams * max(size / each for size, each in seconds.items())


def poisson(
    count: int,
    rate: float,
    workers: int,
    seed: int,
    priorities: Sequence[int] = (5,),
    timeouts: Sequence[float] = TIMEOUTS,
) -> Iterator[Arrival]:
    """Poisson arrivals, ``rate`` a second, with a burst of 10 to 60 simultaneous ones now and then."""
    chance, now, made = random.Random(seed), 0.0, itertools.count()
    while True:
        burst = chance.randint(10, 60) if chance.random() < 0.002 else 1
        now += chance.expovariate(rate / (1 + 0.002 * 34)) if burst == 1 else 0.0
        for _ in range(burst):
            number = next(made)
            if number == count:
                return
            yield Arrival(
                now, chance.randrange(workers), chance.choice(priorities), now + chance.choice(timeouts), number
            )


class _Engine:
    def __init__(self, slot_table: SlotTable, index: int, seconds: Mapping[int, float]) -> None:
        self.index, self.slot_table = index, slot_table
        self.pending = PendingRequests(
            slot_table, index, Scheduler(seconds, slot_table.shape.streams, slot_table.shape.slots)
        )
        self.running: dict[int, Batch] = {}
        self.publish()

    def publish(self) -> None:
        self.slot_table.publish(self.index, self.pending.scheduler)


class Simulation:
    """Devices take exactly the measured seconds, messages no time. Keeps account of every image."""

    def __init__(
        self,
        workers: int = 2,
        engines: int = 2,
        streams: int = 2,
        share: int = 128,
        seconds: Mapping[int, float] = SECONDS,
    ) -> None:
        memory = memory_layout.create(Shape(workers, share, engines, streams, len(seconds), 1, 1, 1), b"")
        self.slot_table, self.seconds = SlotTable(memory), seconds
        os.close(memory)
        self.finished: dict[int, float] = {}
        self.rejection: dict[int, float] = {}  # with the seconds to wait that it was told
        self.expired: set[int] = set()
        self.twice: set[int] = set()  # ought to stay empty
        self._slots = [Slots(self.slot_table, worker, worker) for worker in range(workers)]
        self._engines = [_Engine(self.slot_table, index, seconds) for index in range(engines)]
        self._choice = dict.fromkeys(range(engines), 0.0)
        self._asked: dict[int, Arrival] = {}  # by sequence number
        self._busy: list[tuple[float, int, int]] = []  # when a batch ends, its engine, its stream

    def run(self, arrivals: Iterable[Arrival]) -> None:
        """``arrivals`` in order of time; those of one moment in any order."""
        for now, together in itertools.groupby(arrivals, key=lambda arrival: arrival.at):
            self._advance(now)
            for arrival in sorted(together, key=lambda each: (-each.priority, each.deadline, each.id)):
                self._arrive(arrival, now)
            self._start(now)
        self._advance(float("inf"))

    def leaks(self) -> int:
        """Slots that did not come back."""
        return (
            self.slot_table.count(memory_layout.HELD, memory_layout.WAITING, memory_layout.RUNNING)
            + sum(map(len, self._slots))
            + sum(each.pending.held for each in self._engines)
        )

    def _arrive(self, arrival: Arrival, now: float) -> None:
        slots = self._slots[arrival.worker]
        admitted = slots.admit(arrival.deadline, arrival.priority, now, self._choice)
        if isinstance(admitted, Rejection):
            self.rejection[arrival.id] = admitted.retry_after_seconds
        else:
            self._asked[admitted.sequence] = arrival
            self._submit(arrival, slots, admitted, now)

    def _submit(self, arrival: Arrival, slots: Slots, ticket: Ticket, now: float) -> None:
        chosen = self.slot_table.estimate_completion(
            sort_key(arrival.priority, arrival.deadline), now, self._choice
        ).engine
        slots.submit(ticket, chosen)
        submission = wire_format.Submission(
            ticket.slot, wire_format.ASK, ticket.priority, ticket.sequence, ticket.deadline
        )
        for worker, answer in self._engines[chosen].pending.submit([(arrival.worker, submission)], now):
            self._take(worker, answer, now)

    def _advance(self, until: float) -> None:
        while self._busy and self._busy[0][0] <= until:
            now = self._busy[0][0]
            while self._busy and self._busy[0][0] == now:
                _, index, stream = heapq.heappop(self._busy)
                engine = self._engines[index]
                batch = engine.running.pop(stream)
                for worker, answer in engine.pending.close(batch, now, failed=False):
                    self._take(worker, answer, now)
                engine.pending.scheduler.done(batch, now)
                engine.publish()
            if now < until:
                self._start(now)

    def _start(self, now: float) -> None:
        for engine in self._engines:
            for worker, answer in engine.pending.expire(now):
                self._take(worker, answer, now)
            for stream in range(self.slot_table.shape.streams):
                if stream not in engine.running and (work := engine.pending.next_batch(stream, now)) is not None:
                    engine.running[stream] = work[0]
                    heapq.heappush(self._busy, (now + self.seconds[len(work[1])], engine.index, stream))
                    engine.publish()

    def _take(self, worker: int, answer: wire_format.Answer, now: float) -> None:
        ticket = self._slots[worker].answered(answer.slot, answer.sequence)
        asked = self._asked.pop(answer.sequence, None)
        if ticket is None or asked is None:
            self.twice.add(answer.sequence)
        elif answer.outcome == wire_format.DONE:
            self.finished[asked.id] = now
        elif answer.outcome == wire_format.EXPIRED:
            self.expired.add(asked.id)
        else:
            self.rejection[asked.id] = answer.retry_after_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--load", type=float, default=1.5, help="times what the engines can do")
    options = parser.parse_args()
    table = Table(
        "images",
        "µs an image",
        "answered",
        title=f"two HTTP workers, two engines of two streams, {options.load} × their capacity",
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
