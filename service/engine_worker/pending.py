"""What an engine process knows of the images it was sent: whose they are, who of them waits or runs. No I/O, no thread.

Between wire_format.py's messages and the scheduler, which knows neither fronts nor slots. Imported by engine_process.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from vitserve.service.ipc import wire_format
from vitserve.service.ipc.memory_layout import RUNNING
from vitserve.service.ipc.shared_memory import Ring
from vitserve.service.scheduler import Batch, Request, Scheduler

_SHED = {"deadline": wire_format.SHED_DEADLINE, "full": wire_format.SHED_FULL}


class Image(NamedTuple):
    front: int
    slot: int
    request: Request

    def answer(self, outcome: int, started: float = 0.0, seconds: float = 0.0, retry_after_seconds: float = 0.0) -> wire_format.Answer:
        return wire_format.Answer(self.slot, outcome, self.request.id, started, seconds, retry_after_seconds)


Answers = list[tuple[int, wire_format.Answer]]  # each with the front that it is for


@dataclass
class Intake:
    ring: Ring
    engine: int
    scheduler: Scheduler
    stale: int = field(default=0, init=False)  # submissions that were dropped because their slot holds another image by now
    _images: dict[int, Image] = field(default_factory=dict, init=False)  # by sequence number: waiting or running

    def submit(self, submissions: Iterable[tuple[int, wire_format.Submission]], now: float) -> Answers:
        """Takes in what has arrived from the fronts, and returns what can be answered at once.

        What came at one time is taken in order of urgency, so that the outcome does not depend on which socket was read first.
        """
        answers: Answers = []
        for front, each in sorted(submissions, key=lambda pair: (-pair[1].priority, pair[1].deadline, pair[1].sequence)):
            answer = self._withdraw(each) if each.ask == wire_format.WITHDRAW else self._enter(front, each, now)
            if answer is not None:
                answers.append((front, answer))
        return answers

    def next_batch(self, lane: int, now: float) -> tuple[Batch, list[int]] | None:
        """The batch that the free lane shall run now, with the slots of its images."""
        batch = self.scheduler.next_batch(lane, now)
        if batch is None:
            return None
        slots = [self._images[request.id].slot for request in batch.requests]
        # A front may have died, of which this process has not heard yet: its slots are its successor's.
        ours = [slot for slot, request in zip(slots, batch.requests, strict=True) if self.ring.sequences[slot] == request.id]
        for slot in ours:
            self.ring.urgencies[slot] = math.inf  # not before anybody any more
            self.ring.states[slot] = RUNNING  # if this process dies now, the front will know whom it was running
        return batch, slots

    def wanted(self, batch: Batch) -> list[tuple[int, Image]]:
        """Those of the batch, each with its row, whose front still lives. The others' slots may hold other images by now."""
        known = [(row, self._images[request.id]) for row, request in enumerate(batch.requests) if request.id in self._images]
        return [(row, image) for row, image in known if self.ring.sequences[image.slot] == image.request.id]

    def close(self, batch: Batch, now: float, failed: bool) -> Answers:
        """The answers of a batch that has been run; whose front has died has none. The scheduler is to be told by the caller."""
        wanted = [self._images.pop(request.id, None) for request in batch.requests]
        outcome = wire_format.FAILED if failed else wire_format.DONE
        return [(image.front, image.answer(outcome, batch.started, now - batch.started)) for image in wanted if image is not None]

    def expire(self, now: float) -> Answers:
        """Answers those whose deadline passed while they waited."""
        late = [self._images.pop(request.id) for request in self.scheduler.expire(now)]
        return [(image.front, image.answer(wire_format.EXPIRED)) for image in late]

    def front_lost(self, front: int) -> None:
        """A front has died, and with it everybody who could have received its answers."""
        for image in [each for each in self._images.values() if each.front == front]:
            self.scheduler.withdraw(image.request)
            del self._images[image.request.id]

    @property
    def held(self) -> int:
        """Images that wait or run, and whose front still lives."""
        return len(self._images)

    def _enter(self, front: int, each: wire_format.Submission, now: float) -> wire_format.Answer | None:
        if not 0 <= each.slot < self.ring.shape.slots or self.ring.sequences[each.slot] != each.sequence:
            self.stale += 1
            return None
        image = Image(front, each.slot, Request(9 - each.priority, each.deadline, each.sequence, each.ask == wire_format.ALONE, each.ask != wire_format.ASK))
        if each.ask == wire_format.ASK:
            shed = self.scheduler.admit(image.request, now)
            if shed is not None:
                return image.answer(_SHED[shed.reason], retry_after_seconds=shed.retry_after_seconds)
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
