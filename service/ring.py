"""The shared memory of one model as arrays: pixels in, logits and embedding out, who has which slot, and what engines publish.

Imported by dispatch.py in the fronts and by intake.py and engine_process.py in the engines. layout.py says who may write what.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from model.parity import Floats
from model.preprocess import Pixels
from service import layout
from service.scheduler import Scheduler, done_at

URGENCY_PER_PRIORITY = 1e9  # seconds; more than any monotonic clock's reading, so that a priority outweighs every deadline


class Outlook(NamedTuple):
    """When a new image would be done, and on which engine."""

    engine: int
    done_at: float


class Ring:
    """Raises RingError where the descriptor is not of a ring."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, 0)
        self.shape, self.description = layout.read(self._memory)
        self._regions = layout.regions(self.shape)
        self.states = self._array("states")
        self.engines = self._array("engines")
        self.sequences = self._array("sequences")
        self.urgencies = self._array("urgencies")
        self.pixels: Pixels = self._array("pixels")
        self.logits: Floats = self._array("logits")
        self.embedding: Floats = self._array("embedding")
        self._outlook = self._array("outlook")

    def _array(self, name: str) -> Any:
        region = self._regions[name]
        return np.ndarray(region.shape, region.dtype, self._memory, region.offset)

    # -- written by an engine

    def publish(self, engine: int, scheduler: Scheduler) -> None:
        row, shape = self._outlook[engine], self.shape
        row[layout.KNEE] = scheduler.knee
        row[layout.BATCH] = scheduler.promised(scheduler.knee)
        row[layout.RESERVED : layout.LANES] = scheduler.reserved
        row[layout.LANES : layout.LANES + shape.lanes] = scheduler.free_at
        row[layout.LANES + shape.lanes :] = scheduler.measured

    def publish_start(self, engine: int, seconds: float) -> None:
        self._outlook[engine, layout.START] = seconds

    # -- read by a front

    def outlook(self, urgency: float, now: float, engines: Mapping[int, float]) -> Outlook:
        """Which of the engines would have a new image done first, and when. ``engines`` are those to choose from (at least one) with the
        time from which each one runs: 0 if it does, in the future while it is being restarted.

        Counts what is before it by the slots of all fronts: those waiting at the engine, and an equal part of those that no engine has yet.
        """
        before = np.bincount(self.engines[self.urgencies <= urgency], minlength=layout.NOWHERE + 1).tolist()
        part = -(-before[layout.NOWHERE] // len(engines))
        rank = max(0, int(urgency // URGENCY_PER_PRIORITY)) if math.isfinite(urgency) else 0
        best = Outlook(0, float("inf"))
        for engine, runs_from in engines.items():
            row = self._outlook[engine]
            place = before[engine] + part + 1
            free_at = row[layout.LANES : layout.LANES + self.shape.lanes].tolist()
            reserved = float(row[layout.RESERVED + rank])
            done = done_at(place, max(now, runs_from), free_at, max(1, int(row[layout.KNEE])), float(row[layout.BATCH]), reserved)
            if done < best.done_at:
                best = Outlook(engine, done)
        return best

    def reserved(self, priority: int) -> float:
        """The share of the engines' time that is left to more urgent images than this."""
        return float(self._outlook[:, layout.RESERVED + 9 - priority].max())

    def start_seconds(self, engine: int) -> float:
        return float(self._outlook[engine, layout.START])

    def batch_seconds(self) -> float:
        """The longest that a full batch is promised to take."""
        return float(self._outlook[:, layout.BATCH].max())

    def measured(self, engine: int) -> dict[str, Any]:
        """What an engine has measured of itself."""
        row = self._outlook[engine]
        seconds = row[layout.LANES + self.shape.lanes :].tolist()
        return {"batch_size": int(row[layout.KNEE]), "seconds_per_batch_size": dict(enumerate(seconds, start=1))}

    def count(self, *states: int) -> int:
        """Slots in one of these states."""
        return int(np.isin(self.states, states).sum())


def urgency(priority: int, deadline: float) -> float:
    """Orders images as the scheduler does: by priority, then by deadline. 9 is the most urgent priority."""
    return deadline + (9 - priority) * URGENCY_PER_PRIORITY
