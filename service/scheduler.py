"""Decides who is admitted and which requests form the next batch. Pure data structure: no I/O, no thread, no clock of its own.

So that a simulation runs a million requests in virtual time through the very code that serves (tests/service/test_scheduler.py). Times are monotonic seconds given by the client.

How it promises: requests wait in order of priority, then of deadline (earliest first). A free stream takes the first ``preferred batch size`` of them at
once, never waits for more, and is busy for the seconds promised for that batch size. So when the request at position p will be done is
plain arithmetic, and one that would come too late, or would make an admitted one late, is rejected on arrival.

Were that all, a crowd of unimportant requests would fill the time up to their deadlines, and an urgent one would be rejected for their sake.
So room is left for as many urgent ones as have come recently: what waits behind them is expected to wait longer (the waiting time of a queue
with priorities, Cobham 1954). Where all have one priority, nothing is set aside.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import exp
from typing import Literal, NamedTuple

PREFERRED_BATCH_THROUGHPUT = 0.95  # of the best throughput; a larger batch than reaches this only adds latency
_CORRECTION = 0.1  # weight of the newest measurement in the seconds per batch size, and in their deviation
PRIORITY_LEVELS = 10
_MOST_RESERVED = 0.95  # of an engine's time; so that a flood of urgent requests does not set aside all of it for ever
_RECENT_SECONDS = 5.0  # over which the arrivals of each rank are averaged
_SAFETY_DEVIATIONS = (
    2.0  # mean deviations by which a promise is longer than the mean; none where batches always take the same
)
TOLERATED = 0.003  # share of the admitted that may miss their deadline; promises grow longer until it is no more
_STEP = 0.02  # by which a promise grows when one is late
_TOGETHER = 3
_WIDEST = 1.0
_OUTLIER = 4.0  # times the mean, as which a batch counts that took longer: one that was stopped for a minute says nothing about the next

RejectionReason = Literal["deadline", "full"]


class Request(NamedTuple):
    """Ordered by rank, then deadline, then id. Lower is sooner."""

    priority_level: int  # 0 is the most urgent, RANKS - 1 the least
    deadline: float  # when the client stops caring, monotonic seconds
    id: int  # unique
    alone: bool = False  # runs in a batch of its own: an engine died while it ran this one
    restored: bool = False  # admitted by an engine that is gone: if it is late, that is why


class Rejection(NamedTuple):
    """Refused: why, and in how many seconds the same request would be admitted if nobody else came."""

    reason: RejectionReason
    retry_after_seconds: float


class Batch(NamedTuple):
    stream: int
    requests: tuple[Request, ...]
    started: float


def done_at(
    place: int, now: float, free_at: Sequence[float], preferred_batch_size: int, seconds: float, reserved: float = 0.0
) -> float:
    """When the request at this place of the queue (from 1) is sure to be done, if the streams take full batches in turn.

    ``free_at`` is when each stream will be free, in the past where it is; ``seconds`` what a batch of ``preferred batch size`` takes; ``reserved`` the share of
    the time that will go to more urgent ones still to come. A batch counts as full even if it is not yet: until a stream takes it, anybody may join it.
    """
    turn, stream = divmod((place - 1) // preferred_batch_size, len(free_at))
    wait = max(0.0, sorted(free_at)[stream] - now) + turn * seconds
    return now + wait / (1 - reserved) + seconds


def safety_factor_at(place: int, now: float, free_at: Sequence[float], safety_factor: float) -> float:
    """How many times a batch's mean is promised at this place: once where it finds an idle stream, so that whoever is too cautious learns it."""
    return 1.0 if place == 1 and min(free_at) <= now else safety_factor


