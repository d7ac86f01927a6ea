"""The turns of the event loop. In one turn, the loop handles all sockets that were ready, and then looks for others.

Work that is cheaper for many requests together is done once, at the end of a turn.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable


class Turns:
    """All methods run on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.started = 0.0  # when the turn that read data last did so first
        self._arrived = 0.0
        self._read = False  # a request was read in this turn
        self._scheduled = False
        self._at_end: dict[Callable[[], None], None] = {}
        self._long = math.inf
        self._on_long: Callable[[], None] = lambda: None

    def arrived(self) -> float:
        """The earliest time at which data that is read now can have arrived, in time.monotonic() seconds.

        Data that arrives while a turn handles other sockets is read in the next turn. Under overload a turn takes many
        milliseconds, and deadlines must include them.
        """
        if not self._read:
            now = time.monotonic()
            self._arrived = self.started if self._scheduled else now
            self.started, self._read = now, True
            self._schedule()
        return self._arrived

    def at_end(self, callback: Callable[[], None]) -> None:
        """Calls ``callback`` once at the end of this turn, however often it is passed."""
        self._at_end[callback] = None
        self._schedule()

    def on_long_turn(self, seconds: float, callback: Callable[[], None]) -> None:
        """Calls ``callback`` after each turn that read requests and took longer than ``seconds``."""
        self._long, self._on_long = seconds, callback

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._end)

    def _end(self) -> None:
        """Runs once more after the last turn that read something, so that arrived() knows when the loop was idle."""
        callbacks, self._at_end = self._at_end, {}
        for callback in callbacks:
            callback()
        if self._read and time.monotonic() - self.started > self._long:
            self._on_long()
        again, self._read, self._scheduled = self._read or bool(self._at_end), False, False
        if again:
            self._schedule()
