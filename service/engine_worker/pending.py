"""What an engine worker knows of the images it was sent: whose they are, who of them waits or runs. No I/O, no thread.

Between wire_format.py's messages and the scheduler, which knows neither HTTP workers nor slots.
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


class Image(NamedTuple):
    worker: int
    slot: int
    request: Request

    def answer(
        self, outcome: int, started: float = 0.0, seconds: float = 0.0, retry_after_seconds: float = 0.0
    ) -> wire_format.Answer:
        return wire_format.Answer(self.slot, outcome, self.request.id, started, seconds, retry_after_seconds)


Answers = list[tuple[int, wire_format.Answer]]  # each with the HTTP worker that it is for


@dataclass
class PendingRequests:
    slot_table: SlotTable
    engine: int
    scheduler: Scheduler
    stale: int = field(
        default=0, init=False
    )  # submissions that were dropped because their slot holds another image by now
    _images: dict[int, Image] = field(default_factory=dict, init=False)  # by sequence number: waiting or running

    def submit(self, submissions: Iterable[tuple[int, wire_format.Submission]], now: float) -> Answers:
        """Takes in what has arrived from the HTTP workers, and returns what can be answered at once.

        What came at one time is taken in order of urgency, so that the outcome does not depend on which socket was read first.
        """
        answers: Answers = []
        for worker, each in sorted(
            submissions, key=lambda pair: (-pair[1].priority, pair[1].deadline, pair[1].sequence)
        ):
            answer = self._withdraw(each) if each.ask == wire_format.WITHDRAW else self._enter(worker, each, now)
            if answer is not None:
                answers.append((worker, answer))
        return answers

    def next_batch(self, stream: int, now: float) -> tuple[Batch, list[int]] | None:
        """The batch that the free stream shall run now, with the slots of its images."""
        batch = self.scheduler.next_batch(stream, now)
        if batch is None:
            return None
        slots = [self._images[request.id].slot for request in batch.requests]
        # A HTTP worker may have died, of which this process has not heard yet: its slots are its successor's.
        ours = [
            slot
            for slot, request in zip(slots, batch.requests, strict=True)
            if self.slot_table.sequences[slot] == request.id
        ]
        for slot in ours:
            self.slot_table.sort_keys[slot] = math.inf  # not before anybody any more
            self.slot_table.states[slot] = (
                RUNNING  # if this process dies now, the HTTP worker will know whom it was running
            )
        return batch, slots

    def wanted(self, batch: Batch) -> list[tuple[int, Image]]:
        """Those of the batch, each with its row, whose HTTP worker still lives. The others' slots may hold other images by now."""
        known = [
            (row, self._images[request.id]) for row, request in enumerate(batch.requests) if request.id in self._images
        ]
        return [(row, image) for row, image in known if self.slot_table.sequences[image.slot] == image.request.id]

    def close(self, batch: Batch, now: float, failed: bool) -> Answers:
        """The answers of a batch that has been run; whose HTTP worker has died has none. The scheduler is to be told by the client."""
        wanted = [self._images.pop(request.id, None) for request in batch.requests]
        outcome = wire_format.FAILED if failed else wire_format.DONE
        return [
            (image.worker, image.answer(outcome, batch.started, now - batch.started))
            for image in wanted
            if image is not None
        ]

    def expire(self, now: float) -> Answers:
        """Answers those whose deadline passed while they waited."""
        late = [self._images.pop(request.id) for request in self.scheduler.expire(now)]
        return [(image.worker, image.answer(wire_format.EXPIRED)) for image in late]

    def worker_lost(self, worker: int) -> None:
        """A HTTP worker has died, and with it everybody who could have received its answers."""
        for image in [each for each in self._images.values() if each.worker == worker]:
            self.scheduler.withdraw(image.request)
            del self._images[image.request.id]

    @property
    def held(self) -> int:
        """Images that wait or run, and whose HTTP worker still lives."""
        return len(self._images)

    def _enter(self, worker: int, each: wire_format.Submission, now: float) -> wire_format.Answer | None:
        if not 0 <= each.slot < self.slot_table.shape.slots or self.slot_table.sequences[each.slot] != each.sequence:
            self.stale += 1
            return None
        image = Image(
            worker,
            each.slot,
            Request(
                9 - each.priority,
                each.deadline,
                each.sequence,
                each.ask == wire_format.ALONE,
                each.ask != wire_format.ASK,
            ),
        )
        if each.ask == wire_format.ASK:
            rejection = self.scheduler.admit(image.request, now)
            if rejection is not None:
                return image.answer(_REJECTED[rejection.reason], retry_after_seconds=rejection.retry_after_seconds)
        else:
            self.scheduler.restore(image.request)
        self._images[each.sequence] = image
        return None

    def _withdraw(self, each: wire_format.Submission) -> wire_format.Answer | None:
        """None where it is running (its answer will free the slot) or has been answered already."""
        image = self._images.get(each.sequence)
        if image is None or not self.scheduler.withdraw(image.request):
            return None
        del self._images[each.sequence]
        return image.answer(wire_format.WITHDRAWN)
