"""Deadlines of images that pass without a message from an engine worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from vitserve.service.http_worker.dispatch.image_job import ImageJob
from vitserve.service.ipc.shared_memory import SlotTable

# A timer for each image would cost as much as admission, and almost all images finish before their deadline.
_SECONDS = 0.05  # between two looks at the deadlines


class Expiry:
    """Ends jobs whose deadline has passed, for example because the engine hangs. All methods run on the event loop.

    An image that is running at its deadline still gets its result: an engine worker expires the images that wait, so
    this class waits for two more batches. An image that waits for a slot ends at its deadline.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, slot_table: SlotTable, abandon: Callable[[ImageJob], None]
    ) -> None:
        self._loop, self._slot_table, self._abandon = loop, slot_table, abandon
        self._jobs: dict[ImageJob, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, job: ImageJob) -> None:
        self._jobs[job] = None
        if self._timer is None:
            self._timer = self._loop.call_later(_SECONDS, self._check)

    def remove(self, job: ImageJob) -> None:
        self._jobs.pop(job, None)

    def _check(self) -> None:
        now = time.monotonic()
        patience = 2 * self._slot_table.batch_seconds()
        for job in list(self._jobs):
            if now > job.deadline + (0 if job.ticket is None else patience):
                self.remove(job)
                job.deliver(job.expired_error())
                self._abandon(job)
        self._timer = self._loop.call_later(_SECONDS, self._check) if self._jobs else None
