"""Collects updates of metrics during a turn of the event loop, and applies them at its end.

Storing an update in the metrics file takes several microseconds. Updates of the same metric are added up first.
"""

from __future__ import annotations

from prometheus_client import Counter, Histogram

from vitserve.service.http_worker.turn import Turns
from vitserve.service.metrics import Metrics


class MetricBuffer:
    """All methods run on the event loop."""

    def __init__(self, metrics: Metrics, turns: Turns) -> None:
        self.all = metrics
        self._turns = turns
        self.counted_labels: dict[str, set[str]] = {}  # that have a series, by head; for the life of this worker
        self._counts: dict[Counter, float] = {}
        self._values: dict[Histogram, list[float]] = {}

    def inc(self, counter: Counter, amount: float = 1.0) -> None:
        self._counts[counter] = self._counts.get(counter, 0.0) + amount
        self._turns.at_end(self.flush)

    def observe(self, histogram: Histogram, value: float) -> None:
        self._values.setdefault(histogram, []).append(value)
        self._turns.at_end(self.flush)

    def flush(self) -> None:
        counts, self._counts = self._counts, {}
        values, self._values = self._values, {}
        for counter, amount in counts.items():
            counter.inc(amount)
        for histogram, observed in values.items():
            for value in observed:
                histogram.observe(value)
