"""A front's way to the engines of one model: admission, decoding into slots, submission, answers. Imported by state.py and app.py.

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
from vitserve.service.http_worker.offered_load import Demand
from vitserve.service.ipc import wire_format
from vitserve.service.ipc.connection import Link
from vitserve.service.ipc.model_info import Served
from vitserve.service.ipc.shared_memory import Ring, urgency
from vitserve.service.ipc.slots import FATAL, Slots, Ticket
from vitserve.service.metrics import Metrics
from vitserve.service.scheduler import Shed
from vitserve.service.settings import Settings

log = logging.getLogger(__name__)

_SHED_DETAIL = {
    "full": "every slot is taken",
    "deadline": "the work admitted before this image leaves no room before its deadline",
}


class Moved(Exception):
    """The model has been replaced and its engines are gone: the image, which was admitted, is to be given to the next model."""


@dataclass(frozen=True, slots=True)
class Answer:
    probabilities: Floats  # [classes]
    decode_seconds: float
    queue_seconds: float
    run_seconds: float


@dataclass(slots=True, eq=False)
class _Job:
    ticket: Ticket
    encoded: bytes
    future: asyncio.Future[Answer]
    received: float
    admitted: bool  # by an engine before: never refused again
    decoded: bool = False
    decode_seconds: float = 0.0
    left: bool = False  # nobody waits for it any more


RETURNS = 2.0  # times that an answer's way back takes on average, which are kept free before the deadline
_MOST_RETURN = 0.25  # of the time that a caller gives; or a front that stood still once would refuse all, and so never learn better
_NEWEST = 0.1  # weight of the newest in that average

Outcome = Answer | errors.ServiceError | Moved
Ask = tuple[Link, Ticket, int]  # what to send, and to which engine


@dataclass
class Dispatcher:
    """connect() → classify() … → retire(), after which it closes its links as soon as nothing is left to answer."""

    ring: Ring
    front: int
    epoch: int
    settings: Settings
    metrics: Metrics
    decoders: Executor
    loop: asyncio.AbstractEventLoop
    retired: bool = field(default=False, init=False)
    _jobs: dict[int, _Job] = field(default_factory=dict, init=False)  # by sequence number
    _links: dict[int, Link] = field(default_factory=dict, init=False)  # by engine
    _lost_at: dict[int, float] = field(default_factory=dict, init=False)  # by engine that died and is not back
    _waiters: deque[asyncio.Future[None]] = field(default_factory=deque, init=False)  # of admitted images, for a slot
    _return_seconds: float = field(default=0.0, init=False)  # from the end of a batch to its answer here, of late

    def __post_init__(self) -> None:
        self.served = Served.from_json(self.ring.description)
        self.decoder = decoder_for(self.served.preprocessing, self.settings)
        self.slots = Slots(self.ring, self.front, self.epoch)
        self.demand = Demand(self.ring, self.front, self.metrics)
        self._lock = threading.Lock()

    async def classify(self, encoded: bytes, deadline: float, priority: int, admitted: bool = False) -> Answer:
        """One image's answer. ``deadline`` is in time.monotonic()'s seconds; one ``admitted`` before, by another model, is not refused.

        Raises Overloaded at once, before decoding, where the deadline cannot be met; NotAnImage, DamagedImage, ImageTooLarge; EngineFailed;
        DeadlineExceeded; Moved.
        """
        if self.retired:
            raise Moved
        ticket = await self._slot(deadline, priority) if admitted else self._admit(self._due(deadline), priority)
        job = _Job(ticket, encoded, self.loop.create_future(), time.monotonic(), admitted)
        self._jobs[ticket.sequence] = job
        self.decoders.submit(self._decode, job)
        # One that runs at its deadline is still answered; the engine itself answers those that wait at theirs.
        patience = max(0.0, deadline - job.received) + 2 * self.ring.batch_seconds()
        timer = self.loop.call_later(patience, self._answer, job, errors.DeadlineExceeded("the deadline passed before an answer was there"))
        try:
            return await job.future
        finally:
            timer.cancel()
            self._leave(job)

    # -- links

    def connect(self, engine: int, link: Link) -> None:
        """Submits what waits for an engine."""
        if engine in self._links:  # an earlier incarnation, whose end has not been read yet
            self._lose(engine, self._links[engine])
        with self._lock:
            self._links[engine] = link
            self._lost_at.pop(engine, None)
            homeless = [job for job in self._jobs.values() if job.decoded and job.ticket.engine is None]
            asks = [self._submit(job) for job in homeless]
        self._send_all(asks)
        self.loop.add_reader(link.fileno(), self._read, engine, link)

    def retire(self) -> None:
        """Another model serves from now on."""
        self.retired = True
        self._close_when_done()

    @property
    def reachable(self) -> bool:
        """Whether an engine is there."""
        return bool(self._links)

    @property
    def lanes(self) -> int:
        """Of the engines that are there."""
        return len(self._links) * self.ring.shape.lanes

    def stuck(self, link: Link) -> None:
        """On any thread: the link is to be flushed as soon as its socket takes more."""
        self.loop.call_soon_threadsafe(self._watch, link)

    def _watch(self, link: Link) -> None:
        if self._links.get(link.peer) is link:  # it may have been closed meanwhile, and its descriptor be another's
            self.loop.add_writer(link.fileno(), self._flush, link)

    def _flush(self, link: Link) -> None:
        if link.flush():
            self.loop.remove_writer(link.fileno())

    def _read(self, engine: int, link: Link) -> None:
        """One message, which is one batch; if there are more, the event loop calls again."""
        try:
            message = link.receive()
            if message is None:
                return
            epoch, answers = wire_format.unpack_answers(message)
            if epoch != link.peer_epoch:
                log.error("engine %d, epoch %d, sent a message of epoch %d; it is dropped", engine, link.peer_epoch, epoch)
                return
            for answer in answers:
                self._take_answer(answer)
        except EOFError:
            self._lose(engine, link)
        except wire_format.WireError:  # a fault of ours; whom it concerns is unknown
            log.critical("engine %d does not speak as it should", engine, exc_info=True)
            os._exit(os.EX_SOFTWARE)

    def _lose(self, engine: int, link: Link) -> None:
        """The engine died, or was retired when nothing was left to answer. What it left unanswered goes to another, or waits for the next."""
        with self._lock:
            if self._links.get(engine) is not link:
                return  # its successor is connected already
            self._disconnect(engine, link)
            self._lost_at[engine] = time.monotonic()
            asks = []
            for ticket in self.slots.lost(engine):
                job = self._jobs[ticket.sequence]
                if ticket.crashes >= FATAL:
                    log.error("image %d was being run by %d engines that died; it is not run again", ticket.sequence, ticket.crashes)
                    self._end(job, errors.EngineFailed(f"{ticket.crashes} engines died while they ran this image"))
                elif job.left:
                    self._end(job, errors.EngineFailed("nobody waits for it"))
                else:
                    job.admitted = True
                    self.metrics.images_run_again.inc()
                    asks.append(self._submit(job))
        self._send_all(asks)

    def _disconnect(self, engine: int, link: Link) -> None:
        """The lock is held."""
        del self._links[engine]
        self.loop.remove_reader(link.fileno())
        self.loop.remove_writer(link.fileno())
        link.close()

    def _close_when_done(self) -> None:
        with self._lock:
            if not self._links:
                for job in [job for job in self._jobs.values() if job.decoded]:
                    self._end(job, Moved())
            elif not self._jobs:
                for engine, link in list(self._links.items()):
                    self._disconnect(engine, link)

    # -- admission

    def _due(self, deadline: float) -> float:
        """When the engine must be done, for the answer to be there at the deadline."""
        return deadline - min(RETURNS * self._return_seconds, _MOST_RETURN * max(0.0, deadline - time.monotonic()))

    def _admit(self, deadline: float, priority: int) -> Ticket:
        with self._lock:
            admitted = self.slots.admit(deadline, priority, time.monotonic(), self._engines())
            if isinstance(admitted, Shed):
                self.demand.refused()
        if isinstance(admitted, Shed):
            raise self._refuse(admitted)
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
                raise errors.DeadlineExceeded("the deadline passed before a slot was free") from None

    def _engines(self) -> dict[int, float]:
        """From when on each engine runs, for Ring.outlook(). Those that are gone count only where there is no other."""
        if self._links:
            return dict.fromkeys(self._links, 0.0)
        return {engine: lost_at + self.ring.start_seconds(engine) for engine, lost_at in self._lost_at.items()}

    def _refuse(self, shed: Shed) -> errors.Overloaded:
        self.metrics.images_shed.labels(shed.reason).inc()
        return errors.Overloaded(_SHED_DETAIL[shed.reason], shed.reason, shed.retry_after_seconds)

    # -- on a decode thread

    def _decode(self, job: _Job) -> None:
        began = time.monotonic()
        outcome: Outcome | None = None
        late = job.ticket.deadline <= began
        try:
            if job.left or late:
                outcome = errors.DeadlineExceeded("the deadline passed before the image could be decoded")
            else:
                self.ring.pixels[job.ticket.slot] = self.decoder.decode(job.encoded)
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
                self.demand.refused()
            elif not job.left and not job.admitted:  # one that was admitted before asked there
                self.demand.decoded(job.decode_seconds, runs=outcome is None)
            if outcome is None and job.left:
                outcome = errors.DeadlineExceeded("nobody waits for it")
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

    def _send(self, link: Link, ticket: Ticket, ask: int) -> None:
        submission = wire_format.Submission(ticket.slot, ask, ticket.priority, ticket.sequence, ticket.deadline)
        link.send(wire_format.pack_submission(self.epoch, submission))

    def _send_all(self, asks: list[Ask | None]) -> None:
        for ask in asks:
            if ask is not None:
                self._send(*ask)

    # -- with the lock held

    def _submit(self, job: _Job) -> Ask | None:
        """Gives the image to the engine that will have it done first, to whom the caller sends what is returned; without one, it waits for one."""
        ticket = job.ticket
        if not self._links:
            if self.retired:
                self._end(job, Moved())
            return None
        outlook = self.ring.outlook(urgency(ticket.priority, ticket.deadline), time.monotonic(), self._engines()) if len(self._links) > 1 else None
        engine = outlook.engine if outlook is not None else next(iter(self._links))
        ask = wire_format.ALONE if ticket.crashes else wire_format.AGAIN if job.admitted else wire_format.ASK
        self.slots.submit(ticket, engine)
        return self._links[engine], ticket, ask

    def _end(self, job: _Job, outcome: Outcome) -> None:
        """Frees a slot that the front holds, and answers."""
        self.slots.release(job.ticket)
        self._close(job, outcome)

    def _close(self, job: _Job, outcome: Outcome) -> None:
        del self._jobs[job.ticket.sequence]
        self.loop.call_soon_threadsafe(self._settle, job, outcome)

    # -- on the event loop

    def _take_answer(self, answer: wire_format.Answer) -> None:
        with self._lock:
            logits = self.ring.logits[answer.slot].copy()
            ticket = self.slots.answered(answer.slot, answer.sequence)
            if ticket is None:
                log.error("an answer for slot %d names image %d, which is not there; it is dropped", answer.slot, answer.sequence)
                return
            job = self._jobs.pop(ticket.sequence)
        self._settle(job, self._outcome(job, answer, logits))

    def _outcome(self, job: _Job, answer: wire_format.Answer, logits: Floats) -> Outcome:
        if answer.outcome == wire_format.DONE:
            queued = max(0.0, answer.started - job.received - job.decode_seconds)
            self._return_seconds += _NEWEST * (time.monotonic() - answer.started - answer.seconds - self._return_seconds)
            return Answer(softmax(logits), job.decode_seconds, queued, answer.seconds)
        if answer.outcome == wire_format.SHED_DEADLINE:
            return self._refuse(Shed("deadline", answer.retry_after_seconds))
        if answer.outcome == wire_format.SHED_FULL:
            return self._refuse(Shed("full", answer.retry_after_seconds))
        if answer.outcome == wire_format.FAILED:
            return errors.EngineFailed("the engine failed while it ran this image")
        return errors.DeadlineExceeded("the deadline passed while the image waited")

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
        """The caller waits no more. Nothing to do where it was answered."""
        with self._lock:
            if job.ticket.sequence not in self._jobs:
                return
            job.left = True
            link = self._links[job.ticket.engine] if job.ticket.engine is not None else None
            if link is None and job.decoded:
                self._end(job, errors.DeadlineExceeded("nobody waits for it"))
        if link is not None:
            self._send(link, job.ticket, wire_format.WITHDRAW)
