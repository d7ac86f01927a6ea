"""Measures the offered load of this replica, admitted or rejected: the signal that autoscalers use.

Two stages can be the bottleneck: decoding, whose capacity is the number of decode threads, and inference, whose
capacity is the number of streams. Each image counts once, with the seconds of work that it means for each stage:

    offered load = sum over images of seconds of work / window      (exponentially weighted)
    saturation   = max over stages of offered load / capacity

An image that cannot be decoded adds no inference work. A retried image is not counted again.
At a saturation above 1 some images have to be rejected.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum, auto
from math import exp
from typing import NamedTuple

from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.metrics import Metrics

# Time constant of the average. It equals Prometheus' usual scrape interval: a scrape sees what happened since the one
# before, and the effect of a single image fades soon.
WINDOW_SECONDS = 15.0
_NEWEST_WEIGHT = 0.1  # of the newest measurement in the average decode time


class OfferedWork(NamedTuple):
    """Exponentially weighted seconds of work offered to one HTTP worker, as of ``at``.

    ``at`` is written last, so a concurrent reader may see too little and never too much.
    """

    decode_seconds: float = 0.0
    inference_seconds: float = 0.0
    at: float = 0.0  # monotonic seconds

    def plus(self, decode_seconds: float, inference_seconds: float, now: float) -> OfferedWork:
        decay = exp(min(0.0, self.at - now) / WINDOW_SECONDS)
        return OfferedWork(
            self.decode_seconds * decay + decode_seconds, self.inference_seconds * decay + inference_seconds, now
        )


class Rates(NamedTuple):
    """Seconds of work per second, by stage: offered load or capacity."""

    decode: float
    inference: float


def rates(workers: list[OfferedWork], now: float) -> Rates:
    """The offered load of all HTTP workers together."""
    current = [work.plus(0.0, 0.0, now) for work in workers]
    return Rates(
        sum(work.decode_seconds for work in current) / WINDOW_SECONDS,
        sum(work.inference_seconds for work in current) / WINDOW_SECONDS,
    )


def saturation(offered: Rates, capacity: Rates) -> float:
    """Of the most loaded stage. Both capacities must be positive."""
    return max(offered.decode / capacity.decode, offered.inference / capacity.inference)


class DecodeWork(Enum):
    NONE = auto()  # the image was rejected, or late
    HEADER = auto()  # the header cannot be read, or has a property that is rejected
    DECODED = auto()  # also if that failed


@dataclass
class OfferedLoad:
    """The offered load of one HTTP worker. Recording requires the dispatcher's lock, and so does flush()."""

    slot_table: SlotTable
    worker: int
    metrics: Metrics
    _average: float = field(default=0.0, init=False)  # decode seconds per image
    _decode_seconds: float = field(default=0.0, init=False)  # since the last flush()
    _inference_images: int = field(default=0, init=False)  # since the last flush()

    def record_rejected(self, images: int = 1) -> None:
        """Images that were rejected or expired before they were decoded."""
        self._decode_seconds += images * self._average
        self._inference_images += images

    def record(self, seconds: float, work: DecodeWork, inference: bool) -> None:
        """An image after its turn in decoding, where ``work`` took ``seconds``. ``inference``: an engine runs it."""
        match work:
            case DecodeWork.NONE:
                self.record_rejected()
            case DecodeWork.HEADER:  # much shorter than decoding, so it does not count in the average
                self._decode_seconds += seconds
            case DecodeWork.DECODED:
                self.record_decoded(seconds, inference)

    def record_decoded(self, seconds: float, inference: bool) -> None:
        """An image that took ``seconds`` to decode. ``inference`` is False if that failed."""
        self._average += _NEWEST_WEIGHT * (seconds - self._average) if self._average else seconds
        self._decode_seconds += seconds
        self._inference_images += inference

    def flush(self) -> None:
        """Publishes the images that were recorded: once per turn of the event loop, because it takes microseconds."""
        decode_seconds, self._decode_seconds = self._decode_seconds, 0.0
        inference_seconds, self._inference_images = self._inference_images * self.slot_table.image_seconds(), 0
        self.metrics.offered_decode_seconds.inc(decode_seconds)
        self.metrics.offered_inference_seconds.inc(inference_seconds)
        work = OfferedWork(*self.slot_table.read_offered_load(self.worker))
        work = work.plus(decode_seconds, inference_seconds, time.monotonic())
        self.slot_table.write_offered_load(self.worker, *work)

    def continue_from(self, previous: OfferedLoad) -> None:
        """Takes over the load of the previous model, because a reload does not change what clients send."""
        self._average = previous._average
        self.slot_table.write_offered_load(self.worker, *previous.slot_table.read_offered_load(self.worker))

    def rates(self) -> Rates:
        """Of all HTTP workers, now."""
        workers = range(self.slot_table.shape.workers)
        works = [OfferedWork(*self.slot_table.read_offered_load(worker)) for worker in workers]
        return rates(works, time.monotonic())
