"""Runs the service until it is told to stop. Imported by vitserve.py."""

from __future__ import annotations

import logging
import signal
from types import FrameType

import uvicorn

from service.app import create_app
from service.settings import Settings
from service.state import State


class _Server(uvicorn.Server):
    """Uvicorn, which tells the state of the first signal before it closes anything: not ready at once, then drained."""

    def __init__(self, config: uvicorn.Config, state: State) -> None:
        super().__init__(config)
        self._state = state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._state.draining = True
        super().handle_exit(sig, frame)


def serve(settings: Settings) -> None:
    """Blocks. Returns after SIGTERM or SIGINT, when everything admitted has been answered."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # It warns of every malformed form; our answer says so already, and a client shall not write to our log.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    app = create_app(settings)
    config = uvicorn.Config(app, settings.host, settings.port, log_config=None, access_log=False, log_level=settings.log_level)
    server = _Server(config, app.state.vitserve)
    # Uvicorn raises the signals again when it is done; an orderly stop ends with 0.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.signal(signal.SIGINT, lambda number, frame: None)
    server.run()
