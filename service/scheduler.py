"""Decides who is admitted and which requests form the next batch. Pure data structure: no I/O, no thread, no clock of its own.

So that a simulation runs a million requests in virtual time through the very code that serves (tests/test_scheduler.py).
Imported by runtime.py. Times are monotonic seconds given by the caller.

How it promises: requests wait in order of deadline (earliest first). A free lane takes the first ``knee`` of them at once, never waits
for more, and is busy for the measured seconds of that batch size. So when the request at position p will be done is plain
arithmetic, and one that would come too late, or would make an admitted one late, is refused on arrival.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

KNEE_SHARE = 0.95  # of the best throughput; a larger batch than reaches this only adds latency
_CORRECTION = 0.1  # weight of the newest measurement in the seconds per batch size

ShedReason = Literal["deadline", "full"]


@dataclass(frozen=True, slots=True, order=True)
class Request:
    """Ordered by deadline, then by arrival."""

    deadline: float  # when the caller stops caring, monotonic seconds
    id: int  # unique and rising


@dataclass(frozen=True, slots=True)
class Shed:
    """Refused: why, and in how many seconds the same request would be admitted if nobody else came."""

    reason: ShedReason
    retry_after_seconds: float


@dataclass(frozen=True, slots=True)
class Batch:
    lane: int
    requests: tuple[Request, ...]
    started: float


@dataclass
class Scheduler:
    """Raises ValueError where ``seconds`` lacks a batch size between 1 and its largest."""

    seconds: Mapping[int, float]  # measured seconds per batch size, 1 … largest
    lanes: int = 1
    capacity: int = 256  # requests waiting at the most
    _waiting: list[Request] = field(default_factory=list, init=False)
    _free_at: list[float] = field(init=False)  # per lane: when it will be free; in the past if it is
    _busy: list[bool] = field(init=False)
    _seconds: list[float] = field(init=False)  # index n - 1

    def __post_init__(self) -> None:
        sizes = sorted(self.seconds)
        if sizes != list(range(1, len(sizes) + 1)) or not sizes:
            raise ValueError(f"seconds are needed for every batch size from 1; given are {sizes}")
        self._seconds = [self.seconds[size] for size in sizes]
        self._free_at = [float("-inf")] * self.lanes
        self._busy = [False] * self.lanes
        self._settle()

    def admit(self, request: Request, now: float) -> Shed | None:
        """Queues the request, or says why not. None means admitted: it will be in exactly one batch, expire, or be withdrawn."""
        if len(self._waiting) >= self.capacity:
            return Shed("full", max(0.0, self._done_at(1, now) - now))
        index = bisect_left(self._waiting, request)
        late = self._done_at(index + 1, now) - request.deadline
        if late > 0:
            return Shed("deadline", late)
        # Those behind move one place back. Within a batch that changes nothing; only the last of each batch moves into a later one.
        first = (index // self.knee + 1) * self.knee - 1
        for place in range(first, len(self._waiting), self.knee):
            late = self._done_at(place + 2, now) - self._waiting[place].deadline
            if late > 0:
                return Shed("deadline", late)
        insort(self._waiting, request)
        return None

    def would_shed(self, deadline: float, now: float, ahead: int = 0) -> Shed | None:
        """What admit() would say to a new request of this deadline if ``ahead`` more requests than are queued came before it.

        An estimate for use before decoding. Constant time; those behind it are looked at only by admit().
        """
        place = bisect_left(self._waiting, Request(deadline, 2**62)) + ahead + 1
        if len(self._waiting) + ahead >= self.capacity:
            return Shed("full", max(0.0, self._done_at(1, now) - now))
        late = self._done_at(place, now) - deadline
        return Shed("deadline", late) if late > 0 else None

    def next_batch(self, lane: int, now: float) -> Batch | None:
        """What the free lane shall run now: the most urgent first; None if nobody waits."""
        if self._busy[lane]:
            raise ValueError(f"lane {lane} is still running a batch")
        if not self._waiting:
            return None
        requests = tuple(self._waiting[: self.knee])
        del self._waiting[: self.knee]
        self._busy[lane] = True
        self._free_at[lane] = now + self._monotone[len(requests) - 1]
        return Batch(lane, requests, now)

    def done(self, batch: Batch, now: float) -> None:
        """The batch has been answered; what it took corrects the measured seconds."""
        self.abandon(batch, now)
        index = len(batch.requests) - 1
        self._seconds[index] += _CORRECTION * (now - batch.started - self._seconds[index])
        self._settle()

    def abandon(self, batch: Batch, now: float) -> None:
        """The batch failed: its lane is free, and nothing was learned about how long one takes."""
        self._busy[batch.lane] = False
        self._free_at[batch.lane] = now

    def withdraw(self, request: Request) -> bool:
        """Takes a waiting request out (its caller has left); False if it is not waiting any more."""
        index = bisect_left(self._waiting, request)
        if index < len(self._waiting) and self._waiting[index] == request:
            del self._waiting[index]
            return True
        return False

    def expire(self, now: float) -> list[Request]:
        """Takes out those whose deadline has passed: the engine was slower than it was measured."""
        count = bisect_left(self._waiting, Request(now, -1))
        expired = self._waiting[:count]
        del self._waiting[:count]
        return expired

    def empty(self) -> list[Request]:
        """Takes out everybody: nothing more will be run."""
        waiting, self._waiting = self._waiting, []
        return waiting

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def measured(self) -> dict[int, float]:
        """Seconds per batch size, as corrected so far."""
        return dict(enumerate(self._seconds, start=1))

    def _done_at(self, place: int, now: float) -> float:
        """When the request at this place of the queue (from 1) is sure to be done, if the lanes take full batches in turn.

        A batch counts as full even if it is not yet: until a lane takes it, anybody may join it.
        """
        lanes = sorted(max(free, now) if busy else now for free, busy in zip(self._free_at, self._busy, strict=True))
        turn, lane = divmod((place - 1) // self.knee, len(lanes))
        return lanes[lane] + (turn + 1) * self._monotone[self.knee - 1]

    def _settle(self) -> None:
        """Derives the knee from the seconds: the smallest batch size within KNEE_SHARE of the best throughput."""
        rates = [size / seconds for size, seconds in enumerate(self._seconds, start=1)]
        best = max(rates)
        self.knee = next(size for size, rate in enumerate(rates, start=1) if rate >= KNEE_SHARE * best)
        # A batch is never promised sooner than a smaller one: noise in the measurements must not make it look so.
        self._monotone: list[float] = []
        for seconds in self._seconds:
            self._monotone.append(max(seconds, self._monotone[-1] if self._monotone else 0.0))
