"""A process that speaks HTTP and decodes images.

python -m vitserve.service.http_worker.main <descriptor of the supervisor's channel>
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from types import FrameType

import uvicorn

from vitserve.service.http_worker.app import create_app
from vitserve.service.http_worker.decoding import preload
from vitserve.service.http_worker.state import State
from vitserve.service.ipc.control_channel import start_child
from vitserve.service.metrics import in_files
from vitserve.service.settings import Settings

# Longer than the 60 s that balancers keep an idle connection: they are to close it, not we under a request that is on its way.
KEEP_ALIVE_SECONDS = 75
LINGER_SECONDS = 1.0  # a client about to use a connection that it kept finds it open for so long after the drain began


class _Server(uvicorn.Server):
    """Uvicorn that stops when the supervisor says so; signals are not for it."""

    def __init__(self, config: uvicorn.Config, state: State) -> None:
        super().__init__(config)
        self._state = state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal that reached the whole group, Ctrl-C say, has reached the supervisor too."""

    async def main_loop(self) -> None:
        """Uvicorn's own wakes ten times a second to look whether it should end."""
        while not self._state.draining.is_set():
            await self.on_tick(0)  # sets the Date header
            try:
                async with asyncio.timeout(1.0):
                    await self._state.draining.wait()
            except TimeoutError:
                continue
        ends = asyncio.get_running_loop().time() + LINGER_SECONDS
        while self.server_state.connections and asyncio.get_running_loop().time() < ends:
            await asyncio.sleep(0.02)


def main() -> None:
    channel, opening, descriptors = start_child()
    # It warns of every malformed form; our answer says so already, and a client shall not write to our log.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    settings = Settings(**opening["settings"])
    preload(settings)
    state = State(
        settings,
        channel,
        in_files(opening["process"]),
        opening["worker"],
        opening["incarnation"],
        opening["decode_threads"],
    )
    config = uvicorn.Config(
        create_app(state),
        log_config=None,
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    gc.freeze()  # what has been made by now stays; to look through it again and again for garbage would stop the loop for tens of milliseconds
    _Server(config, state).run([socket.socket(fileno=descriptors[0])])


if __name__ == "__main__":
    main()
