"""Decides who is admitted and which requests form the next batch. Pure data structure: no I/O, no thread, no clock of its own.

So that a simulation runs a million requests in virtual time through the very code that serves (tests/service/test_scheduler.py).
Imported by intake.py and ring.py. Times are monotonic seconds given by the caller.

How it promises: requests wait in order of priority, then of deadline (earliest first). A free lane takes the first ``knee`` of them at
once, never waits for more, and is busy for the seconds promised for that batch size. So when the request at position p will be done is
plain arithmetic, and one that would come too late, or would make an admitted one late, is refused on arrival.

Were that all, a crowd of unimportant requests would fill the time up to their deadlines, and an urgent one would be refused for their sake.
So room is left for as many urgent ones as have come of late: what waits behind them is expected to wait longer (the waiting time of a queue
with priorities, Cobham 1954). Where all have one priority, nothing is set aside.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import exp
from typing import Literal, NamedTuple

KNEE_SHARE = 0.95  # of the best throughput; a larger batch than reaches this only adds latency
_CORRECTION = 0.1  # weight of the newest measurement in the seconds per batch size, and in their deviation
RANKS = 10
_MOST_RESERVED = 0.95  # of an engine's time; so that a flood of urgent requests does not set aside all of it for ever
_RECENT_SECONDS = 5.0  # over which the arrivals of each rank are averaged
_CAUTION = 2.0  # mean deviations by which a promise is longer than the mean; none where batches always take the same
TOLERATED = 0.003  # share of the admitted that may miss their deadline; promises grow longer until it is no more
_STEP = 0.02  # by which a promise grows when one is late
_TOGETHER = 3
_WIDEST = 1.0
_OUTLIER = 4.0  # times the mean, as which a batch counts that took longer: one that was stopped for a minute says nothing about the next

ShedReason = Literal["deadline", "full"]


class Request(NamedTuple):
    """Ordered by rank, then deadline, then id. Lower is sooner."""

    rank: int  # 0 is the most urgent, RANKS - 1 the least
    deadline: float  # when the caller stops caring, monotonic seconds
    id: int  # unique
    alone: bool = False  # runs in a batch of its own: an engine died while it ran this one
    restored: bool = False  # admitted by an engine that is gone: if it is late, that is why


class Shed(NamedTuple):
    """Refused: why, and in how many seconds the same request would be admitted if nobody else came."""

    reason: ShedReason
    retry_after_seconds: float


class Batch(NamedTuple):
    lane: int
    requests: tuple[Request, ...]
    started: float


def done_at(place: int, now: float, free_at: Sequence[float], knee: int, seconds: float, reserved: float = 0.0) -> float:
    """When the request at this place of the queue (from 1) is sure to be done, if the lanes take full batches in turn.

    ``free_at`` is when each lane will be free, in the past where it is; ``seconds`` what a batch of ``knee`` takes; ``reserved`` the share of
    the time that will go to more urgent ones still to come. A batch counts as full even if it is not yet: until a lane takes it, anybody may join it.
    """
    turn, lane = divmod((place - 1) // knee, len(free_at))
    wait = max(0.0, sorted(free_at)[lane] - now) + turn * seconds
    return now + wait / (1 - reserved) + seconds


def caution_at(place: int, now: float, free_at: Sequence[float], caution: float) -> float:
    """How many times a batch's mean is promised at this place: once where it finds an idle lane, so that whoever is too cautious learns it."""
    return 1.0 if place == 1 and min(free_at) <= now else caution


