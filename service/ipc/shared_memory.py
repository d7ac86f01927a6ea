"""The slot table: the shared memory of one model, accessed as arrays. memory_layout.py documents who writes what."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from vitserve.model.arrays import Floats, Pixels
from vitserve.service.ipc import memory_layout
from vitserve.service.ipc.memory_layout import (
    BATCH_SECONDS,
    FREE_AT,
    NO_ENGINE,
    PREFERRED_BATCH_SIZE,
    RESERVED,
    SAFETY_FACTOR,
    START_SECONDS,
)
from vitserve.service.scheduler import Scheduler, delay_of_others, done_at, safety_factor_at

_OFFERED_LOAD = struct.Struct("<3d")

# Larger than any reading of the monotonic clock, so that a priority always outweighs a deadline.
SECONDS_PER_PRIORITY = 1e9


class CompletionEstimate(NamedTuple):
    """When a new image would be done, and by which engine worker."""

    engine: int
    done_at: float  # monotonic seconds
    safety_factor: float = 1.0  # by which the estimated duration of a batch was multiplied


class _Queue(NamedTuple):
    """The figures that an engine worker publishes about its queue."""

    start: float  # now, or when the engine worker will be available
    free_at: Sequence[float]
    preferred_batch_size: int
    batch_seconds: float
    safety_factor: float
    reserved: Sequence[float]

    def safety_factor_at(self, position: int) -> float:
        return safety_factor_at(position, self.start, self.free_at, self.safety_factor)

    def done_at(self, position: int, reserved: float = 0.0) -> float:
        seconds = self.batch_seconds * self.safety_factor_at(position)
        return done_at(position, self.start, self.free_at, self.preferred_batch_size, seconds, reserved)


class SlotTable:
    """Columns that are accessed one slot at a time are memoryviews: access takes a third of the time that numpy needs.

    Raises SlotTableError if the descriptor is not a slot table.
    """

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, 0)
        self.shape, self.description = memory_layout.read(self._memory)
        self._regions = memory_layout.regions(self.shape)
        self.states = self._column("states", "B")
        self.engines = self._column("engines", "B")
        self.sequences = self._column("sequences", "Q")
        self.sort_keys = self._column("sort_keys", "d")
        self.connections = self._column("connections", "Q")
        self._arrivals = self._column("arrivals", "Q")
        self._all_arrivals = self._array("arrivals")
        self.pixels: Pixels = self._array("pixels")
        self.logits: Floats = self._array("logits")
        self.embeddings: Floats = self._array("embeddings")
        self._all_engines, self._all_sort_keys = self._array("engines"), self._array("sort_keys")
        self._estimates = self._array("completion_estimates")
        self._row = struct.Struct(f"<{self._estimates.shape[1]}d")

    def _array(self, name: str) -> Any:
        region = self._regions[name]
        return np.ndarray(region.shape, region.dtype, self._memory, region.offset)

    def _column(self, name: str, kind: Literal["B", "Q", "d"]) -> memoryview[Any]:
        region = self._regions[name]
        return memoryview(self._memory)[region.offset : region.end].cast(kind)

    def _row_offset(self, engine: int) -> int:
        return self._regions["completion_estimates"].offset + engine * self._row.size

    def _offered_load_offset(self, worker: int) -> int:
        return self._regions["offered_load"].offset + worker * _OFFERED_LOAD.size

    # -- written by engine workers

    def publish(self, engine: int, scheduler: Scheduler) -> None:
        values = (
            scheduler.preferred_batch_size,
            scheduler.estimated_seconds(scheduler.preferred_batch_size),
            scheduler.safety_factor,
            *scheduler.reserved,
            *scheduler.free_at,
            *scheduler.measured,
        )
        self._row.pack_into(self._memory, self._row_offset(engine), self.start_seconds(engine), *values)

    def publish_start(self, engine: int, seconds: float) -> None:
        self._estimates[engine, START_SECONDS] = seconds

    # -- written by HTTP workers

    def write_offered_load(self, worker: int, *values: float) -> None:
        """``values`` are the fields of offered_load.OfferedWork."""
        _OFFERED_LOAD.pack_into(self._memory, self._offered_load_offset(worker), *values)

    def count_arrivals(self, worker: int, priority: int, images: int = 1) -> None:
        """Of images that are admitted or rejected."""
        self._arrivals[10 * worker + 9 - priority] += images

    # -- read by engine workers

    def arrivals(self) -> list[int]:
        """Images that have arrived at all HTTP workers, by priority level."""
        counts: list[int] = self._all_arrivals.sum(0).tolist()
        return counts

    # -- read by HTTP workers

    def read_offered_load(self, worker: int) -> tuple[float, ...]:
        return _OFFERED_LOAD.unpack_from(self._memory, self._offered_load_offset(worker))

    def images_at_once(self, short_seconds: float, factor: float) -> int:
        """The images that run if every stream runs a batch of the preferred size, or of a smaller one that is quick.

        A batch is quick if it takes at most ``short_seconds``, or ``factor`` times as long as one image.
        """
        images = 0
        for engine in range(self.shape.engines):
            row = self._row.unpack_from(self._memory, self._row_offset(engine))
            seconds = row[FREE_AT + self.shape.streams :][: int(row[PREFERRED_BATCH_SIZE])]
            quick = [
                size for size, duration in enumerate(seconds, 1) if duration <= max(short_seconds, factor * seconds[0])
            ]
            images += self.shape.streams * max(quick, default=0)
        return images

    def image_seconds(self) -> float:
        """Measured stream seconds per image of a full batch, averaged over the engine workers. 0 if none has started.

        Based on the raw measurement of the preferred batch size. The monotone estimates that admission uses would be
        wrong here: one slow batch of size 1 raises them until another batch of size 1 runs, which may not happen
        under load.
        """
        seconds_per_image = []
        for engine in range(self.shape.engines):
            row = self._row.unpack_from(self._memory, self._row_offset(engine))
            if size := int(row[PREFERRED_BATCH_SIZE]):
                seconds_per_image.append(row[FREE_AT + self.shape.streams + size - 1] / size)
        return sum(seconds_per_image) / len(seconds_per_image) if seconds_per_image else 0.0

    def estimate_completion(self, sort_key: float, now: float, engines: Mapping[int, float]) -> CompletionEstimate:
        """The engine worker that would finish a new image first, and when.

        ``engines`` are the candidates (at least one), each with the time from which it is available: 0 if it is
        running, in the future while it restarts.
        Counts the slots of all HTTP workers that run before the image: those waiting at the candidate, and the
        candidate's share of those that are not assigned yet.
        """
        runs_before = self._all_sort_keys <= sort_key
        if self.shape.engines == 1:  # then all of them run on this engine worker
            ahead, share = dict.fromkeys(engines, int(np.count_nonzero(runs_before))), 0
        else:
            counts = np.bincount(self._all_engines[runs_before], minlength=NO_ENGINE + 1)
            ahead = {engine: int(counts[engine]) for engine in engines}
            share = -(-int(counts[NO_ENGINE]) // len(engines))
        priority_level = max(0, int(sort_key // SECONDS_PER_PRIORITY)) if math.isfinite(sort_key) else 0
        best = CompletionEstimate(0, float("inf"))
        for engine, available_at in engines.items():
            queue = self._queue(engine, max(now, available_at))
            position = ahead[engine] + share + 1
            done = queue.done_at(position, queue.reserved[priority_level])
            if done < best.done_at:
                best = CompletionEstimate(engine, done, queue.safety_factor_at(position))
        return best

    def delay_of_others(self, sort_key: float, engine: int, start: float, engines: int) -> float:
        """Seconds by which a new image would make an admitted one late on this engine worker: see the scheduler.

        ``start`` is the time from which the engine worker is available. ``engines`` are available in all.
        """
        sort_keys = self._all_sort_keys.copy()  # engine workers write at the same time
        waiting = sort_keys < math.inf
        if np.count_nonzero(waiting) == np.count_nonzero(sort_keys <= sort_key):
            return 0.0  # the image is the last one
        unassigned = np.sort(sort_keys[waiting & (self._all_engines == NO_ENGINE)])
        keys = np.sort(np.concatenate([sort_keys[waiting & (self._all_engines == engine)], unassigned[::engines]]))
        ahead = int(np.searchsorted(keys, sort_key, "right"))
        queue = self._queue(engine, start)
        deadlines = (keys[ahead:] % SECONDS_PER_PRIORITY).tolist()
        return delay_of_others(deadlines, ahead, queue.preferred_batch_size, queue.done_at)

    def _queue(self, engine: int, start: float) -> _Queue:
        row = self._row.unpack_from(self._memory, self._row_offset(engine))
        free_at = row[FREE_AT : FREE_AT + self.shape.streams]
        size = max(1, int(row[PREFERRED_BATCH_SIZE]))
        return _Queue(start, free_at, size, row[BATCH_SECONDS], row[SAFETY_FACTOR], row[RESERVED:FREE_AT])

    def reserved(self, priority: int) -> float:
        """The share of the engine workers' time that is reserved for images more urgent than this priority."""
        return float(max(self._estimates[:, RESERVED + 9 - priority].tolist()))

    def start_seconds(self, engine: int) -> float:
        return float(self._estimates[engine, START_SECONDS])

    def batch_seconds(self) -> float:
        """The longest conservative estimate of a full batch."""
        return float((self._estimates[:, BATCH_SECONDS] * self._estimates[:, SAFETY_FACTOR]).max())

    def measured(self, engine: int) -> dict[str, Any]:
        """The preferred batch size and the measured seconds per batch size, for GET /v1/model."""
        row = self._estimates[engine]
        seconds = row[FREE_AT + self.shape.streams :].tolist()
        return {
            "preferred_batch_size": int(row[PREFERRED_BATCH_SIZE]),
            "seconds_per_batch_size": dict(enumerate(seconds, start=1)),
        }

    def count(self, *states: int) -> int:
        """Number of slots in any of these states, from one snapshot: other processes write at the same time."""
        snapshot = bytes(self.states)
        return sum(snapshot.count(state) for state in states)


def sort_key(priority: int, deadline: float) -> float:
    """Sorts images as the scheduler does: by priority (9 is the most urgent), then by deadline."""
    return deadline + (9 - priority) * SECONDS_PER_PRIORITY
