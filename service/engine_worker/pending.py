"""The images that an engine worker has received and not yet completed. No I/O and no threads.

Translates between the messages of wire_format.py and the scheduler, which is independent of HTTP workers and slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from vitserve.service.ipc import wire_format
from vitserve.service.ipc.memory_layout import RUNNING
from vitserve.service.ipc.shared_memory import SlotTable
from vitserve.service.scheduler import Batch, Request, Scheduler

_REJECTED = {"deadline": wire_format.REJECTED_DEADLINE, "full": wire_format.REJECTED_FULL}


class PendingImage(NamedTuple):
    worker: int
    slot: int
    request: Request
    embedding: bool = False  # needed too

    def completion(
        self, outcome: int, started: float = 0.0, seconds: float = 0.0, retry_after_seconds: float = 0.0
    ) -> wire_format.Completion:
        return wire_format.Completion(self.slot, outcome, self.request.id, started, seconds, retry_after_seconds)


Completions = list[tuple[int, wire_format.Completion]]  # each with the index of the HTTP worker it is for


@dataclass
class PendingRequests:
    slot_table: SlotTable
    engine: int
    scheduler: Scheduler
    stale: int = field(default=0, init=False)  # submissions dropped because their slot has another image by now
    _images: dict[int, PendingImage] = field(default_factory=dict, init=False)  # by sequence number

    def submit(self, submissions: Iterable[tuple[int, wire_format.Submission]], now: float) -> Completions:
        """Queues the HTTP workers' submissions. Returns those completed at once (rejected or withdrawn).

        Simultaneous submissions are processed by priority and deadline, so that the outcome does not depend on which
        socket was read first.
        """
        completions: Completions = []
        self.scheduler.count_arrivals(self._arrivals, now)
        for worker, submission in sorted(
            submissions, key=lambda pair: (-pair[1].priority, pair[1].deadline, pair[1].sequence)
        ):
            if submission.action == wire_format.WITHDRAW:
                completion = self._withdraw(submission)
            else:
                completion = self._queue(worker, submission, now)
            if completion is not None:
                completions.append((worker, completion))
        return completions

    def _arrivals(self) -> list[float]:
        """This engine worker's part of all images, by priority level."""
        return [count / self.slot_table.shape.engines for count in self.slot_table.arrivals()]

    def next_batch(self, stream: int, now: float) -> tuple[Batch, list[int]] | None:
        """The batch that the free stream runs now, with the slots of its images. None if no image is waiting."""
        batch = self.scheduler.next_batch(stream, now)
        if batch is None:
            return None
        slots = [self._images[request.id].slot for request in batch.requests]
        # If an HTTP worker has exited and this process has not noticed yet, its slots may have other images.
        unchanged = [
            slot
            for slot, request in zip(slots, batch.requests, strict=True)
            if self.slot_table.sequences[slot] == request.id
        ]
        for slot in unchanged:
            self.slot_table.sort_keys[slot] = math.inf  # no longer ahead of any waiting image
            self.slot_table.states[slot] = RUNNING  # if this process crashes now, the image was part of the crash
        return batch, slots

    def wanted(self, batch: Batch) -> list[tuple[int, PendingImage]]:
        """The images of the batch that still have their slot, each with its row in the batch.

        The slots of an HTTP worker that has exited may have other images by now.
        """
        images = [
            (row, self._images[request.id]) for row, request in enumerate(batch.requests) if request.id in self._images
        ]
        return [(row, image) for row, image in images if self.slot_table.sequences[image.slot] == image.request.id]

    def complete(self, batch: Batch, now: float, failed: bool) -> Completions:
        """The completions of a batch, without images whose HTTP worker has exited. Does not update the scheduler."""
        images = [self._images.pop(request.id, None) for request in batch.requests]
        outcome = wire_format.FAILED if failed else wire_format.DONE
        return [
            (image.worker, image.completion(outcome, batch.started, now - batch.started))
            for image in images
            if image is not None
        ]

    def expire(self, now: float) -> Completions:
        """Completes the images whose deadline passed while they waited."""
        images = [self._images.pop(request.id) for request in self.scheduler.expire(now)]
        return [(image.worker, image.completion(wire_format.EXPIRED)) for image in images]

    def worker_lost(self, worker: int) -> None:
        """Drops the images of an HTTP worker that has exited."""
        for image in [image for image in self._images.values() if image.worker == worker]:
            self.scheduler.withdraw(image.request)
            del self._images[image.request.id]

    def __len__(self) -> int:
        """Images that are waiting or running and whose HTTP worker is connected."""
        return len(self._images)

    def _queue(self, worker: int, submission: wire_format.Submission, now: float) -> wire_format.Completion | None:
        slot, sequence = submission.slot, submission.sequence
        if not 0 <= slot < self.slot_table.shape.slots or self.slot_table.sequences[slot] != sequence:
            self.stale += 1
            return None
        alone = submission.action == wire_format.RETRY_ALONE
        retried = submission.action != wire_format.SUBMIT
        request = Request(9 - submission.priority, submission.deadline, sequence, alone, retried)
        image = PendingImage(worker, slot, request, submission.embedding)
        if retried:
            self.scheduler.restore(request)
        # The HTTP worker used a conservative estimate before it decoded the image. Now only a late image is rejected.
        elif (rejection := self.scheduler.admit(request, now, conservative=False)) is not None:
            return image.completion(_REJECTED[rejection.reason], retry_after_seconds=rejection.retry_after_seconds)
        self._images[sequence] = image
        return None

    def _withdraw(self, submission: wire_format.Submission) -> wire_format.Completion | None:
        """None if the image is running (its completion will free the slot) or has been completed already."""
        image = self._images.get(submission.sequence)
        if image is None or not self.scheduler.withdraw(image.request):
            return None
        del self._images[submission.sequence]
        return image.completion(wire_format.WITHDRAWN)