@dataclass
class Scheduler:
    """Raises ValueError where ``seconds`` lacks a batch size between 1 and its largest."""

    seconds: Mapping[int, float]  # measured seconds per batch size, 1 … largest
    lanes: int = 1
    capacity: int = 256  # requests waiting at the most
    margin: float = 0.0  # share by which promises are longer than batches and their deviation say; learned from those that were late
    free_at: list[float] = field(init=False)  # per lane: when it will be free; in the past if it is
    measured: list[float] = field(init=False)  # seconds per batch size from 1, as corrected so far
    reserved: list[float] = field(init=False)  # per rank: share of the time that is left to the more urgent ones
    _waiting: list[Request] = field(default_factory=list, init=False)
    _busy: list[bool] = field(init=False)
    _arrivals: list[float] = field(init=False)  # per rank, each counting less the longer ago it was
    _arrived: list[int] = field(init=False)  # per rank, since they were last counted
    _counted_at: float = field(default=0.0, init=False)
    _deviation: float = field(default=0.0, init=False)  # mean of |taken / expected - 1|

    def __post_init__(self) -> None:
        sizes = sorted(self.seconds)
        if sizes != list(range(1, len(sizes) + 1)) or not sizes:
            raise ValueError(f"seconds are needed for every batch size from 1; given are {sizes}")
        self.measured = [self.seconds[size] for size in sizes]
        self.free_at = [0.0] * self.lanes
        self._busy = [False] * self.lanes
        self.reserved = [0.0] * RANKS
        self._arrivals, self._arrived = [0.0] * RANKS, [0] * RANKS
        self.knee = _knee(self.measured)
        self._settle()

    def admit(self, request: Request, now: float) -> Shed | None:
        """Queues the request, or says why not. None means admitted: it will be in exactly one batch, expire, or be withdrawn."""
        self._count_arrival(request.rank, now)
        if len(self._waiting) >= self.capacity:
            return Shed("full", max(0.0, self._done_at(1, now) - now))
        index = bisect_left(self._waiting, request)
        late = self._done_at(index + 1, now, self.reserved[request.rank]) - request.deadline
        if late > 0:
            pace = (1 - self.reserved[request.rank]) / caution_at(index + 1, now, self.free_at, self.caution)
            return Shed("deadline", late * pace)  # in which the wait before it shrinks by so much
        # Those behind move one place back. Within a batch that changes nothing; only the last of each batch moves into a later one.
        first = (index // self.knee + 1) * self.knee - 1
        for place in range(first, len(self._waiting), self.knee):
            late = self._done_at(place + 2, now) - self._waiting[place].deadline
            if late > 0 and self._done_at(place + 1, now) <= self._waiting[place].deadline:  # it would not be late anyway
                return Shed("deadline", late / self.caution)
        self._waiting.insert(index, request)
        return None

    def restore(self, request: Request) -> None:
        """Queues one that has been admitted before, by an engine that is gone. It is never refused."""
        insort(self._waiting, request)

    def next_batch(self, lane: int, now: float) -> Batch | None:
        """What the free lane shall run now: the most urgent first; None if nobody waits."""
        if self._busy[lane]:
            raise ValueError(f"lane {lane} is still running a batch")
        if not self._waiting:
            return None
        count = 1
        if not self._waiting[0].alone:
            while count < min(self.knee, len(self._waiting)) and not self._waiting[count].alone:
                count += 1
        requests = tuple(self._waiting[:count])
        del self._waiting[:count]
        self._busy[lane] = True
        self.free_at[lane] = now + self.promised(count)
        return Batch(lane, requests, now)

    def done(self, batch: Batch, now: float) -> None:
        """The batch has been answered; what it took corrects the measured seconds."""
        self.abandon(batch, now)
        index = len(batch.requests) - 1
        expected = self.measured[index]
        taken = min(now - batch.started, _OUTLIER * expected)
        self._deviation += _CORRECTION * (min(1.0, abs(taken / expected - 1)) - self._deviation)
        self.measured[index] += _CORRECTION * (taken - expected)
        self._settle()
        self._learn(batch.requests, now)

    def abandon(self, batch: Batch, now: float) -> None:
        """The batch failed: its lane is free, and nothing was learned about how long one takes."""
        self._busy[batch.lane] = False
        self.free_at[batch.lane] = now

    def withdraw(self, request: Request) -> bool:
        """Takes a waiting request out (its caller has left); False if it is not waiting any more."""
        index = bisect_left(self._waiting, request)
        if index < len(self._waiting) and self._waiting[index] == request:
            del self._waiting[index]
            return True
        return False

    def expire(self, now: float) -> list[Request]:
        """Takes out those whose deadline has passed: the engine was slower than it was measured."""
        expired: list[Request] = []
        start = 0
        while start < len(self._waiting):  # one turn a rank: within it, the expired are the first
            rank = self._waiting[start].rank
            end = bisect_left(self._waiting, (rank, now), start)
            expired += self._waiting[start:end]
            del self._waiting[start:end]
            start = bisect_left(self._waiting, (rank + 1,), start)
        self._learn(expired, now)
        return expired

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def caution(self) -> float:
        """How many times the mean a promise is: by as much longer as batches vary, and as promises were broken of late."""
        return 1 + _CAUTION * self._deviation + self.margin

    def promised(self, size: int) -> float:
        """Seconds that a batch of this size will take, to be relied on."""
        return self.mean(size) * self.caution

    def mean(self, size: int) -> float:
        return self._monotone[size - 1]

    def _done_at(self, place: int, now: float, reserved: float = 0.0) -> float:
        seconds = self.mean(self.knee) * caution_at(place, now, self.free_at, self.caution)
        return done_at(place, now, self.free_at, self.knee, seconds, reserved)

    def _count_arrival(self, rank: int, now: float) -> None:
        """What is set aside follows in steps of a fiftieth of the time over which it is averaged, so that most arrivals cost next to nothing."""
        self._arrived[rank] += 1
        if now - self._counted_at < _RECENT_SECONDS / 50:
            return
        decay = exp((self._counted_at - now) / _RECENT_SECONDS)
        self._counted_at = now
        self._arrivals = [count * decay + new for count, new in zip(self._arrivals, self._arrived, strict=True)]
        self._arrived = [0] * RANKS
        share = self.promised(self.knee) / (self.knee * self.lanes * _RECENT_SECONDS)  # of the time that one request takes
        self.reserved = [min(_MOST_RESERVED, before * share) for before in accumulate(self._arrivals[:-1], initial=0.0)]

    def _learn(self, ended: Sequence[Request], now: float) -> None:
        """A machine that slows down for longer than a batch (a neighbour, the front decoding) makes all that wait late, which no deviation foretells.

        Those that are late together are late for one reason: more than a few count as a few.
        """
        judged = [request for request in ended if not request.restored]
        late = min(_TOGETHER, sum(now > request.deadline for request in judged))
        self.margin = min(_WIDEST, max(0.0, self.margin + _STEP * (late - TOLERATED * len(judged))))

    def _settle(self) -> None:
        # A batch is never promised sooner than a smaller one: noise in the measurements must not make it look so.
        self._monotone = list(accumulate(self.measured, max))


def _knee(seconds: Sequence[float]) -> int:
    """The smallest batch size within KNEE_SHARE of the best throughput.

    Of seconds that were measured one after the other on an otherwise idle engine. Those of the batches that serve do not compare: the larger are
    run under load and the smaller when there is little, one above the knee never, and the knee would wander to whichever was last run at ease.
    """
    rates = [size / each for size, each in enumerate(seconds, start=1)]
    enough = KNEE_SHARE * max(rates)
    return next(size for size, rate in enumerate(rates, start=1) if rate >= enough)
