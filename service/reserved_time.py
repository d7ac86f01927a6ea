"""The share of time that is reserved for more urgent requests: scheduler.py explains why. No I/O, threads or clock."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import exp

PRIORITY_LEVELS = 10
_MAX_RESERVED = 0.95  # so that a burst of urgent requests does not block all others for good
_RECENT_SECONDS = 5.0  # time constant of the average arrival rate per priority level


class ReservedTime:
    """The share of time that is reserved for more urgent requests, for each priority level.

    It follows the rate at which requests of each level arrived recently.
    """

    def __init__(self) -> None:
        self.shares = [0.0] * PRIORITY_LEVELS
        self._arrivals = [0.0] * PRIORITY_LEVELS  # exponentially weighted
        self._counts: Sequence[float] = [0.0] * PRIORITY_LEVELS  # at the last update
        self._updated_at = 0.0

    def is_due(self, now: float) -> bool:
        """Whether to update: fifty times per time constant, so that most arrivals cost nothing."""
        return now - self._updated_at >= _RECENT_SECONDS / 50

    def update(self, counts: Sequence[float], now: float, seconds: float) -> None:
        """``counts`` are all requests of each level since the start. One takes ``seconds`` of the shared time."""
        decay = exp((self._updated_at - now) / _RECENT_SECONDS)
        new = [count - before for count, before in zip(counts, self._counts, strict=True)]
        self._arrivals = [count * decay + more for count, more in zip(self._arrivals, new, strict=True)]
        self._counts, self._updated_at = list(counts), now
        share = seconds / _RECENT_SECONDS  # of the time that one request takes, if it arrives once per time constant
        self.shares = [min(_MAX_RESERVED, before * share) for before in accumulate(self._arrivals[:-1], initial=0.0)]
