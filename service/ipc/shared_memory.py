"""The shared memory of one model as arrays: pixels in, logits and embedding out, who has which slot, and what engines publish.
memory_layout.py says who may write what.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from vitserve.model.arrays import Floats, Pixels
from vitserve.service.ipc import memory_layout
from vitserve.service.scheduler import Scheduler, done_at, safety_factor_at

_ASKED = struct.Struct("<3d")

SECONDS_PER_PRIORITY = (
    1e9  # seconds; more than any monotonic clock's reading, so that a priority outweighs every deadline
)


class CompletionEstimate(NamedTuple):
    """When a new image would be done, and on which engine."""

    engine: int
    done_at: float
    safety_factor: float = 1.0  # how many times the mean its promises are


class SlotTable:
    """Columns that are read and written one slot at a time are memoryviews, which do that in a third of the time that numpy takes.

    Raises RingError where the descriptor is not of a slot table.
    """

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, 0)
        self.shape, self.description = memory_layout.read(self._memory)
        self._regions = memory_layout.regions(self.shape)
        self.states = self._column("states", "B")
        self.engines = self._column("engines", "B")
        self.sequences = self._column("sequences", "Q")
        self.sort_keys = self._column("sort_keys", "d")
        self.pixels: Pixels = self._array("pixels")
        self.logits: Floats = self._array("logits")
        self.embedding: Floats = self._array("embedding")
        self._all_engines, self._all_sort_keys = self._array("engines"), self._array("sort_keys")
        self._estimates = self._array("estimate_completion")
        self._row = struct.Struct(f"<{self._estimates.shape[1]}d")

    def _array(self, name: str) -> Any:
        region = self._regions[name]
        return np.ndarray(region.shape, region.dtype, self._memory, region.offset)

    def _column(self, name: str, kind: Literal["B", "Q", "d"]) -> memoryview[Any]:
        region = self._regions[name]
        return memoryview(self._memory)[region.offset : region.end].cast(kind)

    # -- written by an engine

    def publish(self, engine: int, scheduler: Scheduler) -> None:
        values = (
            scheduler.preferred_batch_size,
            scheduler.estimated_seconds(scheduler.preferred_batch_size),
            scheduler.safety_factor,
            *scheduler.reserved,
            *scheduler.free_at,
            *scheduler.measured,
        )
        self._row.pack_into(self._memory, self._place(engine), self.start_seconds(engine), *values)

    def publish_start(self, engine: int, seconds: float) -> None:
        self._estimates[engine, memory_layout.START] = seconds

    def _place(self, engine: int) -> int:
        return self._regions["estimate_completion"].offset + engine * self._row.size

    # -- written by a HTTP worker

    def ask(self, worker: int, *asked: float) -> None:
        """What demand.Asked holds of this HTTP worker."""
        _ASKED.pack_into(self._memory, self._regions["offered_load"].offset + worker * _ASKED.size, *asked)

    # -- read by a HTTP worker

    def asked(self, worker: int) -> tuple[float, ...]:
        return _ASKED.unpack_from(self._memory, self._regions["offered_load"].offset + worker * _ASKED.size)

    def image_seconds(self) -> float:
        """Of a stream, for one image of a full batch, as measured recently; the mean of the engines. 0 where none has started.

        Of the preferred batch size's own measure, not of the monotone one that promises are made from: that one a single slow batch of 1 raises until another
        batch of 1 is run, which under load may be never.
        """
        found = []
        for engine in range(self.shape.engines):
            row = self._row.unpack_from(self._memory, self._place(engine))
            if preferred_batch_size := int(row[memory_layout.PREFERRED_BATCH_SIZE]):
                found.append(
                    row[memory_layout.STREAMS + self.shape.streams + preferred_batch_size - 1] / preferred_batch_size
                )
        return sum(found) / len(found) if found else 0.0

    def estimate_completion(self, sort_key: float, now: float, engines: Mapping[int, float]) -> CompletionEstimate:
        """Which of the engines would have a new image done first, and when. ``engines`` are those to choose from (at least one) with the
        time from which each one runs: 0 if it does, in the future while it is being restarted.

        Counts what is before it by the slots of all HTTP workers: those waiting at the engine, and an equal part of those that no engine has yet.
        """
        sooner = self._all_sort_keys <= sort_key
        if self.shape.engines == 1:  # then all of them are before it
            before, part = dict.fromkeys(engines, int(np.count_nonzero(sooner))), 0
        else:
            counts = np.bincount(self._all_engines[sooner], minlength=memory_layout.NOWHERE + 1)
            before = {engine: int(counts[engine]) for engine in engines}
            part = -(-int(counts[memory_layout.NOWHERE]) // len(engines))
        priority_level = max(0, int(sort_key // SECONDS_PER_PRIORITY)) if math.isfinite(sort_key) else 0
        best = CompletionEstimate(0, float("inf"))
        for engine, runs_from in engines.items():
            row = self._row.unpack_from(self._memory, self._place(engine))
            free_at = row[memory_layout.STREAMS : memory_layout.STREAMS + self.shape.streams]
            place, start = before[engine] + part + 1, max(now, runs_from)
            safety_factor = safety_factor_at(place, start, free_at, row[memory_layout.SAFETY_FACTOR])
            done = done_at(
                place,
                start,
                free_at,
                max(1, int(row[memory_layout.PREFERRED_BATCH_SIZE])),
                row[memory_layout.BATCH] * safety_factor,
                row[memory_layout.RESERVED + priority_level],
            )
            if done < best.done_at:
                best = CompletionEstimate(engine, done, safety_factor)
        return best

    def reserved(self, priority: int) -> float:
        """The share of the engines' time that is left to more urgent images than this."""
        return float(max(self._estimates[:, memory_layout.RESERVED + 9 - priority].tolist()))

    def start_seconds(self, engine: int) -> float:
        return float(self._estimates[engine, memory_layout.START])

    def batch_seconds(self) -> float:
        """The longest that a full batch is promised to take."""
        return float((self._estimates[:, memory_layout.BATCH] * self._estimates[:, memory_layout.SAFETY_FACTOR]).max())

    def measured(self, engine: int) -> dict[str, Any]:
        """What an engine has measured of itself."""
        row = self._estimates[engine]
        seconds = row[memory_layout.STREAMS + self.shape.streams :].tolist()
        return {
            "batch_size": int(row[memory_layout.PREFERRED_BATCH_SIZE]),
            "seconds_per_batch_size": dict(enumerate(seconds, start=1)),
        }

    def count(self, *states: int) -> int:
        """Slots in one of these states, at one moment: others write meanwhile."""
        moment = bytes(self.states)
        return sum(moment.count(state) for state in states)


def sort_key(priority: int, deadline: float) -> float:
    """Orders images as the scheduler does: by priority, then by deadline. 9 is the most urgent priority."""
    return deadline + (9 - priority) * SECONDS_PER_PRIORITY
