"""Takes an image from admission to its result: reserve a slot, decode into it, submit it to an engine worker, deliver.

Runs on the event loop, except that _decode() runs on decode threads. One lock guards the slots, the jobs and the
connections. It is never held while an image is decoded.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass, field

from vitserve.service import errors
from vitserve.service.http_worker.decoding import decode_into, decoder_for
from vitserve.service.http_worker.engine_connections import EngineConnections, Message
from vitserve.service.http_worker.image_job import (
    DeliveryTime,
    ImageJob,
    ImageResult,
    ModelReplacedError,
    Outcome,
    overloaded,
)
from vitserve.service.http_worker.offered_load import OfferedLoad
from vitserve.service.ipc import wire_format
from vitserve.service.ipc.connection import Connection
from vitserve.service.ipc.model_info import ModelInfo
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.ipc.slots import Slots, Ticket
from vitserve.service.metrics import Metrics
from vitserve.service.settings import Settings

log = logging.getLogger(__name__)


class _SlotWaiters:
    """Admitted images that wait for a free slot, first come, first served."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._futures: deque[asyncio.Future[None]] = deque()

    async def wait(self, deadline: float) -> None:
        """Raises DeadlineExceededError."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._futures.append(future)
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await future
        except TimeoutError:
            raise errors.DeadlineExceededError("the deadline passed before a slot was free") from None

    def wake_one(self) -> None:
        while self._futures:
            future = self._futures.popleft()
            if not future.done():
                future.set_result(None)
                break


@dataclass
class Dispatcher:
    """Life cycle: connect() → classify() … → retire(). Then it closes its connections once all images are finished."""

    slot_table: SlotTable
    worker: int
    incarnation: int
    settings: Settings
    metrics: Metrics
    decoders: Executor
    loop: asyncio.AbstractEventLoop
    retired: bool = field(default=False, init=False)
    delivery_time: DeliveryTime = field(default_factory=DeliveryTime, init=False)
    _jobs: dict[int, ImageJob] = field(default_factory=dict, init=False)  # by sequence number

    def __post_init__(self) -> None:
        self.model_info = ModelInfo.from_json(self.slot_table.description)
        self.decoder = decoder_for(self.model_info.preprocessing, self.settings)
        self.slots = Slots(self.slot_table, self.worker, self.incarnation)
        self.offered_load = OfferedLoad(self.slot_table, self.worker, self.metrics)
        self._lock = threading.Lock()
        self._waiters = _SlotWaiters(self.loop)
        on_lost, on_completion = self._engine_lost, self._complete
        self._engines = EngineConnections(self.slot_table, self.incarnation, self.loop, on_completion, on_lost)

    async def classify(self, encoded: bytes, deadline: float, priority: int, admitted: bool = False) -> ImageResult:
        """Classifies one image. ``deadline`` is in time.monotonic() seconds.

        An image that was ``admitted`` by the previous model is not rejected. Raises OverloadedError at once, before
        decoding, if the deadline cannot be met; NotAnImageError, DamagedImageError, ImageTooLargeError,
        EngineFailedError, DeadlineExceededError or ModelReplacedError.
        """
        if self.retired:
            raise ModelReplacedError
        if admitted:
            ticket = await self._wait_for_slot(deadline, priority)
        else:
            ticket = self._admit(self.delivery_time.engine_deadline(deadline), priority)
        job = ImageJob(ticket, encoded, self.loop.create_future(), time.monotonic(), admitted)
        self._jobs[ticket.sequence] = job
        self.decoders.submit(self._decode, job)
        # An image that is running at its deadline still gets its result. The engine worker expires those that wait.
        timeout_seconds = max(0.0, deadline - job.received) + 2 * self.slot_table.batch_seconds()
        timeout = errors.DeadlineExceededError("the deadline passed before the result was available")
        timer = self.loop.call_later(timeout_seconds, job.resolve, timeout)
        try:
            return await job.future
        finally:
            timer.cancel()
            self._abandon(job)

    # -- engine workers

    @property
    def reachable(self) -> bool:
        """Whether an engine worker is connected."""
        return bool(self._engines.connections)

    @property
    def streams(self) -> int:
        return len(self._engines.connections) * self.slot_table.shape.streams

    def connect(self, engine: int, incarnation: int, endpoint: socket.socket) -> None:
        """Adds an engine worker, and submits the images that wait for one."""
        previous = self._engines.connections.get(engine)
        if previous is not None:  # an earlier incarnation, whose exit has not been read yet
            self._engine_lost(engine, previous)
        connection = self._engines.open(engine, incarnation, endpoint)
        with self._lock:
            self._engines.add(connection)
            waiting = [job for job in self._jobs.values() if job.decoded and job.ticket.engine is None]
            messages = [self._submit(job) for job in waiting]
        self._engines.send_all(messages)
        self._engines.listen(connection)

    def retire(self) -> None:
        self.retired = True
        self._close_if_finished()

    def _engine_lost(self, engine: int, connection: Connection) -> None:
        """The engine worker has exited. Its images are submitted to another one, or wait until one is connected."""
        with self._lock:
            if self._engines.connections.get(engine) is not connection:
                return  # its successor is connected already
            self._engines.lose(engine)
            messages = [self._retry(self._jobs[ticket.sequence]) for ticket in self.slots.reclaim(engine)]
        self._engines.send_all(messages)

    def _close_if_finished(self) -> None:
        with self._lock:
            if not self._engines.connections:
                for job in [job for job in self._jobs.values() if job.decoded]:
                    self._finish(job, ModelReplacedError())
            elif not self._jobs:
                for engine in list(self._engines.connections):
                    self._engines.close(engine)

    # -- admission

    def _admit(self, deadline: float, priority: int) -> Ticket:
        with self._lock:
            admission = self.slots.admit(deadline, priority, time.monotonic(), self._engines.available_at())
            if isinstance(admission, Ticket):
                return admission
            self.offered_load.record_rejected()
        self.metrics.images_shed.labels(admission.reason).inc()
        raise overloaded(admission)

    async def _wait_for_slot(self, deadline: float, priority: int) -> Ticket:
        while True:
            with self._lock:
                ticket = self.slots.take(deadline, priority)
            if ticket is not None:
                return ticket
            await self._waiters.wait(deadline)

    # -- on a decode thread

    def _decode(self, job: ImageJob) -> None:
        began = time.monotonic()
        expired = job.ticket.deadline <= began
        if job.abandoned or expired:
            error: errors.ServiceError | None = errors.DeadlineExceededError(
                "the deadline passed before the image could be decoded"
            )
        else:
            error = decode_into(self.slot_table.pixels, job.ticket.slot, self.decoder, job.encoded)
        job.decode_seconds = time.monotonic() - began
        message: Message | None = None
        with self._lock:
            job.decoded = True
            self._record_offered_load(job, expired, error is None)
            if error is None and job.abandoned:
                error = errors.DeadlineExceededError("client disconnected")
            if error is None:
                message = self._submit(job)
            else:
                self._finish(job, error)
        if message is not None:
            self._engines.send(*message)
            if job.abandoned:  # the client may have disconnected before the submission was sent
                self._engines.send(message[0], job.ticket, wire_format.WITHDRAW)
        self.metrics.decode_seconds.observe(job.decode_seconds)

    # -- with the lock held

    def _record_offered_load(self, job: ImageJob, expired: bool, inference: bool) -> None:
        if job.admitted:  # recorded when the previous model admitted it
            return
        if expired:
            self.offered_load.record_rejected()
        elif not job.abandoned:
            self.offered_load.record_decoded(job.decode_seconds, inference)

    def _submit(self, job: ImageJob) -> Message | None:
        """Assigns the image to the engine worker that would finish it first. Send the message without the lock.

        None if no engine worker is connected: then the image waits for one.
        """
        ticket = job.ticket
        if not self._engines.connections:
            if self.retired:
                self._finish(job, ModelReplacedError())
            return None
        engine = self._engines.earliest(ticket)
        retry = wire_format.RETRY_ALONE if ticket.crashes else wire_format.RETRY
        self.slots.submit(ticket, engine)
        return self._engines.connections[engine], ticket, retry if job.admitted else wire_format.SUBMIT

    def _retry(self, job: ImageJob) -> Message | None:
        """Submits an image of an engine worker that has exited, unless the image may be the cause."""
        error = job.retry_error()
        if error is not None:
            self._finish(job, error)
            return None
        job.admitted = True
        self.metrics.images_retried.inc()
        return self._submit(job)

    def _finish(self, job: ImageJob, outcome: Outcome) -> None:
        """On any thread: frees a slot that this HTTP worker holds and has the outcome delivered."""
        self.slots.release(job.ticket)
        del self._jobs[job.ticket.sequence]
        self.loop.call_soon_threadsafe(self._deliver, job, outcome)

    # -- on the event loop

    def _deliver(self, job: ImageJob, outcome: Outcome) -> None:
        """After the job's slot was freed: resolves the job and wakes the next image that waits for a slot."""
        job.resolve(outcome)
        self._waiters.wake_one()
        if self.retired:
            self._close_if_finished()

    def _complete(self, completion: wire_format.Completion) -> None:
        with self._lock:
            logits = self.slot_table.logits[completion.slot].copy()
            ticket = self.slots.complete(completion.slot, completion.sequence)
            if ticket is None:
                log.error("dropped a stale completion of image %d in slot %d", completion.sequence, completion.slot)
                return
            job = self._jobs.pop(ticket.sequence)
        outcome = job.outcome(completion, logits)
        if isinstance(outcome, ImageResult):
            self.delivery_time.record(completion)
        elif isinstance(outcome, errors.OverloadedError):
            self.metrics.images_shed.labels(outcome.reason).inc()
        self._deliver(job, outcome)

    def _abandon(self, job: ImageJob) -> None:
        """The client no longer waits: withdraws the image. Does nothing if it is finished."""
        with self._lock:
            if job.ticket.sequence not in self._jobs:
                return
            job.abandoned = True
            engine = job.ticket.engine
            connection = None if engine is None else self._engines.connections[engine]
            if connection is None and job.decoded:
                self._finish(job, errors.DeadlineExceededError("client disconnected"))
        if connection is not None:
            self._engines.send(connection, job.ticket, wire_format.WITHDRAW)
