"""Starts, monitors and restarts the HTTP workers, loads and reloads the model, drains.

One coroutine runs each child: it starts the process, handles its messages until it exits, and starts it again. The
supervisor handles no request and imports no large library, so that it starts at once and does not crash with them.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket

from vitserve.service.ipc.control_messages import Message, Reload, Reloaded, StartHttpWorker
from vitserve.service.settings import Settings
from vitserve.service.supervisor.child_process import ChildProcess
from vitserve.service.supervisor.children import Children, SupervisorGaveUpError
from vitserve.service.supervisor.engine_starter import EngineStarter, StartFailedError
from vitserve.service.supervisor.generation import Generation
from vitserve.service.supervisor.http_workers import HttpWorkers
from vitserve.service.supervisor.probe import Probe

log = logging.getLogger("vitserve.supervisor")

ENGINE_EXIT_SECONDS = 5.0  # for the engine workers to exit at the end of a drain, once no HTTP worker is connected


class Supervisor:
    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        light_workers: int,
        admin_listener: socket.socket | None = None,
        probe_listener: socket.socket | None = None,
    ) -> None:
        """``light_workers``: number of HTTP workers if the network is light. Else it is settings.workers."""
        self._admin_listener, self._probe_listener = admin_listener, probe_listener  # of admin_port and probe_port
        self._settings, self._listener = settings, listener
        self._stopping = asyncio.Event()
        self._children = Children(settings.hang_seconds, self._stopping)
        self._workers = HttpWorkers()
        self._starter = EngineStarter(settings, self._children, self._workers, light_workers)
        self._serving: Generation | None = None
        self._retired: Generation | None = None  # the one before; some of its engine workers may still be running
        self._generation_count = 0
        self._reload_wanted = asyncio.Event()
        self._reload_requests: list[tuple[ChildProcess, int]] = []  # HTTP workers that wait for a result; request id
        self._worker_tasks: set[asyncio.Task[None]] = set()
        self._forced = False

    async def run(self) -> int:
        """Returns the exit status: 0 if every admitted request was answered. Raises SupervisorGaveUpError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload_wanted.set)
        try:
            async with asyncio.TaskGroup() as group:
                loader = group.create_task(self._run_model_loader(group))
                self._run_workers(group, self._settings.workers)
                probe = None
                if self._probe_listener is not None:
                    probe = group.create_task(Probe().run(self._probe_listener))
                while self._worker_tasks:
                    await asyncio.wait(self._worker_tasks)
                loader.cancel()
                await self._stop_engines()
                if probe is not None:
                    probe.cancel()
        except* SupervisorGaveUpError as errors:
            raise SupervisorGaveUpError(str(errors.exceptions[0])) from None
        finally:
            await self._children.reap_all()
        return int(self._forced)

    @property
    def _generations(self) -> list[Generation]:
        return [generation for generation in (self._serving, self._retired) if generation is not None]

    # -- HTTP workers

    def _run_workers(self, group: asyncio.TaskGroup, count: int) -> None:
        """Starts HTTP workers until there are ``count``."""
        for index in range(len(self._worker_tasks), count):
            task = group.create_task(self._run_worker(index))
            self._worker_tasks.add(task)
            task.add_done_callback(self._worker_tasks.discard)

    async def _run_worker(self, index: int) -> None:
        attempts = 0
        while not self._stopping.is_set():
            worker = self._start_worker(index)
            started = await self._children.monitor(worker, self._handle_worker)
            self._workers.remove(index)
            for generation in self._generations:
                generation.clear_worker_slots(index)
            status = await self._children.reap(worker)
            if self._stopping.is_set():
                return
            attempts = 0 if started else attempts + 1
            if started:
                log.error("%s exited (%s); restarting", worker.name, status)
            await self._children.back_off(attempts, f"{worker.name} exited ({status})")
            self._workers.count_restart("http_worker", worker)

    def _start_worker(self, index: int) -> ChildProcess:
        start = StartHttpWorker(
            process=f"http-worker-{index}",
            incarnation=self._children.next_incarnation(),
            settings=self._settings,
            worker=index,
            decode_threads=self._settings.decode_threads,
        )
        listeners = [self._listener, *([] if self._admin_listener is None else [self._admin_listener])]
        descriptors = [listener.fileno() for listener in listeners]
        worker = self._children.start("vitserve.service.http_worker.main", start, descriptors)
        self._workers.add(index, worker)
        if self._serving is not None:
            self._serving.connect_worker(index)
        return worker

    def _handle_worker(self, worker: ChildProcess, message: Message) -> None:
        if isinstance(message, Reload):
            self._reload_requests.append((worker, message.id))
            self._reload_wanted.set()

    # -- the model

    async def _run_model_loader(self, group: asyncio.TaskGroup) -> None:
        """Loads the bundle at start and at every reload, one at a time. The current model continues to serve."""
        attempts, is_reload = 0, False
        while True:
            self._reload_wanted.clear()
            requests, self._reload_requests = self._reload_requests, []
            failure = await self._try_to_load(group)
            result = "ok" if failure is None else failure.result
            if is_reload:
                self._workers.count_reload(result)
            self._workers.send_status()
            for worker, request in requests:
                worker.send(Reloaded(request, result, str(failure or "")[:10_000]))
            if failure is not None and failure.result == "exited" and self._serving is None:
                attempts = 0 if failure.next_differs else attempts + 1
                await self._children.back_off(attempts, str(failure))
                continue
            attempts = 0
            await self._reload_wanted.wait()
            is_reload = True
            self._starter.retry_skipped()

    async def _try_to_load(self, group: asyncio.TaskGroup) -> StartFailedError | None:
        try:
            await self._load(group)
        except StartFailedError as failure:
            served = self._serving is not None and bool(self._serving.engines)
            self._workers.report_rejection(failure.result, str(failure), model_is_served=served)
            return failure
        self._workers.failure = None
        return None

    async def _load(self, group: asyncio.TaskGroup) -> None:
        """Loads the bundle in a new engine worker and, once it is verified, switches the HTTP workers to it."""
        if self._retired is not None and self._retired.tasks:
            await asyncio.wait(self._retired.tasks)  # at most drain_seconds: see retire()
        self._generation_count += 1
        generation = Generation(self._generation_count, self._starter, self._reload_wanted, group)
        first = await generation.open()
        previous, self._serving = self._serving, generation
        generation.serve(first, self._settings.engines)
        if not self._stopping.is_set():
            self._run_workers(group, self._starter.slot_table_workers)
        if previous is not None:
            self._retired = previous
            previous.retire(kill_after_seconds=self._settings.drain_seconds)

    # -- the end

    def _stop(self) -> None:
        """Drains after the first signal, exits at once after the second or after drain_seconds."""
        if self._stopping.is_set():
            self._force("second signal")
            return
        log.info("draining")
        self._stopping.set()
        self._workers.drain()
        for listener in (self._listener, self._admin_listener):
            if listener is not None:
                listener.close()  # else clients could connect after the HTTP workers have closed theirs
        seconds = self._settings.drain_seconds
        asyncio.get_running_loop().call_later(seconds, self._force, f"drain_seconds={seconds:g} exceeded")

    def _force(self, reason: str) -> None:
        log.error("forced shutdown (%s): requests in flight are dropped", reason)
        self._forced = True
        self._children.kill_all()

    async def _stop_engines(self) -> None:
        for generation in self._generations:
            generation.retire()
        tasks = {task for generation in self._generations for task in generation.tasks}
        if tasks:
            await asyncio.wait(tasks, timeout=ENGINE_EXIT_SECONDS)
        self._children.kill_all()
