"""Accepts connections from the listening socket that all HTTP workers share."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from vitserve.service.http_worker.connections.limits import LINGER_SECONDS
from vitserve.service.http_worker.connections.listener import drop_new_connections
from vitserve.service.http_worker.connections.tls import Tls
from vitserve.service.http_worker.turn import Turns
from vitserve.service.ipc.child_runtime import BACKLOG
from vitserve.service.ipc.shared_memory import SlotTable

log = logging.getLogger(__name__)

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
    number of connections: with few connections, one of them could otherwise get all. With TLS, a worker also accepts by
    itself, to bound the connections whose handshake has not finished.
    """

    def __init__(
        self,
        listener: socket.socket,
        worker: int,
        turns: Turns,
        create_protocol: Callable[[], asyncio.Protocol],
        tls: Tls | None = None,
    ) -> None:
        self._listener, self._worker, self._create_protocol, self._tls = listener, worker, create_protocol, tls
        self._loop = asyncio.get_running_loop()
        self._servers: list[asyncio.Server] = []
        self._last_long_turn = 0.0
        self._tasks: dict[asyncio.Task[object], None] = {}  # with TLS: the handshakes, the oldest first
        self._paused = False
        self._slot_table: SlotTable | None = None  # of several HTTP workers
        self._closed = False
        listener.setblocking(False)
        turns.on_long_turn(_LONG_TURN_SECONDS, self._register_more)

    async def start(self) -> None:
        if self._tls is None:
            self._servers.append(await self._register())
        else:
            self._loop.add_reader(self._listener, self._accept)

    def share(self, slot_table: SlotTable) -> None:
        """Divides the connections among the HTTP workers from now on, if there are several."""
        if self._slot_table is None and slot_table.shape.workers > 1 and not self._closed:
            self._close_servers(keep=0)
            if not self._paused:
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

    def pause(self) -> None:
        """New connections wait in the backlog until resume()."""
        self._paused = True
        self._close_servers(keep=0)
        self._loop.remove_reader(self._listener)

    def resume(self) -> None:
        self._paused = False
        if self._closed:
            return
        if self._slot_table is not None or self._tls is not None:
            self._loop.add_reader(self._listener, self._accept)
        elif not self._servers and not self._tasks:
            self._run(self._add_registrations(1))

    async def close(self) -> None:
        """Accepts the connections that wait in the backlog, and then no more. The clients of others are not reset.

        The kernel resets connections that have not been accepted when the last process closes the listening socket.
        reject_new_connections() must have been called a moment before.
        """
        self._closed = True
        self._close_servers(keep=0)
        self._loop.remove_reader(self._listener)
        while (connection := self._next()) is not None:
            self._open(connection)
        self._listener.close()
        if self._tasks:
            _, unfinished = await asyncio.wait(list(self._tasks), timeout=LINGER_SECONDS)
            for task in unfinished:  # handshakes
                task.cancel()

    def reject_new_connections(self) -> None:
        """For all HTTP workers: clients that begin to connect get no response, and an error once the socket is closed.

        Connections whose handshake has begun are still completed.
        """
        drop_new_connections(self._listener)

    # -- one HTTP worker

    def _close_servers(self, keep: int) -> None:
        while len(self._servers) > keep:
            self._servers.pop().close()

    def _register_more(self) -> None:
        self._last_long_turn = self._loop.time()
        if not self._tasks and 0 < len(self._servers) < _REGISTRATIONS and self._uses_servers:
            self._run(self._add_registrations(_REGISTRATIONS))

    async def _add_registrations(self, count: int) -> None:
        while len(self._servers) < count and self._uses_servers:
            self._servers.append(await self._register())
        if not self._uses_servers:
            self._close_servers(keep=0)

    @property
    def _uses_servers(self) -> bool:
        return self._slot_table is None and self._tls is None and not self._paused and not self._closed

    async def _register(self) -> asyncio.Server:
        """Listens again, so the backlog must be that of the supervisor: it applies to the shared socket."""
        return await self._loop.create_server(self._create_protocol, sock=self._listener.dup(), backlog=BACKLOG)

    # -- several HTTP workers, or TLS

    def _accept(self) -> None:
        if self._slot_table is None:
            for _ in range(_REGISTRATIONS):
                if not self._accept_one():
                    return
            return
        connections = self._slot_table.connections
        if connections[self._worker] > min(connections):
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_YIELD_SECONDS, self._accept_after_yielding)
        else:
            self._accept_one()

    def _accept_after_yielding(self) -> None:
        """Accepts one connection if no other HTTP worker has: the others may be busy."""
        if not self._closed and not self._paused:
            self._loop.add_reader(self._listener, self._accept)
            self._accept_one()

    def _accept_one(self) -> bool:
        """Whether there was one."""
        connection = self._next()
        if connection is not None:
            if self._slot_table is not None:
                self._slot_table.connections[self._worker] += 1
            self._open(connection)
        return connection is not None

    def _open(self, connection: socket.socket) -> None:
        if self._tls is None:
            self._run(self._loop.connect_accepted_socket(self._create_protocol, connection))
            return
        if len(self._tasks) >= self._tls.most_handshakes:
            oldest = next(iter(self._tasks))
            del self._tasks[oldest]
            oldest.cancel()  # closes the connection
        self._run(self._tls.connect(self._loop, self._create_protocol, connection))

    def _next(self) -> socket.socket | None:
        """The next connection of the backlog. None if there is none, or none can be accepted."""
        try:
            return self._listener.accept()[0]
        except BlockingIOError:
            return None
        except ConnectionAbortedError:
            return self._next()
        except OSError as error:  # no file descriptor is free
            log.error("cannot accept connections: %s", error)
            if not self._closed:
                self._loop.remove_reader(self._listener)
                self._loop.call_later(1.0, self._accept_after_yielding)
            return None

    def _run(self, work: asyncio._CoroutineLike[object]) -> None:
        task = self._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("a connection could not be opened: %s", error)
