"""Takes an image from admission to its result: reserve a slot, decode into it, submit it to an engine worker, deliver.

Runs on the event loop, except that _decoded() also runs on decode threads. One lock guards the slots, the jobs and the
connections. It is never held while an image is decoded.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from vitserve.service import errors
from vitserve.service.http_worker.dispatch.admission import Admission
from vitserve.service.http_worker.dispatch.decode_stage import DecodeStage, DecodeWorkers
from vitserve.service.http_worker.dispatch.decoding import PixelImage, decoder_for
from vitserve.service.http_worker.dispatch.engine_connections import EngineConnections, Message
from vitserve.service.http_worker.dispatch.expiry import Expiry
from vitserve.service.http_worker.dispatch.image_job import ImageJob, ImageResult, ModelReplacedError, Outcome
from vitserve.service.http_worker.dispatch.offered_load import DecodeWork, OfferedLoad
from vitserve.service.http_worker.metric_buffer import MetricBuffer
from vitserve.service.http_worker.turn import Turns
from vitserve.service.ipc import wire_format
from vitserve.service.ipc.connection import Connection
from vitserve.service.ipc.model_info import ModelInfo
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.ipc.slots import Slots, Ticket
from vitserve.service.settings import Settings

log = logging.getLogger(__name__)


class ImageRuns(Protocol):
    """Runs images through a model. See Dispatcher.submit() and abandon()."""

    def submit(
        self,
        image: bytes | PixelImage,
        deadline: float,
        priority: int,
        on_done: Callable[[Outcome], None],
        admitted: bool = False,
        embedding: bool = False,
    ) -> Any: ...

    def abandon(self, job: Any, /) -> None: ...


@dataclass(eq=False)
class Dispatcher:
    """Life cycle: connect() → submit() … → retire(). Then it closes its connections once all images are finished."""

    slot_table: SlotTable
    worker: int
    incarnation: int
    settings: Settings
    metrics: MetricBuffer
    decoders: DecodeWorkers
    turns: Turns
    loop: asyncio.AbstractEventLoop
    retired: bool = field(default=False, init=False)
    images: ImageRuns = field(init=False)  # through the response cache, if there is one
    _jobs: dict[int, ImageJob] = field(default_factory=dict, init=False)  # by sequence number

    def __post_init__(self) -> None:
        self.images = self
        self.model_info = ModelInfo.from_json(self.slot_table.description)
        self.slots = Slots(self.slot_table, self.worker, self.incarnation)
        self.offered_load = OfferedLoad(self.slot_table, self.worker, self.metrics.all)
        self._lock = threading.Lock()
        callbacks = self._complete, self._engine_lost
        self._engines = EngineConnections(self.slot_table, self.incarnation, self.loop, self.turns, *callbacks)
        decoder = decoder_for(self.model_info.preprocessing, self.settings)
        table = self.slot_table
        self.decoding = DecodeStage(decoder, self.decoders, table.pixels, table.shape.workers, self._decoded)
        parts = self.slots, self._engines, self.decoders.pool, self.offered_load, self.metrics, self.turns, self._lock
        self.admission = Admission(*parts)
        self._expiry = Expiry(self.loop, self.slot_table, self.abandon)

    def submit(
        self,
        image: bytes | PixelImage,
        deadline: float,
        priority: int,
        on_done: Callable[[Outcome], None],
        admitted: bool = False,
        embedding: bool = False,
    ) -> ImageJob:
        """Runs one image through the model. ``deadline`` is in time.monotonic() seconds.

        ``on_done`` receives the outcome on the event loop, possibly before submit() returns: OverloadedError without
        decoding if the deadline cannot be met, an error of errors.from_image_error(), EngineFailedError,
        DeadlineExceededError, ModelReplacedError, or ServiceError for an unexpected failure.
        An image that was ``admitted`` by the previous model is not rejected, but waits for a slot.
        """
        now = time.monotonic()
        if isinstance(image, PixelImage):
            job = ImageJob(b"", deadline, priority, admitted, on_done, now, embedding, image)
        else:
            job = ImageJob(image, deadline, priority, admitted, on_done, now, embedding)
        if self.retired:
            job.deliver(ModelReplacedError())
        elif admitted:
            self._expiry.add(job)
            self.admission.waiting_for_slot.append(job)
            self._start_waiting()
        else:
            ticket = self.admission.admit(job)
            if isinstance(ticket, errors.OverloadedError):
                job.deliver(ticket)
            else:
                self._expiry.add(job)
                self._start(job, ticket)
        return job

    def abandon(self, job: ImageJob) -> None:
        """The client no longer waits: withdraws the image. Does nothing if it is finished."""
        with self._lock:
            job.abandoned = True
            if job.ticket is None or job.ticket.sequence not in self._jobs:
                return
            engine = job.ticket.engine
            connection = None if engine is None else self._engines.connections[engine]
            if connection is None and job.decoded:
                self._finish(job, errors.DeadlineExceededError("client disconnected"))
        if connection is not None:
            self._engines.post((connection, job.ticket, wire_format.WITHDRAW, False))

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
            waiting = [job for job in self._jobs.values() if job.decoded and job.slot.engine is None]
            messages = [self._assign(job) for job in waiting]
        self._engines.post_all(messages)
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
        self._engines.post_all(messages)

    def _close_if_finished(self) -> None:
        with self._lock:
            if not self._engines.connections:
                for job in [job for job in self._jobs.values() if job.decoded]:
                    self._finish(job, ModelReplacedError())
            elif not self._jobs:
                for engine in list(self._engines.connections):
                    self._engines.close(engine)

    # -- decoding

    def _start_waiting(self) -> None:
        """Starts the images that wait for a slot, as far as slots are free."""
        while (job_and_ticket := self.admission.next_with_slot()) is not None:
            self._start(*job_and_ticket)

    def _start(self, job: ImageJob, ticket: Ticket) -> None:
        job.ticket = ticket
        self._jobs[ticket.sequence] = job
        self.decoding.start(job)

    def _decoded(self, job: ImageJob, error: errors.ServiceError | None, work: DecodeWork, on_loop: bool) -> None:
        """Submits the image. On a decode thread, or on the event loop."""
        message: Message | None = None
        with self._lock:
            job.decoded = True
            if not job.admitted:  # else it was recorded when the previous model admitted it
                self.offered_load.record(job.decode_seconds, work, inference=error is None)
            if error is None and job.abandoned:
                error = errors.DeadlineExceededError("client disconnected")
            if error is None:
                message = self._assign(job)
            else:
                self._finish(job, error)
        send = self._engines.post if on_loop else self._engines.send
        send(message)
        if message is not None and job.abandoned:  # the client may have disconnected before the submission was sent
            send((message[0], job.slot, wire_format.WITHDRAW, False))

    # -- with the lock held

    def _assign(self, job: ImageJob) -> Message | None:
        """Assigns the image to the engine worker that would finish it first. Send the message without the lock.

        None if no engine worker is connected: then the image waits for one.
        """
        if not self._engines.connections:
            if self.retired:
                self._finish(job, ModelReplacedError())
            return None
        engine = self._engines.earliest(job.slot)
        self.slots.submit(job.slot, engine)
        return self._engines.connections[engine], job.slot, job.action, job.embedding

    def _retry(self, job: ImageJob) -> Message | None:
        """Submits an image of an engine worker that has exited, unless the image may be the cause."""
        error = job.retry_error()
        if error is not None:
            self._finish(job, error)
            return None
        job.admitted = True
        self.metrics.inc(self.metrics.all.images_retried)
        return self._assign(job)

    def _finish(self, job: ImageJob, outcome: Outcome) -> None:
        """On any thread: frees a slot that this HTTP worker holds and has the outcome delivered."""
        self.slots.release(job.slot)
        del self._jobs[job.slot.sequence]
        self.loop.call_soon_threadsafe(self._deliver, job, outcome)

    # -- on the event loop

    def _complete(self, completions: list[wire_format.Completion]) -> None:
        """Delivers the results of a batch."""
        done: list[tuple[ImageJob, Outcome]] = []
        with self._lock:
            for completion in completions:
                ticket = self.slots.complete(completion.slot, completion.sequence)
                if ticket is None:
                    log.error("dropped a stale completion of image %d in slot %d", completion.sequence, completion.slot)
                    continue
                job = self._jobs.pop(ticket.sequence)
                done.append((job, job.outcome(completion, self.slot_table, self.model_info)))
        for job, outcome in done:
            self._deliver(job, outcome)
        if done and isinstance(done[-1][1], ImageResult):
            self.admission.delivery_time.record(completions[-1])

    def _deliver(self, job: ImageJob, outcome: Outcome) -> None:
        """After the job's slot was freed."""
        self._expiry.remove(job)
        self.turns.at_end(self.admission.flush_offered_load)
        job.deliver(outcome)
        if job.decoded:
            self.metrics.observe(self.metrics.all.decode_seconds, job.decode_seconds)
        if self.admission.waiting_for_slot:
            self._start_waiting()
        if self.retired:
            self._close_if_finished()
