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


@dataclass
class DecodeQueue(Generic[Item]):
    threads: int
    seconds: float = 0.0  # moving average of the time that decoding one image occupies a thread
    _waiting: list[_Waiting[Item]] = field(default_factory=list, init=False)
    _running: int = field(default=0, init=False)
    _pushed: int = field(default=0, init=False)
    _arrivals: list[int] = field(default_factory=lambda: [0] * PRIORITY_LEVELS, init=False)  # by priority level
    _reserved: ReservedTime = field(default_factory=ReservedTime, init=False)

    def __len__(self) -> int:
        """Images that wait."""
        return len(self._waiting)

    def push(self, sort_key: float, priority_level: int, item: Item, now: float) -> None:
        self._pushed += 1
        self._arrivals[priority_level] += 1
        if self._reserved.is_due(now):
            self._reserved.update(self._arrivals, now, self.seconds / self.threads)
        insort(self._waiting, _Waiting(sort_key, self._pushed, item))

    def pop(self) -> Item:
        """The most urgent image, which a thread decodes now. Raises IndexError if none waits."""
        item = self._waiting.pop(0).item
        self._running += 1
        return item

    def done(self, seconds: float | None) -> None:
        """A thread has finished an image. None: it was not decoded, so there is nothing to learn from it."""
        self._running -= 1
        if seconds is not None:
            self.seconds += _NEWEST_WEIGHT * (seconds - self.seconds)

    def decoded_at(self, sort_key: float, priority_level: int, now: float) -> float:
        """When a new image would be decoded, so that it can wait for an engine.

        ``now`` if a thread is idle: one slow image must not cause rejections that keep the average from recovering.
        """
        if self._running + len(self._waiting) < self.threads:
            return now
        ahead = self._running + bisect_right(self._waiting, sort_key, key=lambda waiting: waiting.sort_key)
        wait = ahead / self.threads * self.seconds
        return now + wait / (1 - self._reserved.shares[priority_level]) + self.seconds / self.threads
