"""Results of images that are sent again, and images that are sent while the same image is in flight."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from vitserve.service import errors
from vitserve.service.http_worker.dispatch.decoding import PixelImage
from vitserve.service.http_worker.dispatch.dispatcher import Dispatcher
from vitserve.service.http_worker.dispatch.image_job import ImageJob, ImageResult, Outcome
from vitserve.service.ipc.slots import Ticket

LARGEST_BYTES = 2**20  # of an image: the digest is computed on the event loop, and decoding a larger image takes long
_ENTRY_BYTES = 1024  # of an entry, beside its arrays

Key = tuple[bytes, bool]  # the digest of the encoded image, and whether the result has the embedding


@dataclass(slots=True, eq=False)
class Waiting:
    """A client that waits for the result of an image, which other clients may wait for too."""

    image: bytes
    deadline: float  # monotonic seconds
    priority: int
    on_done: Callable[[Outcome], None]
    admitted: bool
    key: Key
    run: _Run | None = None  # None: the outcome has been delivered
    ticket: Ticket | None = None  # of the image that was run, once the outcome has been delivered


@dataclass(slots=True, eq=False)
class _Run:
    """An image in flight, with the deadline and priority of the first client that sent it."""

    deadline: float
    priority: int
    admitted: bool
    waiting: deque[Waiting] = field(default_factory=deque)  # all clients, the first one too
    job: ImageJob | None = None  # None: not submitted yet, or finished

    def suits(self, waiting: Waiting) -> bool:
        """Whether it ends in time for another client, and is not rejected where that client's image would not be."""
        in_time = self.deadline <= waiting.deadline and self.priority >= waiting.priority
        return in_time and self.admitted >= waiting.admitted


class _Entry(NamedTuple):
    result: ImageResult
    size: int  # bytes


class ResultCache:
    """Submits images to a dispatcher, unless their result is known or in flight. It ends with the dispatcher's model.

    All methods run on the event loop.
    """

    def __init__(self, dispatcher: Dispatcher, capacity: int) -> None:
        """``capacity`` in bytes."""
        self._dispatcher, self._capacity = dispatcher, capacity
        self._metrics = dispatcher.metrics
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # the most recently used last
        self._size = 0  # bytes
        self._runs: dict[Key, _Run] = {}

    def submit(
        self,
        image: bytes | PixelImage,
        deadline: float,
        priority: int,
        on_done: Callable[[Outcome], None],
        admitted: bool = False,
        embedding: bool = False,
    ) -> Waiting | ImageJob:
        """As Dispatcher.submit()."""
        if isinstance(image, PixelImage) or len(image) > LARGEST_BYTES:
            return self._dispatcher.submit(image, deadline, priority, on_done, admitted, embedding)
        waiting = Waiting(image, deadline, priority, on_done, admitted, (hashlib.sha256(image).digest(), embedding))
        entry = self._entries.get(waiting.key)
        if entry is None:
            joined = self._join_or_run(waiting)
            self._metrics.inc(self._metrics.all.cache_shared if joined else self._metrics.all.cache_misses)
        else:
            self._metrics.inc(self._metrics.all.cache_hits)
            self._entries.move_to_end(waiting.key)
            on_done(_without_times(entry.result))
        return waiting

    def abandon(self, waiting: Waiting | ImageJob) -> None:
        """The client no longer waits. Withdraws the image if no other client waits for it."""
        if isinstance(waiting, ImageJob):
            self._dispatcher.abandon(waiting)
            return
        run, waiting.run = waiting.run, None
        if run is None:
            return
        run.waiting.remove(waiting)
        job = run.job
        if job is not None and not run.waiting:
            self._forget(waiting.key, run)
            self._dispatcher.abandon(job)

    def _join_or_run(self, waiting: Waiting) -> bool:
        """Whether the image is in flight for another client already."""
        run = self._runs.get(waiting.key)
        if run is not None and run.suits(waiting):
            waiting.run = run
            run.waiting.append(waiting)
            return True
        run = waiting.run = self._runs[waiting.key] = _Run(waiting.deadline, waiting.priority, waiting.admitted)
        run.waiting.append(waiting)
        options = waiting.priority, partial(self._done, waiting.key, run), waiting.admitted, waiting.key[1]
        job = self._dispatcher.submit(waiting.image, waiting.deadline, *options)
        if run.waiting:  # else it was rejected at once
            run.job = job
        return False

    def _done(self, key: Key, run: _Run, outcome: Outcome) -> None:
        ticket = None if run.job is None else run.job.ticket
        self._forget(key, run)
        if isinstance(outcome, ImageResult):
            self._store(key, outcome)
        late = isinstance(outcome, errors.OverloadedError | errors.DeadlineExceededError)
        result = outcome
        while run.waiting:
            waiting = run.waiting.popleft()
            waiting.run = None
            if late and waiting.deadline > run.deadline:
                self._join_or_run(waiting)
                continue
            waiting.ticket = ticket
            waiting.on_done(result)
            if isinstance(outcome, ImageResult):
                result = _without_times(outcome)

    def _forget(self, key: Key, run: _Run) -> None:
        run.job = None  # it refers to the run: the cycle would keep the image until it is collected
        if self._runs.get(key) is run:
            del self._runs[key]

    def _store(self, key: Key, result: ImageResult) -> None:
        arrays = result.probabilities, result.logits, result.embedding
        size = _ENTRY_BYTES + sum(array.nbytes for array in arrays if array is not None)
        previous = self._entries.pop(key, None)
        self._size += size - (0 if previous is None else previous.size)
        self._entries[key] = _Entry(result, size)
        while self._size > self._capacity:
            _, evicted = self._entries.popitem(last=False)
            self._size -= evicted.size


def _without_times(result: ImageResult) -> ImageResult:
    """For a client whose image did not pass these stages."""
    return result._replace(decode_seconds=0.0, queue_seconds=0.0, inference_seconds=0.0, moments=None)
