"""The images of one HTTP worker that wait for a decode thread: a pure data structure without threads or a clock.

The most urgent image is decoded first. Admission uses decoded_at(), so that it accounts for decoding where that is
the bottleneck. All times are monotonic seconds.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from vitserve.service.reserved_time import PRIORITY_LEVELS, ReservedTime

_NEWEST_WEIGHT = 0.1  # of the newest measurement in the average decode time

Item = TypeVar("Item")


class _Waiting(NamedTuple, Generic[Item]):
    sort_key: float  # see ipc.shared_memory.sort_key()
    number: int  # first come, first served among equal keys
    item: Item
    work: float


@dataclass
class DecodeQueue(Generic[Item]):
    threads: int
    seconds: float = 0.0  # moving average of the time that one unit of work occupies a thread
    _waiting: list[_Waiting[Item]] = field(default_factory=list, init=False)
    _waiting_work: float = field(default=0.0, init=False)
    _running: int = field(default=0, init=False)
    _running_work: float = field(default=0.0, init=False)
    _pushed: int = field(default=0, init=False)
    _arrivals: list[int] = field(default_factory=lambda: [0] * PRIORITY_LEVELS, init=False)  # by priority level
    _reserved: ReservedTime = field(default_factory=ReservedTime, init=False)

    def __len__(self) -> int:
        """Images that wait."""
        return len(self._waiting)

    def push(self, sort_key: float, priority_level: int, item: Item, now: float, work: float = 1.0) -> None:
        """``work``: 1 for each image, or an estimate of the seconds where images differ much."""
        self._pushed += 1
        self._arrivals[priority_level] += 1
        if self._reserved.is_due(now):
            self._reserved.update(self._arrivals, now, self.seconds / self.threads)
        insort(self._waiting, _Waiting(sort_key, self._pushed, item, work))
        self._waiting_work += work

    def pop(self) -> Item:
        """The most urgent image, which a thread decodes now. Raises IndexError if none waits."""
        waiting = self._waiting.pop(0)
        self._waiting_work = self._waiting_work - waiting.work if self._waiting else 0.0
        self._running += 1
        self._running_work += waiting.work
        return waiting.item

    def done(self, seconds: float | None, work: float = 1.0) -> None:
        """A thread has finished an image. ``seconds``: None if it was not decoded, so there is nothing to learn."""
        self._running -= 1
        self._running_work = self._running_work - work if self._running else 0.0
        if seconds is not None:
            self.seconds += _NEWEST_WEIGHT * (seconds / work - self.seconds)

    def decoded_at(self, sort_key: float, priority_level: int, now: float, work: float = 1.0) -> float:
        """When a new image would be decoded, so that it can wait for an engine.

        ``now`` if a thread is idle: one slow image must not cause rejections that keep the average from recovering.
        """
        if self._running + len(self._waiting) < self.threads:
            return now
        ahead = self._running_work + self._work_before(sort_key)
        wait = ahead / self.threads * self.seconds
        return now + wait / (1 - self._reserved.shares[priority_level]) + work * self.seconds / self.threads

    def _work_before(self, sort_key: float) -> float:
        if not self._waiting or self._waiting[-1].sort_key <= sort_key:
            return self._waiting_work
        count = bisect_right(self._waiting, sort_key, key=lambda waiting: waiting.sort_key)
        return sum(waiting.work for waiting in self._waiting[:count])
