"""A HTTP worker's way to the engines of one model: admission, decoding into slots, submission, answers.

On the event loop, except that decode threads run _decode() to its end. One lock guards slots and links; it is never held while decoding.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass, field

from vitserve.model.arrays import Floats, softmax
from vitserve.model.bundle.preprocess import ImageError
from vitserve.service import errors
from vitserve.service.http_worker.decoding import decoder_for
from vitserve.service.http_worker.offered_load import OfferedLoad
from vitserve.service.ipc import wire_format
from vitserve.service.ipc.connection import Connection
from vitserve.service.ipc.model_info import ModelInfo
from vitserve.service.ipc.shared_memory import SlotTable, sort_key
from vitserve.service.ipc.slots import FATAL, Slots, Ticket
from vitserve.service.metrics import Metrics
from vitserve.service.scheduler import Rejection
from vitserve.service.settings import Settings

log = logging.getLogger(__name__)

_REJECTION_DETAIL = {
    "full": "every slot is taken",
    "deadline": "the work admitted before this image leaves no room before its deadline",
}


class ModelReplacedError(Exception):
    """The model has been replaced and its engines are gone: the image, which was admitted, is to be given to the next model."""


@dataclass(frozen=True, slots=True)
class Answer:
    probabilities: Floats  # [classes]
    decode_seconds: float
    queue_seconds: float
    inference_seconds: float


@dataclass(slots=True, eq=False)
class _Job:
    ticket: Ticket
    encoded: bytes
    future: asyncio.Future[Answer]
    received: float
    admitted: bool  # by an engine before: never rejected again
    decoded: bool = False
    decode_seconds: float = 0.0
    left: bool = False  # nobody waits for it any more


RETURNS = 2.0  # times that an answer's way back takes on average, which are kept free before the deadline
_MOST_RETURN = 0.25  # of the time that a client gives; or a HTTP worker that stood still once would reject all, and so never learn better
_NEWEST = 0.1  # weight of the newest in that average

Outcome = Answer | errors.ServiceError | ModelReplacedError
Ask = tuple[Connection, Ticket, int]  # what to send, and to which engine


@dataclass
class Dispatcher:
    """connect() → classify() … → retire(), after which it closes its links as soon as nothing is left to answer."""

    slot_table: SlotTable
    worker: int
    incarnation: int
    settings: Settings
    metrics: Metrics
    decoders: Executor
    loop: asyncio.AbstractEventLoop
    retired: bool = field(default=False, init=False)
    _jobs: dict[int, _Job] = field(default_factory=dict, init=False)  # by sequence number
    _connections: dict[int, Connection] = field(default_factory=dict, init=False)  # by engine
    _lost_at: dict[int, float] = field(default_factory=dict, init=False)  # by engine that died and is not back
    _waiters: deque[asyncio.Future[None]] = field(default_factory=deque, init=False)  # of admitted images, for a slot
    _return_seconds: float = field(default=0.0, init=False)  # from the end of a batch to its answer here, recently

    def __post_init__(self) -> None:
        self.model_info = ModelInfo.from_json(self.slot_table.description)
        self.decoder = decoder_for(self.model_info.preprocessing, self.settings)
        self.slots = Slots(self.slot_table, self.worker, self.incarnation)
        self.offered_load = OfferedLoad(self.slot_table, self.worker, self.metrics)
        self._lock = threading.Lock()

    async def classify(self, encoded: bytes, deadline: float, priority: int, admitted: bool = False) -> Answer:
        """One image's answer. ``deadline`` is in time.monotonic()'s seconds; one ``admitted`` before, by another model, is not rejected.

        Raises Overloaded at once, before decoding, where the deadline cannot be met; NotAnImage, DamagedImage, ImageTooLarge; EngineFailed;
        DeadlineExceeded; Moved.
        """
        if self.retired:
            raise ModelReplacedError
        ticket = await self._slot(deadline, priority) if admitted else self._admit(self._due(deadline), priority)
        job = _Job(ticket, encoded, self.loop.create_future(), time.monotonic(), admitted)
        self._jobs[ticket.sequence] = job
        self.decoders.submit(self._decode, job)
        # One that runs at its deadline is still answered; the engine itself answers those that wait at theirs.
        patience = max(0.0, deadline - job.received) + 2 * self.slot_table.batch_seconds()
        timer = self.loop.call_later(
            patience, self._answer, job, errors.DeadlineExceededError("the deadline passed before an answer was there")
        )
        try:
            return await job.future
        finally:
            timer.cancel()
            self._leave(job)

    # -- links

    def connect(self, engine: int, connection: Connection) -> None:
        """Submits what waits for an engine."""
        if engine in self._connections:  # an earlier incarnation, whose end has not been read yet
            self._lose(engine, self._connections[engine])
        with self._lock:
            self._connections[engine] = connection
            self._lost_at.pop(engine, None)
            homeless = [job for job in self._jobs.values() if job.decoded and job.ticket.engine is None]
            asks = [self._submit(job) for job in homeless]
        self._send_all(asks)
        self.loop.add_reader(connection.fileno(), self._read, engine, connection)

    def retire(self) -> None:
        """Another model serves from now on."""
        self.retired = True
        self._close_when_done()

    @property
    def reachable(self) -> bool:
        """Whether an engine is there."""
        return bool(self._connections)

    @property
    def streams(self) -> int:
        """Of the engines that are there."""
        return len(self._connections) * self.slot_table.shape.streams

    def stuck(self, connection: Connection) -> None:
        """On any thread: the link is to be flushed as soon as its socket takes more."""
        self.loop.call_soon_threadsafe(self._watch, connection)

    def _watch(self, connection: Connection) -> None:
        if (
            self._connections.get(connection.peer) is connection
        ):  # it may have been closed meanwhile, and its descriptor be another's
            self.loop.add_writer(connection.fileno(), self._flush, connection)

    def _flush(self, connection: Connection) -> None:
        if connection.flush():
            self.loop.remove_writer(connection.fileno())

    def _read(self, engine: int, connection: Connection) -> None:
        """One message, which is one batch; if there are more, the event loop calls again."""
        try:
            message = connection.receive()
            if message is None:
                return
            incarnation, answers = wire_format.unpack_answers(message)
            if incarnation != connection.peer_incarnation:
                log.error(
                    "engine %d, epoch %d, sent a message of epoch %d; it is dropped",
                    engine,
                    connection.peer_incarnation,
                    incarnation,
                )
                return
            for answer in answers:
                self._take_answer(answer)
        except EOFError:
            self._lose(engine, connection)
        except wire_format.WireFormatError:  # a fault of ours; whom it concerns is unknown
            log.critical("engine %d does not speak as it should", engine, exc_info=True)
            os._exit(os.EX_SOFTWARE)

    def _lose(self, engine: int, connection: Connection) -> None:
        """The engine died, or was retired when nothing was left to answer. What it left unanswered goes to another, or waits for the next."""
        with self._lock:
            if self._connections.get(engine) is not connection:
                return  # its successor is connected already
            self._disconnect(engine, connection)
            self._lost_at[engine] = time.monotonic()
            asks = []
            for ticket in self.slots.lost(engine):
                job = self._jobs[ticket.sequence]
                if ticket.crashes >= FATAL:
                    log.error(
                        "image %d was being run by %d engines that died; it is not run again",
                        ticket.sequence,
                        ticket.crashes,
                    )
                    self._end(job, errors.EngineFailedError(f"{ticket.crashes} engines died while they ran this image"))
                elif job.left:
                    self._end(job, errors.EngineFailedError("nobody waits for it"))
                else:
                    job.admitted = True
                    self.metrics.images_retried.inc()
                    asks.append(self._submit(job))
        self._send_all(asks)

    def _disconnect(self, engine: int, connection: Connection) -> None:
        """The lock is held."""
        del self._connections[engine]
        self.loop.remove_reader(connection.fileno())
        self.loop.remove_writer(connection.fileno())
        connection.close()

    def _close_when_done(self) -> None:
        with self._lock:
            if not self._connections:
                for job in [job for job in self._jobs.values() if job.decoded]:
                    self._end(job, ModelReplacedError())
            elif not self._jobs:
                for engine, connection in list(self._connections.items()):
                    self._disconnect(engine, connection)

    # -- admission

    def _due(self, deadline: float) -> float:
        """When the engine must be done, for the answer to be there at the deadline."""
        return deadline - min(RETURNS * self._return_seconds, _MOST_RETURN * max(0.0, deadline - time.monotonic()))

    def _admit(self, deadline: float, priority: int) -> Ticket:
        with self._lock:
            admitted = self.slots.admit(deadline, priority, time.monotonic(), self._engines())
            if isinstance(admitted, Rejection):
                self.offered_load.rejected()
        if isinstance(admitted, Rejection):
            raise self._rejection(admitted)
        return admitted

    async def _slot(self, deadline: float, priority: int) -> Ticket:
        """For an image that was admitted before: waits for a slot if it must."""
        while True:
            with self._lock:
                ticket = self.slots.take(deadline, priority)
            if ticket is not None:
                return ticket
            waiter: asyncio.Future[None] = self.loop.create_future()
            self._waiters.append(waiter)
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await waiter
            except TimeoutError:
                raise errors.DeadlineExceededError("the deadline passed before a slot was free") from None

    def _engines(self) -> dict[int, float]:
        """From when on each engine runs, for Ring.completion estimate(). Those that are gone count only where there is no other."""
        if self._connections:
            return dict.fromkeys(self._connections, 0.0)
        return {engine: lost_at + self.slot_table.start_seconds(engine) for engine, lost_at in self._lost_at.items()}

    def _rejection(self, rejection: Rejection) -> errors.OverloadedError:
        self.metrics.images_shed.labels(rejection.reason).inc()
        return errors.OverloadedError(
            _REJECTION_DETAIL[rejection.reason], rejection.reason, rejection.retry_after_seconds
        )

    # -- on a decode thread

    def _decode(self, job: _Job) -> None:
        began = time.monotonic()
        outcome: Outcome | None = None
        late = job.ticket.deadline <= began
        try:
            if job.left or late:
                outcome = errors.DeadlineExceededError("the deadline passed before the image could be decoded")
            else:
                self.slot_table.pixels[job.ticket.slot] = self.decoder.decode(job.encoded)
        except ImageError as error:
            outcome = errors.of_image(error)
        except Exception:  # answered, so that nobody waits for what will not come
            log.exception("decoding failed in a way that it should not")
            outcome = errors.ServiceError("the image could not be decoded")
        job.decode_seconds = time.monotonic() - began
        ask: Ask | None = None
        with self._lock:
            job.decoded = True
            if late and not job.admitted:
                self.offered_load.rejected()
            elif not job.left and not job.admitted:  # one that was admitted before asked there
                self.offered_load.decoded(job.decode_seconds, runs=outcome is None)
            if outcome is None and job.left:
                outcome = errors.DeadlineExceededError("nobody waits for it")
            if outcome is None:
                ask = self._submit(job)
            else:
                self._end(job, outcome)
        if ask is not None:
            self._send(*ask)
            if job.left:  # it may have been withdrawn before it was sent
                self._send(ask[0], job.ticket, wire_format.WITHDRAW)
        self.metrics.decode_seconds.observe(job.decode_seconds)

    # Sending gives up the interpreter lock; done under ours, everybody would wait for both. So it is done after: should the engine have died by then,
    # the message goes to a closed link, and _lose() has taken care of the image already.

    def _send(self, connection: Connection, ticket: Ticket, ask: int) -> None:
        submission = wire_format.Submission(ticket.slot, ask, ticket.priority, ticket.sequence, ticket.deadline)
        connection.send(wire_format.pack_submission(self.incarnation, submission))

    def _send_all(self, asks: list[Ask | None]) -> None:
        for ask in asks:
            if ask is not None:
                self._send(*ask)

    # -- with the lock held

    def _submit(self, job: _Job) -> Ask | None:
        """Gives the image to the engine that will have it done first, to whom the client sends what is returned; without one, it waits for one."""
        ticket = job.ticket
        if not self._connections:
            if self.retired:
                self._end(job, ModelReplacedError())
            return None
        estimate_completion = (
            self.slot_table.estimate_completion(
                sort_key(ticket.priority, ticket.deadline), time.monotonic(), self._engines()
            )
            if len(self._connections) > 1
            else None
        )
        engine = estimate_completion.engine if estimate_completion is not None else next(iter(self._connections))
        ask = wire_format.ALONE if ticket.crashes else wire_format.AGAIN if job.admitted else wire_format.ASK
        self.slots.submit(ticket, engine)
        return self._connections[engine], ticket, ask

    def _end(self, job: _Job, outcome: Outcome) -> None:
        """Frees a slot that the HTTP worker holds, and answers."""
        self.slots.release(job.ticket)
        self._close(job, outcome)

    def _close(self, job: _Job, outcome: Outcome) -> None:
        del self._jobs[job.ticket.sequence]
        self.loop.call_soon_threadsafe(self._settle, job, outcome)

    # -- on the event loop

    def _take_answer(self, answer: wire_format.Answer) -> None:
        with self._lock:
            logits = self.slot_table.logits[answer.slot].copy()
            ticket = self.slots.answered(answer.slot, answer.sequence)
            if ticket is None:
                log.error(
                    "an answer for slot %d names image %d, which is not there; it is dropped",
                    answer.slot,
                    answer.sequence,
                )
                return
            job = self._jobs.pop(ticket.sequence)
        self._settle(job, self._outcome(job, answer, logits))

    def _outcome(self, job: _Job, answer: wire_format.Answer, logits: Floats) -> Outcome:
        if answer.outcome == wire_format.DONE:
            queued = max(0.0, answer.started - job.received - job.decode_seconds)
            self._return_seconds += _NEWEST * (
                time.monotonic() - answer.started - answer.seconds - self._return_seconds
            )
            return Answer(softmax(logits), job.decode_seconds, queued, answer.seconds)
        if answer.outcome == wire_format.REJECTED_DEADLINE:
            return self._rejection(Rejection("deadline", answer.retry_after_seconds))
        if answer.outcome == wire_format.REJECTED_FULL:
            return self._rejection(Rejection("full", answer.retry_after_seconds))
        if answer.outcome == wire_format.FAILED:
            return errors.EngineFailedError("the engine failed while it ran this image")
        return errors.DeadlineExceededError("the deadline passed while the image waited")

    def _answer(self, job: _Job, outcome: Outcome) -> None:
        if not job.future.done():
            if isinstance(outcome, Answer):
                job.future.set_result(outcome)
            else:
                job.future.set_exception(outcome)

    def _settle(self, job: _Job, outcome: Outcome) -> None:
        self._answer(job, outcome)
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                break
        if self.retired:
            self._close_when_done()

    def _leave(self, job: _Job) -> None:
        """The client waits no more. Nothing to do where it was answered."""
        with self._lock:
            if job.ticket.sequence not in self._jobs:
                return
            job.left = True
            connection = self._connections[job.ticket.engine] if job.ticket.engine is not None else None
            if connection is None and job.decoded:
                self._end(job, errors.DeadlineExceededError("nobody waits for it"))
        if connection is not None:
            self._send(connection, job.ticket, wire_format.WITHDRAW)
