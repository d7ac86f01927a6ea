"""Takes encoded images to probabilities inside one process: decode threads → scheduler → engine lanes → event loop.

Imported by service/app.py. Every image holds one slot from admission to answer; a slot's pixels are written by a decode thread and read
by a lane. One lock guards the scheduler and the slots; it is never held while decoding or running.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from model.parity import Floats, softmax
from model.preprocess import Decoder, ImageError
from service import errors
from service.engines.engine import Engine
from service.metrics import Metrics
from service.scheduler import Batch, Request, Scheduler, Shed

log = logging.getLogger(__name__)

_SHED_DETAIL = {
    "full": "every slot is taken",
    "deadline": "the work admitted before this image leaves no room before its deadline",
}


@dataclass(frozen=True, slots=True)
class Answer:
    probabilities: Floats  # [classes]
    decode_seconds: float
    queue_seconds: float
    run_seconds: float


@dataclass(slots=True, eq=False)
class _Job:
    request: Request
    slot: int
    encoded: bytes
    future: asyncio.Future[Answer]
    received: float
    decode_seconds: float = 0.0


@dataclass
class Runtime:
    """Owns the threads. start() → classify() … → drain(). All of it is called from the event loop ``loop``."""

    engine: Engine
    decoder: Decoder
    metrics: Metrics
    seconds: dict[int, float]  # measured per batch size, by warm_up()
    slots: int
    decode_threads: int
    loop: asyncio.AbstractEventLoop
    broken: str | None = None  # why nothing can be answered any more
    _ids: Iterable[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        side = self.decoder.preprocessing.image_size
        self._pixels = np.empty((self.slots, side, side, 3), np.uint8)
        self._free_slots = list(range(self.slots))
        self._decoding = 0  # images between classify() and the scheduler
        self._stopping = False
        self._failing = False  # in an outage of the engine, which is logged once
        self._jobs: dict[int, _Job] = {}  # by request id, every admitted image not yet answered
        self._changed = threading.Condition()
        self.scheduler = Scheduler(self.seconds, lanes=self.engine.lanes, capacity=self.slots)
        self._decoders = ThreadPoolExecutor(self.decode_threads, "decode")
        self._lanes = [threading.Thread(target=self._lane, args=(lane,), name=f"lane-{lane}") for lane in range(self.engine.lanes)]

    def start(self) -> None:
        for thread in self._lanes:
            thread.start()

    async def classify(self, encoded: bytes, deadline: float) -> Answer:
        """One image's answer. ``deadline`` is in time.monotonic()'s seconds.

        Raises Overloaded at once, before decoding, where the deadline cannot be met; NotAnImage, DamagedImage, ImageTooLarge; EngineFailed;
        DeadlineExceeded; NotReady if the runtime is broken.
        """
        job = self._take_slot(encoded, deadline)
        self._decoders.submit(self._decode, job)
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await job.future
        except TimeoutError:
            raise errors.DeadlineExceeded("the deadline passed before an answer was there") from None
        finally:
            self._withdraw(job)

    async def drain(self) -> None:
        """Answers what was admitted, then ends the threads and closes the engine. The caller admits nothing more."""
        await asyncio.to_thread(self._stop)

    # -- on the event loop

    def _take_slot(self, encoded: bytes, deadline: float) -> _Job:
        now = time.monotonic()
        with self._changed:
            if self.broken is not None or self._stopping:
                raise errors.NotReady(self.broken or "the service is stopping")
            shed = self.scheduler.would_shed(deadline, now, ahead=self._decoding)
            if shed is None and not self._free_slots:
                shed = Shed("full", max(self.seconds.values()))
            if shed is not None:
                raise self._refuse(shed)
            request = Request(deadline, next(iter(self._ids)))
            job = _Job(request, self._free_slots.pop(), encoded, self.loop.create_future(), now)
            self._jobs[request.id] = job
            self._decoding += 1
        self.metrics.images_in_flight.inc()
        return job

    def _withdraw(self, job: _Job) -> None:
        """Frees the place of one whose caller waits no more; nothing to do where it was answered."""
        with self._changed:
            if self.scheduler.withdraw(job.request):
                self._release(job)

    def _settle(self, outcomes: list[tuple[_Job, Answer | errors.ServiceError]]) -> None:
        for job, outcome in outcomes:
            if job.future.done():
                continue
            if isinstance(outcome, Answer):
                job.future.set_result(outcome)
            else:
                job.future.set_exception(outcome)

    # -- on a decode thread

    def _decode(self, job: _Job) -> None:
        began = time.monotonic()
        outcome: errors.ServiceError | None = None
        try:
            if job.request.deadline <= began:
                outcome = errors.DeadlineExceeded("the deadline passed before the image could be decoded")
            else:
                self._pixels[job.slot] = self.decoder.decode(job.encoded)
        except ImageError as error:
            outcome = errors.of_image(error)
        except Exception:  # answered, so that nobody waits for what will not come
            log.exception("decoding failed in a way that it should not")
            outcome = errors.ServiceError("the image could not be decoded")
        job.encoded = b""
        now = time.monotonic()
        job.decode_seconds = now - began
        self.metrics.decode_seconds.observe(job.decode_seconds)
        with self._changed:
            self._decoding -= 1
            if outcome is None and self.broken is not None:
                outcome = errors.NotReady(self.broken)
            if outcome is None:
                shed = self.scheduler.admit(job.request, now)
                outcome = self._refuse(shed) if shed is not None else None
            if outcome is not None:
                self._release(job)
            self._changed.notify()
        if outcome is not None:
            self._hand_over([(job, outcome)])

    # -- on a lane's thread

    def _lane(self, lane: int) -> None:
        try:
            while (batch := self._next_batch(lane)) is not None:
                self._run(batch)
        except BaseException as error:  # a lane that ended silently would leave its callers waiting
            log.critical("lane %d ended; the service is not ready any more", lane, exc_info=True)
            self._break(f"a lane ended: {type(error).__name__}")

    def _next_batch(self, lane: int) -> Batch | None:
        """Waits until there is something to run; None when there will never be."""
        with self._changed:
            while True:
                now = time.monotonic()
                late = [self._jobs[request.id] for request in self.scheduler.expire(now)]
                for job in late:
                    self._release(job)
                if late:
                    self._hand_over([(job, errors.DeadlineExceeded("the deadline passed while the image waited")) for job in late])
                batch = self.scheduler.next_batch(lane, now)
                if batch is not None:
                    self.metrics.queue_length.set(self.scheduler.waiting)
                    return batch
                if self.broken is not None or (self._stopping and not self._decoding):
                    self._changed.notify_all()
                    return None
                self._changed.wait()

    def _run(self, batch: Batch) -> None:
        jobs = [self._jobs[request.id] for request in batch.requests]
        try:
            outputs = self.engine.run(batch.lane, self._pixels[[job.slot for job in jobs]])
            probabilities = softmax(outputs.logits)
            if not np.isfinite(probabilities).all():
                raise FloatingPointError("the engine's logits are not finite")
        except Exception as error:
            self._finish(batch, jobs, self.scheduler.abandon)
            self._report_failure(error)
            self._hand_over([(job, errors.EngineFailed("the engine failed while it ran this image")) for job in jobs])
            return
        self._failing = False
        now = self._finish(batch, jobs, self.scheduler.done)
        seconds = now - batch.started
        self.metrics.run_seconds.observe(seconds)
        self.metrics.batch_size.observe(len(jobs))
        answers: list[tuple[_Job, Answer | errors.ServiceError]] = []
        for row, job in enumerate(jobs):
            queued = max(0.0, batch.started - job.received - job.decode_seconds)
            self.metrics.queue_seconds.observe(queued)
            answers.append((job, Answer(probabilities[row], job.decode_seconds, queued, seconds)))
        self._hand_over(answers)

    def _finish(self, batch: Batch, jobs: list[_Job], tell: Callable[[Batch, float], None]) -> float:
        now = time.monotonic()
        with self._changed:
            tell(batch, now)
            for job in jobs:
                self._release(job)
        return now

    def _report_failure(self, error: Exception) -> None:
        self.metrics.engine_failures.inc()
        if not self._failing:  # the first of an outage, not one a batch
            log.error("the engine failed to run a batch", exc_info=error)
        self._failing = True

    # -- on any thread

    def _refuse(self, shed: Shed) -> errors.Overloaded:
        self.metrics.images_shed.labels(shed.reason).inc()
        return errors.Overloaded(_SHED_DETAIL[shed.reason], shed.reason, shed.retry_after_seconds)

    def _release(self, job: _Job) -> None:
        """Returns the slot. The lock is held."""
        if self._jobs.pop(job.request.id, None) is not None:
            self._free_slots.append(job.slot)
            self.metrics.images_in_flight.dec()

    def _hand_over(self, outcomes: list[tuple[_Job, Answer | errors.ServiceError]]) -> None:
        self.loop.call_soon_threadsafe(self._settle, outcomes)

    def _break(self, reason: str) -> None:
        """Nothing can be run any more: says so to all who wait."""
        with self._changed:
            self.broken = reason
            self.scheduler.empty()
            jobs = list(self._jobs.values())
            for job in jobs:
                self._release(job)
            self._changed.notify_all()
        self._hand_over([(job, errors.NotReady(reason)) for job in jobs])

    def _stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._decoders.shutdown(wait=True)
        with self._changed:
            self._changed.notify_all()
        for thread in self._lanes:
            thread.join()
        self.engine.close()


def warm_up(engine: Engine, image_size: int) -> dict[int, float]:
    """Runs every batch size and returns the seconds each took: kernels are chosen, memory is touched, and the scheduler has its figures.

    A quick batch is run three times and the best counts; a slow one is not repeated, because the start waits for it.
    """
    seconds = {}
    for size in range(1, engine.max_batch + 1):
        pixels = np.zeros((size, image_size, image_size, 3), np.uint8)
        times: list[float] = []
        while len(times) < 3 and sum(times) < 0.1:
            began = time.monotonic()
            engine.run(0, pixels)
            times.append(time.monotonic() - began)
        seconds[size] = min(times)
    return seconds
