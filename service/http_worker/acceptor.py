"""Accepts connections from the listening socket that all HTTP workers share."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from vitserve.service.http_worker.turn import Turns
from vitserve.service.ipc.shared_memory import SlotTable

log = logging.getLogger(__name__)

BACKLOG = 2048  # connections that wait to be accepted; with fewer, clients would retry after a second

# libuv accepts one connection per turn of the event loop and registration of a socket (uv__server_io(), since 1.45).
# Under overload, a turn may take tens of milliseconds and clients and liveness probes would wait for seconds, so the
# socket is registered several times while turns are long.
_REGISTRATIONS = 16
_LONG_TURN_SECONDS = 0.01
_CALM_SECONDS = 5.0  # without a long turn, after which one registration is enough again
# Several HTTP workers: one that has more connections than another leaves new ones to it for this long.
_YIELD_SECONDS = 0.001


class Acceptor:
    """Create it on the event loop, call start(), and check() about once a second.

    One HTTP worker accepts with asyncio's servers. Several workers accept by themselves, so that each gets the same
    number of connections: with few connections, one of them could otherwise get all.
    """

    def __init__(
        self, listener: socket.socket, worker: int, turns: Turns, create_protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        self._listener, self._worker, self._create_protocol = listener, worker, create_protocol
        self._loop = asyncio.get_running_loop()
        self._servers: list[asyncio.Server] = []
        self._last_long_turn = 0.0
        self._tasks: set[asyncio.Task[object]] = set()
        self._slot_table: SlotTable | None = None  # of several HTTP workers
        self._closed = False
        listener.setblocking(False)
        turns.on_long_turn(_LONG_TURN_SECONDS, self._register_more)

    async def start(self) -> None:
        self._servers.append(await self._register())

    def share(self, slot_table: SlotTable) -> None:
        """Divides the connections among the HTTP workers from now on, if there are several."""
        if self._slot_table is None and slot_table.shape.workers > 1 and not self._closed:
            self._close_servers(keep=0)
            self._loop.add_reader(self._listener, self._accept)
        if slot_table.shape.workers > 1:
            self._slot_table = slot_table
            slot_table.connections[self._worker] = 0

    def check(self, connections: int) -> None:
        """``connections``: number of open connections of this HTTP worker."""
        if self._slot_table is not None:
            self._slot_table.connections[self._worker] = connections
        elif self._loop.time() - self._last_long_turn > _CALM_SECONDS:
            self._close_servers(keep=1)

    def close(self) -> None:
        """Accepts no more connections. Other HTTP workers may have the socket open."""
        self._closed = True
        self._close_servers(keep=0)
        self._loop.remove_reader(self._listener)
        self._listener.close()

    # -- one HTTP worker

    def _close_servers(self, keep: int) -> None:
        while len(self._servers) > keep:
            self._servers.pop().close()

    def _register_more(self) -> None:
        self._last_long_turn = self._loop.time()
        if not self._tasks and len(self._servers) < _REGISTRATIONS and self._slot_table is None:
            self._run(self._add_registrations())

    async def _add_registrations(self) -> None:
        while len(self._servers) < _REGISTRATIONS and not self._closed and self._slot_table is None:
            self._servers.append(await self._register())
        if self._closed or self._slot_table is not None:
            self._close_servers(keep=0)

    async def _register(self) -> asyncio.Server:
        """Listens again, so the backlog must be that of the supervisor: it applies to the shared socket."""
        return await self._loop.create_server(self._create_protocol, sock=self._listener.dup(), backlog=BACKLOG)

    # -- several HTTP workers

    def _accept(self) -> None:
        assert self._slot_table is not None
        connections = self._slot_table.connections
        if connections[self._worker] > min(connections):
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_YIELD_SECONDS, self._accept_after_yielding)
        else:
            self._accept_one()

    def _accept_after_yielding(self) -> None:
        """Accepts one connection if no other HTTP worker has: the others may be busy."""
        if not self._closed:
            self._loop.add_reader(self._listener, self._accept)
            self._accept_one()

    def _accept_one(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if not isinstance(error, (BlockingIOError, ConnectionAbortedError)):  # no file descriptor is free
                log.error("cannot accept connections: %s", error)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(1.0, self._accept_after_yielding)
            return
        assert self._slot_table is not None
        self._slot_table.connections[self._worker] += 1
        self._run(self._loop.connect_accepted_socket(self._create_protocol, connection))

    def _run(self, work: asyncio._CoroutineLike[object]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("a connection could not be opened: %s", error)
