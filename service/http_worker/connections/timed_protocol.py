"""Bounds on the time for each part of a request, and on the number of connections.

There are no timers: check() is called for every connection about once a second, and compares the times that the
connection has noted with the limits' clock.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

from vitserve.service import errors
from vitserve.service.http_worker.connections.bounded_protocol import BoundedProtocol

_SLOW_BYTES_PER_SECOND = 4_096
_numbers = itertools.count()  # of connections: the clock has a resolution of a second
_OTHERS, _UPLOADS = 0, 1  # the order in which connections are closed when there are too many


class TimedProtocol(BoundedProtocol):
    __slots__ = ("_number", "_unsent_bytes", "crowded")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.crowded = False  # accepted although there were too many connections
        self._number = next(_numbers)
        self._unsent_bytes = 0  # of a response, at the latest check

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.capacity.joined(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.capacity.left(self)

    @property
    def _waits_for_response(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # -- time

    def check(self) -> None:
        limits, now = self.limits, self.limits.clock
        if self.transport.get_write_buffer_size():
            self._check_unsent(now)
        elif self._lingers or self.transport.is_closing():
            if now - self._since >= limits.linger_seconds:
                self.transport.abort()
        elif self._unfinished:
            self._check_unfinished(now)
        elif self._waits_for_response:
            self._heard = now
        elif cast(object, self.headers) is None:  # no request has begun
            if now - self._since >= limits.first_request_seconds:
                self.linger()
        elif now - self._heard >= limits.keep_alive_seconds:
            self.linger()

    def _check_unsent(self, now: float) -> None:
        """Disconnects a client that does not read its response."""
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent_bytes:
            self._unsent_bytes, self._heard = unsent, now
        elif now - self._heard >= self.limits.unsent_seconds:
            self.transport.abort()

    def _check_unfinished(self, now: float) -> None:
        if self.flow.read_paused:  # by us
            self._heard = self._since = now
        elif not self._in_body:
            if now - self._since >= self.limits.header_seconds:
                self._time_out(f"the headers did not arrive within {self.limits.header_seconds:g} s")
        elif now - self._heard >= self._gap_seconds():
            self._time_out(f"no byte of the body arrived for {self._gap_seconds():g} s")
        elif now - self._since >= self.limits.body_seconds:
            self._time_out(f"the request did not arrive within {self.limits.body_seconds:g} s")

    def _gap_seconds(self) -> float:
        return self.limits.body_gap_seconds

    def _time_out(self, detail: str) -> None:
        if self.limits.draining:
            self.reject(errors.NotReadyError("the service is stopping"))
        else:
            self.reject(errors.RequestTimeoutError(detail))

    # -- number of connections: see Capacity

    def evictable(self) -> tuple[int, float, int] | None:
        """The place in the order of closing, the smallest first. None while the client waits for a response."""
        if self._lingers or self.transport.is_closing():
            return _OTHERS, self._since, self._number
        if self._unfinished and not self.pipeline and (self._in_body or not self._waits_for_response):
            seconds = self.limits.clock - self._since
            slow = not self._in_body or self._content_bytes < _SLOW_BYTES_PER_SECOND * seconds
            return (_OTHERS if slow else _UPLOADS), self._since, self._number
        return None if self._waits_for_response else (_OTHERS, self._heard, self._number)

    def evict(self) -> None:
        if self._lingers or self.transport.is_closing():
            self.transport.abort()
            return
        if self._unfinished:
            self.reject(errors.TooManyConnectionsError("there are too many connections; this one was slow"))
        self.transport.close()
