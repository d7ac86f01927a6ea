"""The engine worker's sockets: one connection to each HTTP worker, and the supervisor's channel."""

from __future__ import annotations

import logging
import selectors
import socket
from collections.abc import Callable

from vitserve.service.engine_worker.pending import Completions
from vitserve.service.ipc import wire_format
from vitserve.service.ipc.connection import Connection
from vitserve.service.ipc.control_channel import Channel

log = logging.getLogger("vitserve.engine_worker")

Submissions = list[tuple[int, wire_format.Submission]]  # each with the HTTP worker that sent it


class WorkerConnections:
    """One thread at a time receives, connects and closes; any thread sends."""

    def __init__(self, channel: Channel, incarnation: int, disconnected: Callable[[int], None]) -> None:
        """``disconnected`` is called with the index of each HTTP worker whose connection has ended."""
        self._channel, self._incarnation, self._disconnected = channel, incarnation, disconnected
        self._by_worker: dict[int, Connection] = {}
        self._selector = selectors.DefaultSelector()
        # A byte on this socket wakes the receiving thread when another thread's message did not fit into a socket.
        self._wake_writer, self._wake_reader = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._selector.register(channel, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)

    def __len__(self) -> int:
        return len(self._by_worker)

    def connect(self, worker: int, incarnation: int, descriptor: int) -> None:
        if worker in self._by_worker:  # an earlier incarnation, whose exit has not been noticed yet
            self._disconnect(self._by_worker[worker])
        connection = Connection(socket.socket(fileno=descriptor), worker, incarnation, self._wake)
        self._by_worker[worker] = connection
        self._selector.register(connection, selectors.EVENT_READ)

    def receive(self, timeout_seconds: float) -> tuple[Submissions, bool]:
        """Waits for messages. Returns submissions, and whether a message of the supervisor can be read."""
        submissions: Submissions = []
        control = False
        for key, events in self._selector.select(timeout_seconds):
            if isinstance(key.fileobj, Connection):
                if events & selectors.EVENT_READ:
                    submissions += self._read(key.fileobj)
                elif key.fileobj.flush():
                    self._selector.modify(key.fileobj, selectors.EVENT_READ)
            elif key.fileobj is self._channel:
                control = True
            else:
                self._watch_stuck_connections()
        return submissions, control

    def send(self, completions: Completions) -> None:
        """Completions for an HTTP worker that has exited are dropped."""
        by_worker: dict[int, list[wire_format.Completion]] = {}
        for worker, completion in completions:
            by_worker.setdefault(worker, []).append(completion)
        for worker, group in by_worker.items():
            connection = self._by_worker.get(worker)
            if connection is not None:
                for message in wire_format.pack_completions(self._incarnation, group):
                    connection.send(message)

    def close(self) -> None:
        for resource in (self._selector, self._wake_writer, self._wake_reader):
            resource.close()

    def _read(self, connection: Connection) -> Submissions:
        submissions: Submissions = []
        try:
            while (message := connection.receive()) is not None:
                incarnation, received = wire_format.unpack_submissions(message)
                if incarnation != connection.peer_incarnation:
                    log.error(
                        "dropping a message of incarnation %d from HTTP worker %d: the connection is of incarnation %d",
                        incarnation,
                        connection.peer,
                        connection.peer_incarnation,
                    )
                    continue
                submissions += [(connection.peer, submission) for submission in received]
        except EOFError:
            self._disconnect(connection)
            return []
        return submissions

    def _disconnect(self, connection: Connection) -> None:
        self._selector.unregister(connection)
        self._disconnected(connection.peer)
        del self._by_worker[connection.peer]
        connection.close()

    def _wake(self, connection: Connection) -> None:
        self._wake_writer.send(b"1")

    def _watch_stuck_connections(self) -> None:
        """Has the selector report when a connection with a backlog can send again."""
        self._wake_reader.recv(64)
        for connection in self._by_worker.values():
            if not connection.flush():
                self._selector.modify(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
