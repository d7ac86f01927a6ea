"""Decides whether an HTTP worker admits an image, and gives it a slot."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from vitserve.service import errors
from vitserve.service.http_worker.dispatch.decode_pool import DecodePool
from vitserve.service.http_worker.dispatch.engine_connections import EngineConnections
from vitserve.service.http_worker.dispatch.image_job import DeliveryTime, ImageJob, overloaded
from vitserve.service.http_worker.dispatch.offered_load import OfferedLoad
from vitserve.service.http_worker.metric_buffer import MetricBuffer
from vitserve.service.http_worker.turn import Turns
from vitserve.service.ipc.shared_memory import sort_key
from vitserve.service.ipc.slots import Slots, Ticket
from vitserve.service.scheduler import Rejection

# How long a verdict is remembered. A rejection also for a share of the timeout: the queue, which is as long as the
# timeout then, changes little in that time.
_VERDICT_SECONDS, _LONGEST_VERDICT_SECONDS = 0.002, 0.01
_REJECTION_SHARE = 0.02
_MAX_VERDICTS = 64  # that are remembered
_SMALL_BODY_BYTES = 16_384


class Verdict(NamedTuple):
    error: errors.OverloadedError | None
    ends: float  # monotonic seconds


@dataclass
class Admission:
    """An image is admitted if decoding, an engine worker, and the way of the result fit before its deadline.

    All methods run on the event loop.
    """

    slots: Slots
    engines: EngineConnections
    decoders: DecodePool
    offered_load: OfferedLoad
    metrics: MetricBuffer
    turns: Turns
    lock: threading.Lock  # the dispatcher's
    delivery_time: DeliveryTime = field(default_factory=DeliveryTime, init=False)
    waiting_for_slot: deque[ImageJob] = field(default_factory=deque, init=False)  # admitted by the previous model
    _verdicts: dict[tuple[int, int], Verdict] = field(default_factory=dict, init=False)  # by timeout_ms and priority

    def admit(self, job: ImageJob) -> Ticket | errors.OverloadedError:
        deadline = self.delivery_time.engine_deadline(job.deadline, job.received)
        with self.lock:
            rejection = self._check(deadline, job.priority, job.received)
            if rejection is None:
                self.slots.slot_table.count_arrivals(self.slots.worker, job.priority)
                return self.slots.take(deadline, job.priority)
        error = overloaded(rejection)
        self.record_rejected(job.priority)
        return error

    def reject_early(
        self, arrived: float, timeout_ms: int, priority: int, images: int, body_bytes: int | None
    ) -> errors.OverloadedError | None:
        """The error for a request whose body has not been read, if it cannot be admitted.

        ``images`` is the expected number of images. Under overload, rejections must cost little, so requests with the
        same timeout and priority that arrive within a few milliseconds get the same verdict. A small body is probably
        there already, so that admit() decides a moment later at the same cost.
        """
        now = time.monotonic()
        verdict = self._verdicts.get((timeout_ms, priority))
        if verdict is None or now > verdict.ends:
            if body_bytes is not None and body_bytes <= _SMALL_BODY_BYTES:
                return None
            with self.lock:
                deadline = self.delivery_time.engine_deadline(arrived + timeout_ms / 1000, now)
                rejection = self._check(deadline, priority, now)
            verdict = self.remember(timeout_ms, priority, None if rejection is None else overloaded(rejection))
        if verdict.error is not None:
            self.record_rejected(priority, images)
        return verdict.error

    def remember(self, timeout_ms: int, priority: int, error: errors.OverloadedError | None) -> Verdict:
        """For the requests that arrive in the next milliseconds. ``error``: None for one that was admitted."""
        seconds = _VERDICT_SECONDS
        if error is not None:
            seconds = max(seconds, min(_LONGEST_VERDICT_SECONDS, _REJECTION_SHARE * timeout_ms / 1000))
        verdict = self._verdicts[timeout_ms, priority] = Verdict(error, time.monotonic() + seconds)
        if len(self._verdicts) > _MAX_VERDICTS:
            self._verdicts.pop(next(iter(self._verdicts)))
        return verdict

    def flush_offered_load(self) -> None:
        with self.lock:
            self.offered_load.flush()

    def next_with_slot(self) -> tuple[ImageJob, Ticket] | None:
        """The next image that waits for a slot, with its slot. None if none waits, or no slot is free."""
        while self.waiting_for_slot:
            job = self.waiting_for_slot[0]
            with self.lock:
                if not job.abandoned and not self.slots.free:
                    return None
                self.waiting_for_slot.popleft()
                if not job.abandoned:
                    return job, self.slots.take(job.deadline, job.priority)
        return None

    def _check(self, deadline: float, priority: int, now: float) -> Rejection | None:
        decoded_at = self.decoders.decoded_at(sort_key(priority, deadline), 9 - priority, now)
        return self.slots.check(deadline, priority, now, self.engines.available_at(), decoded_at)

    def record_rejected(self, priority: int, images: int = 1) -> None:
        self.slots.slot_table.count_arrivals(self.slots.worker, priority, images)
        with self.lock:
            self.offered_load.record_rejected(images)
        self.turns.at_end(self.flush_offered_load)
