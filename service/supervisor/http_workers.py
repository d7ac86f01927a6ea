"""The running HTTP workers, and the messages to them: the status, and connections to the engine workers."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass, field

from vitserve.service.ipc.control_messages import ConnectEngine, ConnectWorker, Drain, Status
from vitserve.service.supervisor.child_process import ChildProcess

log = logging.getLogger("vitserve.supervisor")


@dataclass
class HttpWorkers:
    """Keeps the current status too, because an HTTP worker that starts later needs all of it."""

    failure: str | None = None  # see control_messages.Status
    _progress: str | None = None
    _restarts: dict[str, dict[str, int]] = field(
        default_factory=lambda: {process: {"exited": 0, "hung": 0} for process in ("http_worker", "engine_worker")}
    )
    _reloads: dict[str, int] = field(default_factory=lambda: {"ok": 0})
    _running: dict[int, ChildProcess] = field(default_factory=dict)

    def add(self, index: int, worker: ChildProcess) -> None:
        self._running[index] = worker
        worker.send(self._status())

    def remove(self, index: int) -> None:
        del self._running[index]

    def connect(self, worker_index: int, generation: int, slot_table: int, index: int, engine: ChildProcess) -> None:
        """Connects one HTTP worker to the engine worker ``index``."""
        worker = self._running[worker_index]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            engine.send(ConnectWorker(worker_index, worker.incarnation), [ours.fileno()])
            worker.send(ConnectEngine(generation, index, engine.incarnation), [slot_table, theirs.fileno()])

    def connect_all(self, generation: int, slot_table: int, index: int, engine: ChildProcess) -> None:
        for worker_index in self._running:
            self.connect(worker_index, generation, slot_table, index, engine)

    def drain(self) -> None:
        for worker in self._running.values():
            worker.send(Drain())

    # -- status

    def send_status(self) -> None:
        for worker in self._running.values():
            worker.send(self._status())

    def report_progress(self, step: str | None) -> None:
        self._progress = step
        self.send_status()

    def report_rejection(self, result: str, reason: str, model_is_served: bool) -> None:
        """The service becomes unready only if no model is served."""
        log.error("the bundle cannot be served (%s): %s", result, reason)
        if not model_is_served:
            self.failure = f"the bundle cannot be served: {reason}"
            self.send_status()

    def count_restart(self, process: str, child: ChildProcess) -> None:
        self._restarts[process]["hung" if child.hung else "exited"] += 1
        self.send_status()

    def count_reload(self, result: str) -> None:
        self._reloads[result] = self._reloads.get(result, 0) + 1
        log.info("reload: %s", result)

    def _status(self) -> Status:
        return Status(self.failure, self._progress, self._restarts, self._reloads)
