"""Admission control, queueing and batching of one engine worker: a pure data structure without I/O, threads or a clock.

All times are monotonic seconds passed in by the client of this module, so that a simulation can run a million requests
in virtual time through the code that runs in production (vitserve.bench.simulation).

**Queue.** Requests wait in order of priority, then of deadline (earliest first). A free stream takes up to B of them at
once, where B is the preferred batch size: the smallest size that reaches 95% of the best measured throughput. It never
waits for a batch to fill.

**Admission.** Streams take full batches in turn, so the completion time of the request at position p (from 1) of the
queue can be estimated. With T the duration of a batch of B, and free(s) the times at which the streams become free, in
ascending order:

    turn, s = divmod((p - 1) // B, streams)
    wait    = max(0, free(s) - now) + turn * T
    done    = now + wait / (1 - reserved) + T

A request is rejected on arrival if its own estimate exceeds its deadline, or if it would make a request that is already
admitted miss its deadline. This happens twice. The HTTP worker rejects before it decodes an image, and is conservative:
T is the measured duration times a safety factor, which grows with the variation of the measurements and with the share
of admitted requests that missed their deadline. The engine worker then uses the measured duration alone, so that an
image is rejected after its decoding only if it would be late.

    safety factor = 1 + 2 * mean deviation + safety margin

**Reserved time.** Without it, many unimportant requests would fill the queue up to their deadlines, and a more urgent
request would be rejected because of them. So the scheduler reserves the share of time that more urgent requests have
needed recently:

    reserved = arrival rate of more urgent requests * T / (B * streams)        (at most 0.95)

``wait / (1 - reserved)`` is the waiting time in a queue with priorities (Cobham, "Priority Assignment in Waiting Line
Problems", 1954). If all requests have the same priority, nothing is reserved.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple

from vitserve.service.reserved_time import ReservedTime

PREFERRED_BATCH_THROUGHPUT = 0.95  # share of the best throughput; batches larger than needed for it only add latency
_NEWEST_WEIGHT = 0.1  # of the newest measurement in the measured seconds and in their deviation
_OUTLIER_FACTOR = 4.0  # a batch counts as at most this multiple of its expected duration
_SAFETY_DEVIATIONS = 2.0  # mean deviations that the safety factor adds
TOLERATED_MISSES = 0.003  # share of admitted requests that may miss their deadline; above it, the safety margin grows
_MARGIN_STEP = 0.02  # by which one missed deadline increases the safety margin
_MAX_MISSES_COUNTED = 3  # per batch, because requests that are late together have one cause
_MAX_SAFETY_MARGIN = 1.0

RejectionReason = Literal["deadline", "full"]


class Request(NamedTuple):
    """Ordered by priority level, then deadline, then id. The smallest runs first."""

    priority_level: int  # 0 is the most urgent, PRIORITY_LEVELS - 1 the least
    deadline: float
    id: int  # unique
    alone: bool = False  # runs in a batch of its own, because it was running when an engine worker crashed
    restored: bool = False  # admitted by an engine worker that has exited, which explains a missed deadline


class Rejection(NamedTuple):
    reason: RejectionReason
    retry_after_seconds: float  # after which the same request would be admitted if no other arrived


class Batch(NamedTuple):
    stream: int
    requests: tuple[Request, ...]
    started: float


def done_at(
    position: int,
    now: float,
    free_at: Sequence[float],
    preferred_batch_size: int,
    seconds: float,
    reserved: float = 0.0,
) -> float:
    """Estimated completion time of the request at this position (from 1) of the queue: see the module's docstring.

    ``free_at`` has the time at which each stream becomes free, in the past if it is free. ``seconds`` is the duration
    of a batch of the preferred size. A batch counts as full, because others may join it until a stream takes it.
    """
    turn, stream = divmod((position - 1) // preferred_batch_size, len(free_at))
    wait = max(0.0, sorted(free_at)[stream] - now) + turn * seconds
    return now + wait / (1 - reserved) + seconds


def delay_of_others(
    deadlines: Sequence[float], ahead: int, preferred_batch_size: int, done_at: Callable[[int], float]
) -> float:
    """Seconds by which a new request would make one that is already admitted miss its deadline. 0 if it makes none.

    ``deadlines`` are those of the requests behind it in the queue, in order; ``ahead`` requests are before it.
    ``done_at`` estimates the completion time for a position (from 1). All requests behind it move back by one position.
    Only the last one of each batch moves into a later batch.
    """
    first = (ahead // preferred_batch_size + 1) * preferred_batch_size
    for position in range(first, ahead + len(deadlines) + 1, preferred_batch_size):
        deadline = deadlines[position - ahead - 1]
        lateness = done_at(position + 1) - deadline
        if lateness > 0 and done_at(position) <= deadline:  # only this request makes it late
            return lateness
    return 0.0


def safety_factor_at(position: int, now: float, free_at: Sequence[float], safety_factor: float) -> float:
    """1 if the request finds a free stream: it runs at once, and its duration corrects a factor that is too large."""
    return 1.0 if position == 1 and min(free_at) <= now else safety_factor


@dataclass
class Scheduler:
    """Raises ValueError if ``seconds`` lacks a batch size between 1 and its largest."""

    seconds: Mapping[int, float]  # measured seconds per batch size, from 1
    streams: int = 1
    capacity: int = 256  # maximum number of waiting requests
    safety_margin: float = 0.0  # part of the safety factor that is learned from missed deadlines
    free_at: list[float] = field(init=False)  # per stream: when it becomes free; in the past if it is free
    measured: list[float] = field(init=False)  # seconds per batch size from 1, corrected by every batch
    _waiting: list[Request] = field(default_factory=list, init=False)
    _busy: list[bool] = field(init=False)  # per stream
    _reserved: ReservedTime = field(default_factory=ReservedTime, init=False)
    _deviation: float = field(default=0.0, init=False)  # mean of |taken / expected - 1|

    def __post_init__(self) -> None:
        sizes = sorted(self.seconds)
        if sizes != list(range(1, len(sizes) + 1)) or not sizes:
            raise ValueError(f"seconds are required for every batch size from 1; got sizes {sizes}")
        self.measured = [self.seconds[size] for size in sizes]
        self.free_at = [0.0] * self.streams
        self._busy = [False] * self.streams
        self.preferred_batch_size = _preferred_batch_size(self.measured)
        self._update_estimates()

    def admit(self, request: Request, now: float, conservative: bool = True) -> Rejection | None:
        """Queues the request and returns None, or rejects it.

        An admitted request ends in exactly one batch, or it expires or is withdrawn. ``conservative`` applies the
        safety factor and the reserved time. Without it, only a request that would be late as things stand is rejected.
        """
        factor = self.safety_factor if conservative else 1.0
        if len(self._waiting) >= self.capacity:
            return Rejection("full", max(0.0, self._done_at(1, now, factor) - now))
        index = bisect_left(self._waiting, request)
        reserved = self.reserved[request.priority_level] if conservative else 0.0
        lateness = self._done_at(index + 1, now, factor, reserved) - request.deadline
        if lateness > 0:
            # The estimate includes the safety factor and reserved time, so it improves faster than time passes.
            safety_factor = safety_factor_at(index + 1, now, self.free_at, factor)
            return Rejection("deadline", lateness * (1 - reserved) / safety_factor)
        deadlines = [waiting.deadline for waiting in self._waiting[index:]]
        delay = delay_of_others(deadlines, index, self.preferred_batch_size, lambda at: self._done_at(at, now, factor))
        if delay:
            return Rejection("deadline", delay / factor)
        self._waiting.insert(index, request)
        return None

    def count_arrivals(self, counts: Callable[[], Sequence[float]], now: float) -> None:
        """Updates the reserved time. ``counts`` returns the requests of each level since the start, admitted or not.

        Requests that were rejected elsewhere count too. If only admitted ones did, a level that is always rejected
        would never get time reserved.
        """
        if self._reserved.is_due(now):
            batch_seconds = self.conservative_seconds(self.preferred_batch_size)
            self._reserved.update(counts(), now, batch_seconds / (self.preferred_batch_size * self.streams))

    def restore(self, request: Request) -> None:
        """Queues a request that was admitted by an engine worker that has exited. It is never rejected."""
        insort(self._waiting, request)

    def next_batch(self, stream: int, now: float) -> Batch | None:
        """The most urgent requests, for a free stream. None if no request is waiting."""
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
        """The batch has finished. Its duration corrects the measured seconds."""
        self.abandon(batch, now)
        index = len(batch.requests) - 1
        expected = self.measured[index]
        taken = min(now - batch.started, _OUTLIER_FACTOR * expected)
        self._deviation += _NEWEST_WEIGHT * (min(1.0, abs(taken / expected - 1)) - self._deviation)
        self.measured[index] += _NEWEST_WEIGHT * (taken - expected)
        self._update_estimates()
        self._adjust_safety_margin(batch.requests, now)

    def abandon(self, batch: Batch, now: float) -> None:
        """The batch has failed: frees its stream without learning from its duration."""
        self._busy[batch.stream] = False
        self.free_at[batch.stream] = now

    def withdraw(self, request: Request) -> bool:
        """Removes a waiting request whose client has disconnected. False if it is not waiting."""
        index = bisect_left(self._waiting, request)
        if index < len(self._waiting) and self._waiting[index] == request:
            del self._waiting[index]
            return True
        return False

    def expire(self, now: float) -> list[Request]:
        """Removes and returns the waiting requests whose deadline has passed: batches took longer than estimated."""
        expired: list[Request] = []
        start = 0
        while start < len(self._waiting):  # once per priority level, in which the earliest deadlines come first
            priority_level = self._waiting[start].priority_level
            end = bisect_left(self._waiting, (priority_level, now), start)
            expired += self._waiting[start:end]
            del self._waiting[start:end]
            start = bisect_left(self._waiting, (priority_level + 1,), start)
        self._adjust_safety_margin(expired, now)
        return expired

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def reserved(self) -> list[float]:
        """Per priority level: the share of time that is reserved for more urgent requests."""
        return self._reserved.shares

    @property
    def safety_factor(self) -> float:
        return 1 + _SAFETY_DEVIATIONS * self._deviation + self.safety_margin

    def conservative_seconds(self, size: int) -> float:
        """Duration of a batch of this size that admission relies on: the estimate times the safety factor."""
        return self.estimated_seconds(size) * self.safety_factor

    def estimated_seconds(self, size: int) -> float:
        """Measured duration of a batch of this size, at least that of any smaller size."""
        return self._monotone[size - 1]

    def _done_at(self, position: int, now: float, factor: float, reserved: float = 0.0) -> float:
        seconds = self.estimated_seconds(self.preferred_batch_size)
        seconds *= safety_factor_at(position, now, self.free_at, factor)
        return done_at(position, now, self.free_at, self.preferred_batch_size, seconds, reserved)

    def _adjust_safety_margin(self, finished: Sequence[Request], now: float) -> None:
        """Grows with missed deadlines and shrinks otherwise, so that their share approaches TOLERATED_MISSES.

        The deviation of single batches cannot predict that a machine becomes slower for many batches, for example
        because other processes use it.
        """
        counted = [request for request in finished if not request.restored]
        misses = min(_MAX_MISSES_COUNTED, sum(now > request.deadline for request in counted))
        margin = self.safety_margin + _MARGIN_STEP * (misses - TOLERATED_MISSES * len(counted))
        self.safety_margin = min(_MAX_SAFETY_MARGIN, max(0.0, margin))

    def _update_estimates(self) -> None:
        # Noise in the measurements must not make a larger batch look faster than a smaller one.
        self._monotone = list(accumulate(self.measured, max))


def _preferred_batch_size(seconds: Sequence[float]) -> int:
    """The smallest batch size with at least PREFERRED_BATCH_THROUGHPUT of the best throughput.

    Only the warm-up decides, when all sizes run under the same conditions. In production, large batches run under load,
    small ones when there is little load and those above the preferred size never, so durations are not comparable.
    """
    rates = [size / duration for size, duration in enumerate(seconds, start=1)]
    threshold = PREFERRED_BATCH_THROUGHPUT * max(rates)
    return next(size for size, rate in enumerate(rates, start=1) if rate >= threshold)
