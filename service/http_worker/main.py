"""A process that speaks HTTP and decodes images.

python -m vitserve.service.http_worker.main <file descriptor of the control channel>
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from vitserve.service.http_worker.acceptor import Acceptor
from vitserve.service.http_worker.app import create_app
from vitserve.service.http_worker.connections.backlog_rejection import BacklogRejections
from vitserve.service.http_worker.connections.capacity import Capacity
from vitserve.service.http_worker.connections.limits import LINGER_SECONDS, ConnectionLimits, open_files_limit
from vitserve.service.http_worker.connections.rejections import Rejections
from vitserve.service.http_worker.connections.tls import Tls
from vitserve.service.http_worker.dispatch.decoding import preload
from vitserve.service.http_worker.protocol import InferenceProtocol, operations_by_path, protocol_class
from vitserve.service.http_worker.state import State
from vitserve.service.ipc.child_runtime import start_child
from vitserve.service.ipc.control_messages import StartHttpWorker
from vitserve.service.metrics import in_files

if TYPE_CHECKING:
    from vitserve.service.http_worker.rpc.server import RpcServer

# Requests allocate few objects in cycles. With Python's default of 700 objects, collections take 3% of the time.
GC_THRESHOLD = 10_000
_HANDSHAKE_SECONDS = 0.1  # for handshakes that have begun when new connections are no longer accepted
_DRAIN_INTERVAL_SECONDS = 0.05


class _Server(uvicorn.Server):
    """Stops when the supervisor orders a drain, instead of after a signal."""

    def __init__(
        self, config: uvicorn.Config, state: State, listener: socket.socket, admin_listeners: Sequence[socket.socket]
    ) -> None:
        super().__init__(config)
        self._state, self._listener, self._admin_listeners = state, listener, admin_listeners
        self._limits = ConnectionLimits(state.settings, open_files_limit())
        self._rejections = Rejections()
        self._capacity = Capacity(self._limits, self.server_state.connections)
        self._protocol = protocol_class(state, self._limits, self._capacity, self._rejections)
        self._checked = time.monotonic()
        self._rpc: Callable[[], RpcServer] | None = None

    def add_rpc(self, server_class: type[RpcServer], host: str) -> None:
        """``host``: a numeric address. The server needs the running event loop."""
        self._rpc = lambda: server_class(self._state, self._limits, host)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to the whole process group, such as Ctrl-C, is handled by the supervisor."""

    async def main_loop(self) -> None:
        """Uvicorn's own loop wakes ten times a second to check whether to stop."""
        tls = Tls(self._state.settings, self._limits) if self._state.settings.tls_certificate else None
        operations, default_headers = operations_by_path(self._state), self.server_state.default_headers
        rejections = BacklogRejections(self._state, self._limits, operations, default_headers)
        state = self._state
        acceptor = Acceptor(self._listener, state.worker, state.turns, self._create_protocol, rejections, tls)
        await acceptor.start()
        loop, options = asyncio.get_running_loop(), {} if tls is None else tls.options
        admin = [
            await loop.create_server(self._create_protocol, sock=listener, **options)
            for listener in self._admin_listeners
        ]
        rpc = None if self._rpc is None else self._rpc()
        if rpc is not None:
            await rpc.start()
        self._capacity.control(acceptor.pause, acceptor.resume)
        self._state.on_slot_table(acceptor.share)
        while not self._state.draining.is_set():
            await self.on_tick(0)  # sets the Date header
            acceptor.check(len(self.server_state.connections))
            self._check_connections()
            if tls is not None:
                tls.certificate.refresh()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.interval):
                    await self._state.draining.wait()
        await asyncio.gather(self._drain(acceptor, admin), *([] if rpc is None else [rpc.drain()]))

    async def _drain(self, acceptor: Acceptor, admin: Sequence[asyncio.Server]) -> None:
        """Ends when every complete request has its response. Others do not hold it up.

        Connections, new ones too, are served for another moment, for clients that were about to send a request.
        """
        ends = time.monotonic() + LINGER_SECONDS
        while self.server_state.connections and time.monotonic() < ends:
            await asyncio.sleep(_DRAIN_INTERVAL_SECONDS)
        acceptor.reject_new_connections()
        await asyncio.sleep(_HANDSHAKE_SECONDS)
        await acceptor.close()
        for server in admin:
            server.close()
        self._limits.drain()
        while self.server_state.connections:
            self._check_connections()
            await asyncio.sleep(_DRAIN_INTERVAL_SECONDS)
        self._rejections.log()

    def _create_protocol(self) -> InferenceProtocol:
        return self._protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def _check_connections(self) -> None:
        now = time.monotonic()
        self._limits.tick(now - self._checked)
        self._checked = now
        for connection in list(self.server_state.connections):
            if isinstance(connection, InferenceProtocol):
                connection.check()
        self._rejections.log()


def main() -> None:
    channel, start, descriptors = start_child(StartHttpWorker)
    preload(start.settings)
    metrics = in_files(start.process)
    state = State(start.settings, channel, metrics, start.worker, start.incarnation, start.decode_threads)
    config = uvicorn.Config(
        create_app(state),
        log_config=None,
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        ws="none",
    )
    rpc_server = _rpc_server_class() if start.settings.grpc_port else None
    gc.freeze()  # or full collections would scan all these objects and stop the event loop for tens of milliseconds
    listener, *admin_listeners = (socket.socket(fileno=descriptor) for descriptor in descriptors)
    gc.set_threshold(GC_THRESHOLD)
    server = _Server(config, state, listener, admin_listeners)
    if rpc_server is not None:
        server.add_rpc(rpc_server, listener.getsockname()[0])
    server.run(sockets=[])


def _rpc_server_class() -> type[RpcServer]:
    """The extra ``grpc`` is installed only where it is used."""
    from vitserve.service.http_worker.rpc.server import RpcServer

    return RpcServer


if __name__ == "__main__":
    main()
