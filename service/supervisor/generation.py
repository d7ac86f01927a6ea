"""One loading of the bundle: its slot table and its engine workers."""

from __future__ import annotations

import asyncio
import logging
import os

from vitserve.service.ipc import memory_layout
from vitserve.service.ipc.control_messages import Built, Message, Retire
from vitserve.service.supervisor.child_process import ChildProcess
from vitserve.service.supervisor.engine_starter import EngineStarter, StartFailedError

log = logging.getLogger("vitserve.supervisor")


class Generation:
    """Starts the engine workers and restarts them until it is retired."""

    def __init__(
        self, number: int, starter: EngineStarter, reload_wanted: asyncio.Event, group: asyncio.TaskGroup
    ) -> None:
        self.engines: dict[int, ChildProcess] = {}  # those that are ready
        self.tasks: set[asyncio.Task[None]] = set()  # one for each engine worker; done once its process has exited
        self._number, self._starter, self._reload_wanted, self._group = number, starter, reload_wanted, group
        self._children, self._workers = starter.children, starter.workers
        self._slot_table: int | None = None  # a file descriptor; None until the first engine worker has created it
        self._retired = False

    async def open(self) -> ChildProcess:
        """Starts the first engine worker. Raises StartFailedError if it cannot serve the bundle."""
        return await self._start_engine(0)

    def serve(self, first: ChildProcess, engines: int) -> None:
        """Connects every HTTP worker to the first engine worker, and starts the others in the background."""
        self._connect(0, first)
        for index in range(engines):
            task = self._group.create_task(self._run_engine(index, first if index == 0 else None))
            self.tasks.add(task)
            task.add_done_callback(self._remove_task)

    def connect_worker(self, worker: int) -> None:
        """Connects an HTTP worker that has started to every engine worker that is ready."""
        for index, engine in self.engines.items():
            assert self._slot_table is not None
            self._workers.connect(worker, self._number, self._slot_table, index, engine)

    def clear_worker_slots(self, worker: int) -> None:
        """Frees the slots of an HTTP worker that has exited."""
        if self._slot_table is not None:
            memory_layout.clear_worker_slots(self._slot_table, worker)

    def retire(self, kill_after_seconds: float | None = None) -> None:
        """The engine workers exit once every HTTP worker has disconnected, and are killed if that takes too long."""
        self._retired = True
        for engine in self.engines.values():
            engine.send(Retire())
            if kill_after_seconds is not None:
                asyncio.get_running_loop().call_later(kill_after_seconds, engine.kill)
        self._close_if_finished()

    # -- one engine worker

    async def _run_engine(self, index: int, engine: ChildProcess | None) -> None:
        while True:
            if engine is None:
                engine = await self._restart_engine(index)
                if engine is None:
                    return
                self._connect(index, engine)
            await self._children.monitor(engine, self._handle)
            del self.engines[index]
            status = await self._children.reap(engine)
            if not self._retired:
                log.error("%s exited (%s); restarting", engine.name, status)
                self._workers.count_restart("engine_worker", engine)
            engine = None

    async def _restart_engine(self, index: int) -> ChildProcess | None:
        """None if the generation is retired or its bundle cannot be loaded any more."""
        attempts = 0
        while not self._retired:
            try:
                engine = await self._start_engine(index)
            except StartFailedError as failure:
                if failure.result == "changed":
                    log.warning("%s; loading it as a new model", failure)
                    self._reload_wanted.set()
                    return None
                if failure.result != "exited":  # it would be rejected again; a reload may find it repaired
                    served = self._retired or bool(self.engines)
                    self._workers.report_rejection(failure.result, str(failure), model_is_served=served)
                    return None
                attempts = 0 if failure.next_differs else attempts + 1
                await self._children.back_off(attempts, str(failure), needed=not self.engines)
                continue
            if not self._retired and not self._children.stopping.is_set():
                return engine
            engine.kill()  # HTTP workers must not return to a model that has been replaced
            await self._children.reap(engine)
        return None

    async def _start_engine(self, index: int) -> ChildProcess:
        engine, self._slot_table = await self._starter.start(self._number, index, self._slot_table)
        return engine

    def _connect(self, index: int, engine: ChildProcess) -> None:
        assert self._slot_table is not None
        self.engines[index] = engine
        self._workers.connect_all(self._number, self._slot_table, index, engine)

    def _handle(self, engine: ChildProcess, message: Message) -> None:
        if isinstance(message, Built):
            log.info("%s built a faster engine; reloading the bundle", engine.name)
            self._reload_wanted.set()

    # -- the end

    def _remove_task(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self._close_if_finished()

    def _close_if_finished(self) -> None:
        if self._retired and not self.tasks and self._slot_table is not None:
            os.close(self._slot_table)
            self._slot_table = None
