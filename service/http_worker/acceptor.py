"""Accepts connections from the listening socket that all HTTP workers share."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections.abc import Callable
from functools import partial

from vitserve.service.http_worker.connections.backlog_rejection import BacklogRejections, arrival_of
from vitserve.service.http_worker.connections.limits import LINGER_SECONDS
from vitserve.service.http_worker.connections.listener import drop_new_connections
from vitserve.service.http_worker.connections.tls import Tls
from vitserve.service.http_worker.protocol import InferenceProtocol
from vitserve.service.http_worker.turn import Turns
from vitserve.service.ipc.child_runtime import BACKLOG
from vitserve.service.ipc.shared_memory import SlotTable

log = logging.getLogger(__name__)

# libuv accepts one connection per turn of the event loop and registration of a socket (uv__server_io(), since 1.45).
# Under overload, a turn may take tens of milliseconds and clients and liveness probes would wait for seconds, so the
# worker accepts by itself while turns are long.
_MOST_PER_TURN = 128
# Of them, those that are not rejected at once: whether another request can be admitted is known after them only.
_MOST_OPENED = 8
_LONG_TURN_SECONDS = 0.01
_CALM_SECONDS = 5.0  # without a long turn, after which the worker no longer accepts by itself
# Several HTTP workers: one that has more connections than another leaves new ones to it for this long.
_YIELD_SECONDS = 0.001


class Acceptor:
    """Create it on the event loop, call start(), and check() about once a second.

    One HTTP worker accepts with asyncio's server, except under overload. Several workers accept by themselves, so that
    each gets the same number of connections: with few connections, one of them could otherwise get all. With TLS, a
    worker also accepts by itself, to bound the connections whose handshake has not finished.
    """

    def __init__(
        self,
        listener: socket.socket,
        worker: int,
        turns: Turns,
        create_protocol: Callable[[], InferenceProtocol],
        rejections: BacklogRejections,
        tls: Tls | None = None,
    ) -> None:
        self._listener, self._worker, self._create_protocol, self._tls = listener, worker, create_protocol, tls
        self._turns, self._rejections = turns, rejections
        self._loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._last_long_turn = -math.inf
        self._overloaded = False
        self._opened = 0  # in this turn
        self._tasks: dict[asyncio.Task[object], None] = {}  # with TLS: the handshakes, the oldest first
        self._paused = False
        self._slot_table: SlotTable | None = None  # of several HTTP workers
        self._closed = False
        listener.setblocking(False)
        turns.on_long_turn(_LONG_TURN_SECONDS, self._turn_was_long)

    async def start(self) -> None:
        await self._listen()

    def share(self, slot_table: SlotTable) -> None:
        """Divides the connections among the HTTP workers from now on, if there are several."""
        if slot_table.shape.workers > 1:
            self._slot_table = slot_table
            slot_table.connections[self._worker] = 0
            self._accept_by_itself()

    def check(self, connections: int) -> None:
        """``connections``: number of open connections of this HTTP worker."""
        if self._slot_table is not None:
            self._slot_table.connections[self._worker] = connections
        if self._overloaded and self._loop.time() - self._last_long_turn > _CALM_SECONDS:
            self._overloaded = False
            self._run(self._listen())

    def pause(self) -> None:
        """New connections wait in the backlog until resume()."""
        self._paused = True
        self._stop()

    def resume(self) -> None:
        self._paused = False
        if not self._closed:
            self._run(self._listen())

    async def close(self) -> None:
        """Accepts the connections that wait in the backlog, and then no more. The clients of others are not reset.

        The kernel resets connections that have not been accepted when the last process closes the listening socket.
        reject_new_connections() must have been called a moment before.
        """
        self._closed = True
        self._stop()
        while self._accept_one():
            pass
        self._listener.close()
        if self._tasks:
            _, unfinished = await asyncio.wait(list(self._tasks), timeout=LINGER_SECONDS)
            for task in unfinished:  # handshakes
                task.cancel()
        await self._rejections.finish()

    def reject_new_connections(self) -> None:
        """For all HTTP workers: clients that begin to connect get no response, and an error once the socket is closed.

        Connections whose handshake has begun are still completed.
        """
        drop_new_connections(self._listener)

    # -- how connections are accepted

    def _turn_was_long(self) -> None:
        self._last_long_turn = self._loop.time()
        if not self._overloaded:
            self._overloaded = True
            self._accept_by_itself()

    @property
    def _uses_server(self) -> bool:
        return self._slot_table is None and self._tls is None and not self._overloaded

    async def _listen(self) -> None:
        if not self._uses_server:
            self._accept_by_itself()
        elif self._server is None:
            # It listens again, so the backlog must be that of the supervisor: it applies to the shared socket.
            socket_, backlog = self._listener.dup(), BACKLOG
            server = await self._loop.create_server(self._create_protocol, sock=socket_, backlog=backlog)
            if self._server is None and self._uses_server and not self._paused and not self._closed:
                self._server = server
                self._loop.remove_reader(self._listener)
            else:
                server.close()

    def _accept_by_itself(self) -> None:
        if not self._paused and not self._closed:
            self._stop()
            self._loop.add_reader(self._listener, self._accept)

    def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._loop.remove_reader(self._listener)

    # -- accepting by itself

    def _accept(self) -> None:
        self._opened = 0
        most_opened = 1 if self._slot_table is not None and not self._overloaded else _MOST_OPENED
        for _ in range(_MOST_PER_TURN):
            if self._has_most():
                self._loop.remove_reader(self._listener)
                self._loop.call_later(_YIELD_SECONDS, self._accept_after_yielding)
                return
            if not self._accept_one() or self._opened >= most_opened:
                return

    def _has_most(self) -> bool:
        """Whether another HTTP worker has fewer connections."""
        if self._slot_table is None:
            return False
        connections = self._slot_table.connections
        return bool(connections[self._worker] > min(connections))

    def _accept_after_yielding(self) -> None:
        """Accepts one connection if no other HTTP worker has: the others may be busy."""
        if not self._closed and not self._paused and not self._uses_server:
            self._loop.add_reader(self._listener, self._accept)
            self._accept_one()

    def _accept_one(self) -> bool:
        """Whether there was one."""
        connection = self._next()
        if connection is None:
            return False
        arrived = None
        if self._overloaded and self._tls is None:
            arrived = arrival_of(connection, time.monotonic(), self._turns.arrived())
            if arrived is not None and self._rejections.reject(connection, arrived):
                return True
        if self._slot_table is not None:
            self._slot_table.connections[self._worker] += 1
        self._opened += 1
        self._open(connection, arrived)
        return True

    def _open(self, connection: socket.socket, arrived: float | None) -> None:
        """``arrived``: the first data, monotonic seconds. None: none has arrived, or the connection has not waited."""
        if self._tls is None:
            create = partial(self._create_late, arrived) if arrived is not None else self._create_protocol
            self._run(self._loop.connect_accepted_socket(create, connection))
            return
        if len(self._tasks) >= self._tls.most_handshakes:
            oldest = next(iter(self._tasks))
            del self._tasks[oldest]
            oldest.cancel()  # closes the connection
        self._run(self._tls.connect(self._loop, self._create_protocol, connection))

    def _create_late(self, arrived: float) -> InferenceProtocol:
        protocol = self._create_protocol()
        protocol.waited(arrived)
        return protocol

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
