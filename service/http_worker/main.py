"""A process that speaks HTTP and decodes images.

python -m vitserve.service.http_worker.main <file descriptor of the control channel>
"""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections.abc import Sequence
from types import FrameType

import uvicorn

from vitserve.service.http_worker.acceptor import Acceptor
from vitserve.service.http_worker.app import create_app
from vitserve.service.http_worker.dispatch.decoding import preload
from vitserve.service.http_worker.protocol import ClassifyProtocol, protocol_class
from vitserve.service.http_worker.state import State
from vitserve.service.ipc.child_runtime import start_child
from vitserve.service.ipc.control_messages import StartHttpWorker
from vitserve.service.metrics import in_files

# Longer than the 60 s of load balancers, which should close an idle connection first: if the server closed it, a
# request could already be on its way.
KEEP_ALIVE_SECONDS = 75
# Requests allocate few objects in cycles. With Python's default of 700 objects, collections take 3% of the time.
GC_THRESHOLD = 10_000
LINGER_SECONDS = 1.0  # after a drain began, idle connections stay open this long for requests that are on their way


class _Server(uvicorn.Server):
    """Stops when the supervisor orders a drain, instead of after a signal."""

    def __init__(
        self, config: uvicorn.Config, state: State, listener: socket.socket, admin_listeners: Sequence[socket.socket]
    ) -> None:
        super().__init__(config)
        self._state, self._listener, self._admin_listeners = state, listener, admin_listeners
        self._protocol = protocol_class(state)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to the whole process group, such as Ctrl-C, is handled by the supervisor."""

    async def main_loop(self) -> None:
        """Uvicorn's own loop wakes ten times a second to check whether to stop."""
        acceptor = Acceptor(self._listener, self._state.worker, self._state.turns, self._create_protocol)
        await acceptor.start()
        loop = asyncio.get_running_loop()
        admin = [await loop.create_server(self._create_protocol, sock=socket) for socket in self._admin_listeners]
        self._state.on_slot_table(acceptor.share)
        while not self._state.draining.is_set():
            await self.on_tick(0)  # sets the Date header
            acceptor.check(len(self.server_state.connections))
            self._close_idle_connections()
            try:
                async with asyncio.timeout(1.0):
                    await self._state.draining.wait()
            except TimeoutError:
                continue
        ends = asyncio.get_running_loop().time() + LINGER_SECONDS
        while self.server_state.connections and asyncio.get_running_loop().time() < ends:
            await asyncio.sleep(0.02)
        acceptor.close()
        for server in admin:
            server.close()

    def _create_protocol(self) -> asyncio.Protocol:
        return self._protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def _close_idle_connections(self) -> None:
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            if isinstance(connection, ClassifyProtocol):
                connection.close_if_idle(now, KEEP_ALIVE_SECONDS)


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
    gc.freeze()  # or full collections would scan all these objects and stop the event loop for tens of milliseconds
    listener, *admin_listeners = (socket.socket(fileno=descriptor) for descriptor in descriptors)
    gc.set_threshold(GC_THRESHOLD)
    _Server(config, state, listener, admin_listeners).run(sockets=[])


if __name__ == "__main__":
    main()