@dataclass
class Scheduler:
    """Raises ValueError where ``seconds`` lacks a batch size between 1 and its largest."""

    seconds: Mapping[int, float]  # measured seconds per batch size, 1 … largest
    streams: int = 1
    capacity: int = 256  # requests waiting at the most
    safety_margin: float = 0.0  # share by which promises are longer than batches and their deviation say; learned from those that were late
    free_at: list[float] = field(init=False)  # per stream: when it will be free; in the past if it is
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
        self.free_at = [0.0] * self.streams
        self._busy = [False] * self.streams
        self.reserved = [0.0] * PRIORITY_LEVELS
        self._arrivals, self._arrived = [0.0] * PRIORITY_LEVELS, [0] * PRIORITY_LEVELS
        self.preferred_batch_size = _preferred_batch_size(self.measured)
        self._settle()

    def admit(self, request: Request, now: float) -> Rejection | None:
        """Queues the request, or says why not. None means admitted: it will be in exactly one batch, expire, or be withdrawn."""
        self._count_arrival(request.priority_level, now)
        if len(self._waiting) >= self.capacity:
            return Rejection("full", max(0.0, self._done_at(1, now) - now))
        index = bisect_left(self._waiting, request)
        late = self._done_at(index + 1, now, self.reserved[request.priority_level]) - request.deadline
        if late > 0:
            pace = (1 - self.reserved[request.priority_level]) / safety_factor_at(
                index + 1, now, self.free_at, self.safety_factor
            )
            return Rejection("deadline", late * pace)  # in which the wait before it shrinks by so much
        # Those behind move one place back. Within a batch that changes nothing; only the last of each batch moves into a later one.
        first = (index // self.preferred_batch_size + 1) * self.preferred_batch_size - 1
        for place in range(first, len(self._waiting), self.preferred_batch_size):
            late = self._done_at(place + 2, now) - self._waiting[place].deadline
            if (
                late > 0 and self._done_at(place + 1, now) <= self._waiting[place].deadline
            ):  # it would not be late anyway
                return Rejection("deadline", late / self.safety_factor)
        self._waiting.insert(index, request)
        return None

    def restore(self, request: Request) -> None:
        """Queues one that has been admitted before, by an engine that is gone. It is never rejected."""
        insort(self._waiting, request)

    def next_batch(self, stream: int, now: float) -> Batch | None:
        """What the free stream shall run now: the most urgent first; None if nobody waits."""
        if self._busy[stream]:
            raise ValueError(f"stream {stream} is still running a batch")
        if not self._waiting:
            return None
        count = 1
        if not self._waiting[0].alone:
            while count < min(self.preferred_batch_size, len(self._waiting)) and not self._waiting[count].alone:
                count += 1
        requests = tuple(self._waiting[:count])
        del self._waiting[:count]
        self._busy[stream] = True
        self.free_at[stream] = now + self.conservative_seconds(count)
        return Batch(stream, requests, now)

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
        """The batch failed: its stream is free, and nothing was learned about how long one takes."""
        self._busy[batch.stream] = False
        self.free_at[batch.stream] = now

    def withdraw(self, request: Request) -> bool:
        """Takes a waiting request out (its client has left); False if it is not waiting any more."""
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
            priority_level = self._waiting[start].priority_level
            end = bisect_left(self._waiting, (priority_level, now), start)
            expired += self._waiting[start:end]
            del self._waiting[start:end]
            start = bisect_left(self._waiting, (priority_level + 1,), start)
        self._learn(expired, now)
        return expired

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def safety_factor(self) -> float:
        """How many times the mean a promise is: by as much longer as batches vary, and as promises were broken recently."""
        return 1 + _SAFETY_DEVIATIONS * self._deviation + self.safety_margin

    def conservative_seconds(self, size: int) -> float:
        """Seconds that a batch of this size will take, to be relied on."""
        return self.estimated_seconds(size) * self.safety_factor

    def estimated_seconds(self, size: int) -> float:
        return self._monotone[size - 1]

    def _done_at(self, place: int, now: float, reserved: float = 0.0) -> float:
        seconds = self.estimated_seconds(self.preferred_batch_size) * safety_factor_at(
            place, now, self.free_at, self.safety_factor
        )
        return done_at(place, now, self.free_at, self.preferred_batch_size, seconds, reserved)

    def _count_arrival(self, priority_level: int, now: float) -> None:
        """What is set aside follows in steps of a fiftieth of the time over which it is averaged, so that most arrivals cost next to nothing."""
        self._arrived[priority_level] += 1
        if now - self._counted_at < _RECENT_SECONDS / 50:
            return
        decay = exp((self._counted_at - now) / _RECENT_SECONDS)
        self._counted_at = now
        self._arrivals = [count * decay + new for count, new in zip(self._arrivals, self._arrived, strict=True)]
        self._arrived = [0] * PRIORITY_LEVELS
        share = self.conservative_seconds(self.preferred_batch_size) / (
            self.preferred_batch_size * self.streams * _RECENT_SECONDS
        )  # of the time that one request takes
        self.reserved = [min(_MOST_RESERVED, before * share) for before in accumulate(self._arrivals[:-1], initial=0.0)]

    def _learn(self, ended: Sequence[Request], now: float) -> None:
        """A machine that slows down for longer than a batch (a neighbor, the HTTP worker decoding) makes all that wait late, which no deviation foretells.

        Those that are late together are late for one reason: more than a few count as a few.
        """
        judged = [request for request in ended if not request.restored]
        late = min(_TOGETHER, sum(now > request.deadline for request in judged))
        self.safety_margin = min(_WIDEST, max(0.0, self.safety_margin + _STEP * (late - TOLERATED * len(judged))))

    def _settle(self) -> None:
        # A batch is never promised sooner than a smaller one: noise in the measurements must not make it look so.
        self._monotone = list(accumulate(self.measured, max))


def _preferred_batch_size(seconds: Sequence[float]) -> int:
    """The smallest batch size within KNEE_SHARE of the best throughput.

    Of seconds that were measured one after the other on an otherwise idle engine. Those of the batches that serve do not compare: the larger are
    run under load and the smaller when there is little, one above the preferred batch size never, and the preferred batch size would wander to whichever was last run at ease.
    """
    rates = [size / each for size, each in enumerate(seconds, start=1)]
    enough = PREFERRED_BATCH_THROUGHPUT * max(rates)
    return next(size for size, rate in enumerate(rates, start=1) if rate >= enough)
