"""Starts engine workers, and skips an engine whose library crashes every process that loads it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field

from vitserve.service import machine
from vitserve.service.ipc.control_messages import Opened, Progress, Rejected, StartEngineWorker
from vitserve.service.settings import Settings
from vitserve.service.supervisor.child_process import ChildProcess
from vitserve.service.supervisor.children import START_SECONDS, Children
from vitserve.service.supervisor.http_workers import HttpWorkers

log = logging.getLogger("vitserve.supervisor")

CRASHES = 2  # of processes that loaded the same engine in the same precision; then it is skipped until a reload


class StartFailedError(Exception):
    """An engine worker rejected the bundle or crashed.

    ``result`` is the label of vitserve_reloads_total: "exited" for a crash, else as in the message Rejected.
    ``next_differs`` says that the next start skips the engine that crashed, so it may well succeed.
    """

    def __init__(self, result: str, reason: str, next_differs: bool = False) -> None:
        super().__init__(reason)
        self.result, self.next_differs = result, next_differs


@dataclass
class EngineStarter:
    settings: Settings
    children: Children
    workers: HttpWorkers
    light_workers: int
    slot_table_workers: int = 0  # HTTP workers in the latest slot table; 0 before the first one
    _crashes: Counter[str] = field(default_factory=Counter)  # by engine and precision

    async def start(self, generation: int, index: int, slot_table: int | None) -> tuple[ChildProcess, int | None]:
        """Returns an engine worker that is warmed up and verified, and the descriptor of the generation's slot table.

        The first engine worker of a generation creates the slot table, because only it knows the image size and the
        number of classes. Raises StartFailedError.
        """
        child = self._launch(generation, index, slot_table)
        trying: str | None = None
        try:
            while True:
                async with asyncio.timeout(START_SECONDS):
                    received = await child.receive()
                if received is None:
                    status = await self.children.reap(child)
                    raise self._crash(f"{child.name} exited ({status}) while loading the bundle", trying)
                message, descriptors = received
                match message:
                    case Progress():
                        trying = message.trying
                        self.workers.report_progress(message.step)
                    case Rejected():
                        await self.children.reap(child)
                        raise StartFailedError(message.result, message.reason)
                    case Opened():
                        self._crashes.pop(str(trying), None)
                        self.slot_table_workers = message.workers
                        return child, descriptors[0] if descriptors else slot_table
        except TimeoutError:
            child.kill()
            await self.children.reap(child)
            raise self._crash(f"{child.name} did not load the bundle within {START_SECONDS:.0f} s", trying) from None
        finally:
            self.workers.report_progress(None)

    def retry_skipped(self) -> None:
        """A reload tries every engine again."""
        self._crashes.clear()

    def _launch(self, generation: int, index: int, slot_table: int | None) -> ChildProcess:
        # At most two generations exist at a time, and their numbers differ by one: no two processes have the same name.
        start = StartEngineWorker(
            process=f"engine-worker-{index}-{'ab'[generation % 2]}",
            incarnation=self.children.next_incarnation(),
            settings=self.settings,
            engine=index,
            workers=self.slot_table_workers or self.settings.workers,
            light_workers=self.slot_table_workers or self.light_workers,
            engines=self.settings.engines,
            skipped=[engine for engine, crashes in self._crashes.items() if crashes >= CRASHES],
        )
        gpus = machine.gpus()
        environment = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
        descriptors = [] if slot_table is None else [slot_table]
        return self.children.start("vitserve.service.engine_worker.main", start, descriptors, environment)

    def _crash(self, reason: str, trying: str | None) -> StartFailedError:
        if trying is None:
            return StartFailedError("exited", reason)
        self._crashes[trying] += 1
        skipped = self._crashes[trying] == CRASHES
        if skipped:
            log.error("disabling %s until the next reload: %d processes crashed while loading it", trying, CRASHES)
        return StartFailedError("exited", f"{reason} with {trying}", skipped)
