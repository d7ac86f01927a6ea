"""Starts the HTTP workers and the engines, replaces what dies, reloads, drains. Imports nothing heavy, touches no request.

Each child is looked after by one coroutine: start it, listen to it until it ends, start it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vitserve.service import machine
from vitserve.service.engines.catalog import wants_gpu_workers
from vitserve.service.ipc import memory_layout
from vitserve.service.ipc.control_channel import METRICS_DIR, Message, set_up_logging
from vitserve.service.settings import Settings
from vitserve.service.supervisor.child_process import Child

log = logging.getLogger("vitserve.supervisor")

START_SECONDS = 600.0  # for a child to import, open and verify what it serves
DEATHS = 2  # of processes that were opening the same engine in the same precision; then that is skipped until a reload
ATTEMPTS = 5  # starts in a row that end before the child says that it lives; then the supervisor gives up
_FIRST_PAUSE_SECONDS = 0.25  # before the second attempt; doubled for each further one
_LONGEST_PAUSE_SECONDS = 30.0
GPU_DECODE_THREADS = 32  # in each HTTP worker: they wait for the device, which decodes for all that wait at once
_GOODBYE_SECONDS = 5.0  # for an engine to end once nobody is connected to it


class SupervisorGaveUpError(RuntimeError):
    """What must run does not stay up."""


class StartFailedError(Exception):
    """An engine did not open the bundle: it rejected it, or died. ``result`` is for the metric, the message for people."""

    def __init__(self, result: str, reason: str, trying: str | None = None) -> None:
        super().__init__(reason)
        self.result = result
        self.trying = trying  # the engine and precision that it was opening when it died


@dataclass(eq=False)
class Generation:
    """One opening of the bundle: its slot table, and the engines that serve it."""

    number: int
    slot_table: int | None = None  # descriptor; None until the first engine has opened
    engines: dict[int, Child] = field(default_factory=dict)  # those that are open
    keepers: set[asyncio.Task[None]] = field(default_factory=set)
    retired: bool = False


class Supervisor:
    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self.settings, self.listener = settings, listener
        self._children: set[Child] = set()
        self._workers: dict[int, Child] = {}
        self._serving: Generation | None = None
        self._older: Generation | None = None  # retired, and not yet at its end
        self._incarnations = 0
        self._generations = 0
        self._failure: str | None = None  # why no model is served
        self._restarts = {process: {"died": 0, "hung": 0} for process in ("http_worker", "engine_worker")}
        self._reloads: dict[str, int] = {"ok": 0}
        self._progress: str | None = None  # of an engine that is being opened
        self._trying: str | None = None  # by that engine
        self._deaths = Counter[str]()  # of processes that opened an engine, by engine and precision
        self._reload_wanted = asyncio.Event()
        self._asking: list[tuple[Child, int]] = []  # HTTP workers that wait to hear what came of a reload
        self._stopping = asyncio.Event()
        self._forced = False

    async def run(self) -> int:
        """The exit status: 0 if everything admitted was answered. Raises GaveUp."""
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload_wanted.set)
        try:
            async with asyncio.TaskGroup() as self._group:
                model = self._group.create_task(self._keep_model())
                await asyncio.gather(
                    *(self._group.create_task(self._keep_worker(index)) for index in range(self.settings.workers))
                )
                model.cancel()
                await self._end_engines()
        except* SupervisorGaveUpError as several:
            raise SupervisorGaveUpError(str(several.exceptions[0])) from None
        finally:
            for child in list(self._children):
                child.kill()
                await child.ended()
        return int(self._forced)

    # -- HTTP workers

    async def _keep_worker(self, index: int) -> None:
        attempts = 0
        while not self._stopping.is_set():
            opening = {"worker": index, "decode_threads": self.settings.decode_threads}
            worker = self._start(
                "vitserve.service.http_worker.main", f"http-worker-{index}", opening, [self.listener.fileno()]
            )
            self._workers[index] = worker
            worker.send(self._status())
            if self._serving is not None:
                for engine, child in self._serving.engines.items():
                    self._connect(self._serving, engine, child, index, worker)
            alive = await self._listen(worker, self._hear)
            del self._workers[index]
            for generation in (self._serving, self._older):
                if generation is not None and generation.slot_table is not None:
                    memory_layout.clear_worker_slots(generation.slot_table, index)
            how = await self._ended(worker)
            if self._stopping.is_set():
                return
            attempts = 0 if alive else attempts + 1
            await self._pause(attempts, f"{worker.name} ended {how}")
            self._count_restart("http_worker", worker)

    def _hear(self, worker: Child, message: Message) -> None:
        if message["kind"] == "reload":
            self._asking.append((worker, message["id"]))
            self._reload_wanted.set()

    def _hear_engine(self, engine: Child, message: Message) -> None:
        if message["kind"] == "built":
            log.info("%s has built what is quicker than it; the bundle is opened again", engine.name)
            self._reload_wanted.set()

    def _connect(self, generation: Generation, engine: int, child: Child, index: int, worker: Child) -> None:
        assert generation.slot_table is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            child.send({"kind": "connect", "worker": index, "incarnation": worker.incarnation}, [ours.fileno()])
            message = {
                "kind": "connect",
                "generation": generation.number,
                "engine": engine,
                "incarnation": child.incarnation,
            }
            worker.send(message, [generation.slot_table, theirs.fileno()])

    # -- the model

    async def _keep_model(self) -> None:
        """Opens the bundle at start and whenever a reload is wanted, one at a time; what is served meanwhile serves on."""
        attempts, reload = 0, False
        while True:
            self._reload_wanted.clear()
            asking, self._asking = self._asking, []
            result, reason, failed_at = "ok", "", None
            try:
                await self._load()
                self._failure = None
            except StartFailedError as failure:
                result, reason, failed_at = failure.result, str(failure), failure.trying
                self._rejected(failure)
            if reload:
                self._reloads[result] = self._reloads.get(result, 0) + 1
                log.info("reload: %s", result)
            self._tell_status()
            for worker, asked in asking:
                worker.send({"kind": "reloaded", "id": asked, "result": result, "reason": reason[:10_000]})
            if self._serving is None and result == "died":
                attempts = (
                    0 if failed_at is not None and self._deaths[failed_at] == DEATHS else attempts + 1
                )  # the next try is another one
                await self._pause(attempts, reason)
                continue
            attempts = 0
            await self._reload_wanted.wait()
            reload = True
            self._deaths.clear()

    def _rejected(self, failure: StartFailedError) -> None:
        log.error("the bundle cannot be served (%s): %s", failure.result, failure)
        if self._serving is None or not self._serving.engines:
            self._failure = f"the bundle cannot be served: {failure}"
            self._tell_status()

    async def _load(self) -> None:
        """Opens the bundle in a new engine, and has the HTTP workers switch to it once it is verified. Raises StartFailed."""
        if self._older is not None and self._older.keepers:
            await asyncio.wait(self._older.keepers)  # bounded: see _retire()
        self._generations += 1
        generation = Generation(self._generations)
        first = await self._open(generation, 0)
        before, self._serving = self._serving, generation
        self._keep_engine_going(generation, 0, first)
        for index in range(1, self.settings.engines):
            self._keep_engine_going(generation, index, None)
        if before is not None:
            self._retire(before)

    def _retire(self, generation: Generation) -> None:
        """Its engines end when the last HTTP worker has its answers; those that have not ended by then are killed."""
        generation.retired = True
        self._older = generation
        for engine in generation.engines.values():
            engine.send({"kind": "retire"})
            asyncio.get_running_loop().call_later(self.settings.drain_seconds, engine.kill)
        self._forget_if_ended(generation)  # its engines may have ended before, rejected when they were to be replaced

    # -- engines

    def _keep_engine_going(self, generation: Generation, index: int, child: Child | None) -> None:
        if child is not None:
            self._join(generation, index, child)
        task = self._group.create_task(self._keep_engine(generation, index, child))
        generation.keepers.add(task)
        task.add_done_callback(lambda _: self._forget(generation, task))

    def _forget(self, generation: Generation, task: asyncio.Task[None]) -> None:
        generation.keepers.discard(task)
        self._forget_if_ended(generation)

    def _forget_if_ended(self, generation: Generation) -> None:
        if generation.retired and not generation.keepers and generation.slot_table is not None:
            os.close(generation.slot_table)
            generation.slot_table = None
            if self._older is generation:
                self._older = None

    async def _keep_engine(self, generation: Generation, index: int, child: Child | None) -> None:
        attempts = 0
        while not generation.retired:
            if child is None:
                try:
                    child = await self._open(generation, index)
                except StartFailedError as failure:
                    if failure.result == "changed":
                        log.warning("%s; it is opened as a new model", failure)
                        self._reload_wanted.set()
                        return
                    if failure.result != "died":  # it would be rejected again; a reload may find it repaired
                        self._rejected(failure)
                        return
                    attempts = (
                        0 if failure.trying is not None and self._deaths[failure.trying] == DEATHS else attempts + 1
                    )
                    await self._pause(attempts, str(failure), needed=not generation.engines)
                    continue
                if (
                    self._serving is not generation or self._stopping.is_set()
                ):  # the HTTP workers are not to come back to an old model
                    child.kill()
                    await self._ended(child)
                    return
                self._join(generation, index, child)
            attempts = 0
            await self._listen(child, self._hear_engine)
            del generation.engines[index]
            how = await self._ended(child)
            if not generation.retired:
                log.error("%s ended %s; another is started", child.name, how)
                self._count_restart("engine_worker", child)
            child = None

    def _join(self, generation: Generation, index: int, child: Child) -> None:
        generation.engines[index] = child
        for worker_index, worker in self._workers.items():
            self._connect(generation, index, child, worker_index, worker)

    async def _open(self, generation: Generation, index: int) -> Child:
        """Starts an engine and waits until it is warm and verified. Raises StartFailed."""
        # The generations that exist at one time differ in parity, so that no two processes have one name.
        name = f"engine-{index}-{'ab'[generation.number % 2]}"
        skipped = [engine for engine, deaths in self._deaths.items() if deaths >= DEATHS]
        opening = {
            "engine": index,
            "workers": self.settings.workers,
            "engines": self.settings.engines,
            "skipped": skipped,
        }
        self._trying = None
        devices = machine.gpus()
        environment = {"CUDA_VISIBLE_DEVICES": devices[index % len(devices)]} if devices else {}
        child = self._start(
            "vitserve.service.engine_worker.main",
            name,
            opening,
            [] if generation.slot_table is None else [generation.slot_table],
            environment,
        )
        try:
            received = await self._opened(child)
        except TimeoutError:
            child.kill()
            await self._ended(child)
            raise self._died(f"{name} did not open the bundle within {START_SECONDS:.0f} s") from None
        if received is None:
            raise self._died(f"{name} ended {await self._ended(child)} while it opened the bundle")
        message, descriptors = received
        if message["kind"] == "rejected":
            await self._ended(child)
            raise StartFailedError(message["result"], message["reason"])
        self._deaths.pop(str(self._trying), None)  # it can be opened after all
        if descriptors:
            (generation.slot_table,) = descriptors
        return child

    def _died(self, reason: str) -> StartFailedError:
        """Counts what it was opening: what ends a process again and again shall not keep the next best from serving."""
        if self._trying is None:
            return StartFailedError("died", reason)
        self._deaths[self._trying] += 1
        if self._deaths[self._trying] == DEATHS:
            log.error("%s is skipped until a reload: %d processes ended while they opened it", self._trying, DEATHS)
        return StartFailedError("died", f"{reason}, at {self._trying}", self._trying)

    async def _opened(self, child: Child) -> tuple[Message, list[int]] | None:
        """What it says when it is done, or None at its end. Raises TimeoutError when it has said nothing for too long."""
        try:
            while True:
                async with asyncio.timeout(START_SECONDS):
                    received = await child.receive()
                if received is None or received[0]["kind"] != "progress":
                    return received
                self._progress, self._trying = received[0]["step"], received[0]["trying"]
                self._tell_status()
        finally:
            self._progress = None

    async def _end_engines(self) -> None:
        generations = [each for each in (self._serving, self._older) if each is not None]
        for generation in generations:
            generation.retired = True
            for engine in generation.engines.values():
                engine.send({"kind": "retire"})
        keepers = {task for generation in generations for task in generation.keepers}
        if keepers:
            await asyncio.wait(keepers, timeout=_GOODBYE_SECONDS)
        for child in self._children:
            child.kill()

    # -- any child

    def _start(
        self,
        module: str,
        name: str,
        opening: Message,
        descriptors: list[int],
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        self._incarnations += 1
        opening = opening | {
            "kind": "open",
            "process": name,
            "incarnation": self._incarnations,
            "settings": dataclasses.asdict(self.settings),
        }
        child = Child(module, name, self._incarnations, opening, descriptors, environment or {})
        self._children.add(child)
        return child

    async def _listen(self, child: Child, hear: Callable[[Child, Message], None]) -> bool:
        """Until it ends, which it does at our hands if it is silent for too long. True if it ever said that it lives.

        Twice half the time, and not once the whole: when all of us have been suspended, it is to have the time to speak first.
        """
        alive, silent = False, 0
        while True:
            try:
                async with asyncio.timeout(self.settings.hang_seconds / 2 if alive else START_SECONDS):
                    received = await child.receive()
            except TimeoutError:
                silent += 1
                if silent > 1 or not alive:
                    log.error(
                        "%s has been silent for %.1f s; it is killed",
                        child.name,
                        self.settings.hang_seconds if alive else START_SECONDS,
                    )
                    child.hung = True
                    child.kill()
                continue
            if received is None:
                return alive
            alive, silent = True, 0
            hear(child, received[0])

    async def _ended(self, child: Child) -> str:
        how = await child.ended()
        self._children.discard(child)
        return how

    async def _pause(self, attempts: int, reason: str, needed: bool = True) -> None:
        """Before a further start; longer after each that failed. Raises GaveUp after too many, if what is started is ``needed``."""
        if attempts >= ATTEMPTS and needed:
            raise SupervisorGaveUpError(f"{reason}; that was attempt {attempts} of {ATTEMPTS}")
        if attempts:
            log.error("%s; another attempt follows", reason)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    self._stopping.wait(), min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (attempts - 1))
                )

    # -- what HTTP workers and operators are told

    def _count_restart(self, process: str, child: Child) -> None:
        self._restarts[process]["hung" if child.hung else "died"] += 1
        self._tell_status()

    def _status(self) -> Message:
        return {
            "kind": "status",
            "failure": self._failure,
            "progress": self._progress,
            "restarts": self._restarts,
            "reloads": self._reloads,
        }

    def _tell_status(self) -> None:
        for worker in self._workers.values():
            worker.send(self._status())

    # -- the end

    def _stop(self) -> None:
        """The first time: drains. The second time, or when that took too long: ends it now."""
        if self._stopping.is_set():
            self._force("a second signal")
            return
        log.info("draining")
        self._stopping.set()
        for worker in self._workers.values():
            worker.send({"kind": "drain"})
        asyncio.get_running_loop().call_later(
            self.settings.drain_seconds, self._force, f"drain_seconds, {self.settings.drain_seconds:g}, are over"
        )

    def _force(self, why: str) -> None:
        log.error("%s: what is not answered by now will not be", why)
        self._forced = True
        for child in self._children:
            child.kill()


def serve(settings: Settings) -> int:
    """Blocks. Returns the exit status, after SIGTERM or SIGINT or when it gave up. Raises SettingsError, OSError where it cannot listen."""
    set_up_logging("supervisor", settings.log_level)
    settings = for_this_machine(settings, machine.cores())
    directory = tempfile.mkdtemp(prefix="vitserve-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    os.environ[METRICS_DIR] = directory  # for the children
    try:
        with _listen_on(settings) as listener:
            return asyncio.run(Supervisor(settings, listener).run())
    except SupervisorGaveUpError as gave_up:
        log.critical("giving up: %s", gave_up)
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def for_this_machine(settings: Settings, cores: int) -> Settings:
    """Fills in what is left to the machine. Raises SettingsError."""
    workers = settings.workers or max(1, min(8, cores // 4, settings.slots // settings.max_images))
    engines = settings.engines or (max(1, len(machine.gpus())) if wants_gpu_workers(settings.engine) else 1)
    threads = settings.decode_threads or (GPU_DECODE_THREADS if settings.decode == "gpu" else max(1, cores // workers))
    return dataclasses.replace(settings, workers=workers, engines=engines, decode_threads=threads)


def _listen_on(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info("running on http://%s:%d", host, listener.getsockname()[1])
    return listener
