"""Makes room for new connections when there are too many: the one that has waited longest for its client is closed.

So idle and slow clients, however many there are, take the connections of each other and not those of others. A new
connection is always accepted, and closed only after as many newer ones as the limit allows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from vitserve.service.http_worker.connections.limits import EXTRA_CONNECTIONS, ConnectionLimits

_SHARE = 16  # one of so many connections is closed at a time, so that looking for them is cheap on average


class Evictable(Protocol):
    crowded: bool

    def evictable(self) -> tuple[int, float, int] | None: ...

    def evict(self) -> None: ...


class Capacity:
    """All methods run on the event loop."""

    def __init__(self, limits: ConnectionLimits, connections: Collection[object]) -> None:
        """``connections``: the open ones, each an Evictable."""
        self._limits, self._connections = limits, connections
        self._closing: set[Evictable] = set()  # evicted, but still open
        self._paused = False
        self._pause: Callable[[], None] = lambda: None
        self._resume: Callable[[], None] = lambda: None

    def control(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        """``pause`` stops accepting connections; ``resume`` begins again."""
        self._pause, self._resume = pause, resume

    def joined(self, connection: Evictable) -> None:
        """Call it for every new connection, which is in ``connections`` already."""
        if len(self._connections) > self._limits.connections:
            self._make_room(connection)

    def left(self, connection: Evictable) -> None:
        """Call it for every closed connection, which is no longer in ``connections``."""
        self._closing.discard(connection)
        if self._paused and len(self._connections) <= self._limits.connections:
            self._paused = False
            self._resume()

    def _make_room(self, newcomer: Evictable) -> None:
        if len(self._connections) - len(self._closing) <= self._limits.connections:
            return
        candidates = self._candidates(newcomer)
        for _, connection in candidates[: max(1, self._limits.connections // _SHARE)]:
            self._closing.add(connection)
            connection.evict()
        if not candidates:
            newcomer.crowded = True
            if not self._paused and len(self._connections) >= self._limits.connections + EXTRA_CONNECTIONS:
                self._paused = True
                self._pause()

    def _candidates(self, newcomer: Evictable) -> list[tuple[tuple[int, float, int], Evictable]]:
        """Those that wait for their clients, the longest wait first."""
        candidates = []
        for connection in self._connections:
            if connection is not newcomer and connection not in self._closing:
                order = connection.evictable()  # type: ignore[attr-defined]  # uvicorn's set of any protocols
                if order is not None:
                    candidates.append((order, connection))
        candidates.sort(key=lambda candidate: candidate[0])
        return candidates  # type: ignore[return-value]
