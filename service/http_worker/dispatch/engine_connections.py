"""The connections of one HTTP worker to the engine workers of one model."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vitserve.service.http_worker.turn import Turns
from vitserve.service.ipc import wire_format
from vitserve.service.ipc.connection import Connection
from vitserve.service.ipc.shared_memory import SlotTable, sort_key
from vitserve.service.ipc.slots import Ticket

log = logging.getLogger(__name__)

# The connection to send it on, the image, the action, and whether the embedding is needed.
Message = tuple[Connection, Ticket, int, bool]

# Messages are sent after the dispatcher's lock has been released, because sending releases the interpreter lock: other
# threads would wait for both. If the engine worker has exited by then, the connection is closed and drops the message,
# and the dispatcher has already reclaimed the image.


@dataclass
class EngineConnections:
    """The dispatcher's lock guards ``connections`` and the times of lost connections.

    Sockets are read and flushed on the event loop. send() may be called on any thread.
    """

    slot_table: SlotTable
    incarnation: int  # of the HTTP worker
    loop: asyncio.AbstractEventLoop
    turns: Turns
    on_completions: Callable[[list[wire_format.Completion]], None]
    on_lost: Callable[[int, Connection], None]
    connections: dict[int, Connection] = field(default_factory=dict, init=False)
    _lost_at: dict[int, float] = field(default_factory=dict, init=False)  # by engine worker that is not back yet
    _posted: dict[Connection, list[wire_format.Submission]] = field(default_factory=dict, init=False)

    def open(self, engine: int, incarnation: int, endpoint: socket.socket) -> Connection:
        return Connection(endpoint, engine, incarnation, self._flush_later)

    # -- with the lock held

    def add(self, connection: Connection) -> None:
        self.connections[connection.peer] = connection
        self._lost_at.pop(connection.peer, None)

    def lose(self, engine: int) -> None:
        """Closes the connection, and expects the engine worker to be restarted."""
        self.close(engine)
        self._lost_at[engine] = time.monotonic()

    def close(self, engine: int) -> None:
        connection = self.connections.pop(engine)
        self.loop.remove_reader(connection.fileno())
        self.loop.remove_writer(connection.fileno())
        connection.close()

    def available_at(self) -> dict[int, float]:
        """Candidates for SlotTable.estimate_completion(): all that are connected, or else all that are restarting."""
        if self.connections:
            return dict.fromkeys(self.connections, 0.0)
        return {engine: lost_at + self.slot_table.start_seconds(engine) for engine, lost_at in self._lost_at.items()}

    def earliest(self, ticket: Ticket) -> int:
        """The connected engine worker that would finish the image first."""
        if len(self.connections) == 1:
            return next(iter(self.connections))
        key = sort_key(ticket.priority, ticket.deadline)
        return self.slot_table.estimate_completion(key, time.monotonic(), self.available_at()).engine

    # -- without the lock

    def send(self, message: Message | None) -> None:
        """On any thread. None is ignored."""
        if message is not None:
            message[0].send(*wire_format.pack_submissions(self.incarnation, [_submission(message)]))

    # -- on the event loop

    def post(self, message: Message | None) -> None:
        """Sends all messages of a turn of the event loop together: they may then run in one batch. None is ignored."""
        if message is not None:
            self._posted.setdefault(message[0], []).append(_submission(message))
            self.turns.at_end(self._send_posted)

    def post_all(self, messages: Iterable[Message | None]) -> None:
        for message in messages:
            self.post(message)

    def _send_posted(self) -> None:
        posted, self._posted = self._posted, {}
        for connection, submissions in posted.items():
            for packed in wire_format.pack_submissions(self.incarnation, submissions):
                connection.send(packed)

    def listen(self, connection: Connection) -> None:
        self.loop.add_reader(connection.fileno(), self._read, connection)

    def _read(self, connection: Connection) -> None:
        """Reads all messages: the event loop calls once per turn, and under overload a turn is longer than a batch."""
        try:
            while (message := connection.receive()) is not None:
                incarnation, completions = wire_format.unpack_completions(message)
                if incarnation == connection.peer_incarnation:
                    self.on_completions(completions)
                else:
                    log.error(
                        "dropped a message of incarnation %d from engine %d, which is connected as incarnation %d",
                        incarnation,
                        connection.peer,
                        connection.peer_incarnation,
                    )
        except EOFError:
            self.on_lost(connection.peer, connection)
        except wire_format.WireFormatError:  # a bug, and the images it affects are unknown
            log.critical("invalid message from engine %d", connection.peer, exc_info=True)
            os._exit(os.EX_SOFTWARE)

    def _flush_later(self, connection: Connection) -> None:
        """On any thread: flushes the connection as soon as its socket is writable."""
        self.loop.call_soon_threadsafe(self._watch, connection)

    def _watch(self, connection: Connection) -> None:
        # The connection may have been closed since, and its descriptor may belong to another file.
        if self.connections.get(connection.peer) is connection:
            self.loop.add_writer(connection.fileno(), self._flush, connection)

    def _flush(self, connection: Connection) -> None:
        if connection.flush():
            self.loop.remove_writer(connection.fileno())


def _submission(message: Message) -> wire_format.Submission:
    _, ticket, action, embedding = message
    return wire_format.Submission(ticket.slot, action, ticket.priority, ticket.sequence, ticket.deadline, embedding)
