"""How much is asked of this replica, whether it was admitted or shed: what autoscalers follow.

Two stages work at a time, and either may be the one that does not keep up: decoding, whose capacity is its threads, and running, whose is the
engines' streams. An image asks once, for the seconds that each stage takes for an image, whatever becomes of it; what nobody can decode asks for
no run, and an image that its engine's death makes run again does not ask again. Demand over capacity is above 1 where some must be rejected.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import exp
from typing import NamedTuple

from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.metrics import Metrics

# Over which demand is averaged, older images counting less and less: Prometheus's usual scrape interval, so that what happened between two
# scrapes shows at the next, and one image does not for long.
WINDOW_SECONDS = 15.0
_NEWEST = 0.1  # weight of the newest in the mean of what decoding takes


class Asked(NamedTuple):
    """Of one HTTP worker: seconds of each stage's work, as they weighed at one moment. The moment is written last: a reader in between sees too little."""

    decode_seconds: float = 0.0
    inference_seconds: float = 0.0
    at: float = 0.0  # monotonic seconds

    def plus(self, decode_seconds: float, inference_seconds: float, now: float) -> Asked:
        left = exp(min(0.0, self.at - now) / WINDOW_SECONDS)
        return Asked(
            self.decode_seconds * left + decode_seconds, self.inference_seconds * left + inference_seconds, now
        )


class Rates(NamedTuple):
    """Seconds of work a second of each stage: asked for, or what it can do."""

    decode: float
    run: float


def rates(asked: list[Asked], now: float) -> Rates:
    """Of all HTTP workers together."""
    then = [each.plus(0.0, 0.0, now) for each in asked]
    return Rates(
        sum(each.decode_seconds for each in then) / WINDOW_SECONDS,
        sum(each.inference_seconds for each in then) / WINDOW_SECONDS,
    )


def saturation(asked: Rates, capacity: Rates) -> float:
    """Of the stage that is asked for the most of what it can do. The capacities are above 0."""
    return max(asked.decode / capacity.decode, asked.run / capacity.run)


@dataclass
class OfferedLoad:
    """One HTTP worker's share of it. Its dispatcher's lock is held by whoever calls."""

    slot_table: SlotTable
    worker: int
    metrics: Metrics
    _decode_seconds: float = field(default=0.0, init=False)  # of an image, recently

    def rejected(self) -> None:
        """An image that was not even decoded, for want of time or of a slot."""
        self._count(self._decode_seconds, self.slot_table.image_seconds())

    def decoded(self, seconds: float, runs: bool) -> None:
        """An image whose decoding took so long; one that ``runs`` is for an engine then."""
        self._decode_seconds += _NEWEST * (seconds - self._decode_seconds) if self._decode_seconds else seconds
        self._count(seconds, self.slot_table.image_seconds() if runs else 0.0)

    def go_on(self, before: OfferedLoad) -> None:
        """Another model serves from now on: to whoever asks that is no pause."""
        self._decode_seconds = before._decode_seconds
        self.slot_table.ask(self.worker, *before.slot_table.asked(self.worker))

    def rates(self) -> Rates:
        """Of all HTTP workers, now."""
        return rates(
            [Asked(*self.slot_table.asked(worker)) for worker in range(self.slot_table.shape.workers)], time.monotonic()
        )

    def _count(self, decode_seconds: float, inference_seconds: float) -> None:
        self.metrics.offered_decode_seconds.inc(decode_seconds)
        self.metrics.offered_inference_seconds.inc(inference_seconds)
        self.slot_table.ask(
            self.worker,
            *Asked(*self.slot_table.asked(self.worker)).plus(decode_seconds, inference_seconds, time.monotonic()),
        )
