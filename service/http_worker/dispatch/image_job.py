"""One image on its way through an HTTP worker: its job, its outcome, and the time that delivering the outcome takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from vitserve.model.arrays import Floats, to_probabilities
from vitserve.service import errors
from vitserve.service.http_worker.dispatch.decoding import OpenedImage
from vitserve.service.ipc import wire_format
from vitserve.service.ipc.model_info import ModelInfo
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.ipc.slots import MAX_CRASHES, Ticket
from vitserve.service.scheduler import Rejection, RejectionReason

log = logging.getLogger(__name__)

# Time kept free before a deadline for delivering the result, as a multiple of the average delivery time ...
_DELIVERY_FACTOR = 2.0
# ... but at most this share of the client's timeout. A worker that stalled once would otherwise reject every image and
# never measure a better value.
_MAX_DELIVERY_SHARE = 0.25
_NEWEST_WEIGHT = 0.1  # of the newest measurement in the average delivery time

_REJECTION_DETAIL: dict[RejectionReason, str] = {
    "full": "all slots are in use",
    "deadline": "the deadline cannot be met, because images admitted earlier have to finish first",
}


class ModelReplacedError(Exception):
    """The model was replaced and its engine workers have exited. Submit the admitted image to the new model."""


class Moments(NamedTuple):
    """When stages of an image began, in monotonic seconds."""

    received: float
    decode_began: float
    inference_began: float


class ImageResult(NamedTuple):
    probabilities: Floats  # [classes]
    logits: Floats  # [classes]
    embedding: Floats | None  # [width]; None unless the job has the flag
    decode_seconds: float
    queue_seconds: float
    inference_seconds: float
    moments: Moments | None = None  # None if the image did not pass the stages


Outcome = ImageResult | errors.ServiceError | ModelReplacedError


@dataclass(slots=True, eq=False)
class ImageJob:
    encoded: bytes  # empty for pixels, which need no decoding
    deadline: float  # of the response, monotonic seconds
    priority: int
    admitted: bool  # by an engine worker earlier, so it is not rejected again
    on_done: Callable[[Outcome], None]  # called once, on the event loop, unless the image is abandoned
    received: float = 0.0  # monotonic seconds
    embedding: bool = False  # whether the result needs the embedding
    image: OpenedImage | errors.ServiceError | None = None  # None: not opened yet
    ticket: Ticket | None = None  # None while it waits for a slot
    waits_as_large: bool = False  # for its turn in a decode process
    decoded: bool = False
    decode_began: float = 0.0  # monotonic seconds
    decode_seconds: float = 0.0
    abandoned: bool = False  # the client disconnected or its deadline passed

    def expired_error(self) -> errors.ServiceError:
        """Why there is no result at the deadline."""
        if self.ticket is None:
            return errors.DeadlineExceededError("the deadline passed before a slot was free")
        if self.waits_as_large:
            return too_many_large_images(1.0)
        return errors.DeadlineExceededError("the deadline passed before the result was available")

    def deliver(self, outcome: Outcome) -> None:
        """On the event loop. Does nothing if the client no longer waits."""
        if not self.abandoned:
            self.on_done(outcome)

    @property
    def slot(self) -> Ticket:
        """The ticket of an image that has a slot."""
        assert self.ticket is not None
        return self.ticket

    @property
    def action(self) -> int:
        """Of its submission to an engine worker."""
        if not self.admitted:
            return wire_format.SUBMIT
        return wire_format.RETRY_ALONE if self.slot.crashes else wire_format.RETRY

    def outcome(self, completion: wire_format.Completion, table: SlotTable, model_info: ModelInfo) -> Outcome:
        """Copies the results from the slot, which no other image can have yet: the dispatcher's lock is held."""
        if completion.outcome == wire_format.DONE:
            logits = table.logits[completion.slot].copy()
            embedding = table.embeddings[completion.slot].copy() if self.embedding else None
            queue_seconds = max(0.0, completion.started - self.received - self.decode_seconds)
            times = self.decode_seconds, queue_seconds, completion.seconds
            moments = Moments(self.received, self.decode_began or self.received, completion.started)
            probabilities = to_probabilities(logits, model_info.activation, model_info.temperature)
            return ImageResult(probabilities, logits, embedding, *times, moments)
        if completion.outcome == wire_format.REJECTED_DEADLINE:
            return overloaded(Rejection("deadline", completion.retry_after_seconds))
        if completion.outcome == wire_format.REJECTED_FULL:
            return overloaded(Rejection("full", completion.retry_after_seconds))
        if completion.outcome == wire_format.FAILED:
            return errors.EngineFailedError("the engine failed while running this image")
        return errors.DeadlineExceededError("the deadline passed while the image was queued")

    def late_error(self, now: float) -> errors.DeadlineExceededError | None:
        """Why the image is not decoded any more. None if it is."""
        if self.abandoned or self.slot.deadline <= now:
            return errors.DeadlineExceededError("the deadline passed before the image could be decoded")
        return None

    def retry_error(self) -> errors.EngineFailedError | None:
        """Why the image is not retried after its engine worker has exited. None if it is retried."""
        crashes = self.slot.crashes
        if crashes >= MAX_CRASHES:
            log.error("image %d was running in %d engine crashes; not retrying it", self.slot.sequence, crashes)
            return errors.EngineFailedError(f"{crashes} engine workers crashed while running this image")
        return errors.EngineFailedError("client disconnected") if self.abandoned else None


@dataclass
class DeliveryTime:
    """Running average of the time from the end of a batch until this HTTP worker handles its results."""

    seconds: float = 0.0

    def record(self, completion: wire_format.Completion) -> None:
        newest = time.monotonic() - completion.started - completion.seconds
        self.seconds += _NEWEST_WEIGHT * (newest - self.seconds)

    def engine_deadline(self, deadline: float, now: float) -> float:
        """When the engine worker must finish so that the result is delivered by the deadline."""
        timeout_seconds = max(0.0, deadline - now)
        return deadline - min(_DELIVERY_FACTOR * self.seconds, _MAX_DELIVERY_SHARE * timeout_seconds)


def overloaded(rejection: Rejection) -> errors.OverloadedError:
    return errors.OverloadedError(_REJECTION_DETAIL[rejection.reason], rejection.reason, rejection.retry_after_seconds)


def too_many_large_images(retry_after_seconds: float) -> errors.OverloadedError:
    """A large image may be rejected until it is decoded: only then are its time and the memory for it certain."""
    detail = "the deadline cannot be met, because decoding this large image and those that arrived earlier takes longer"
    return errors.OverloadedError(detail, "large", retry_after_seconds)
