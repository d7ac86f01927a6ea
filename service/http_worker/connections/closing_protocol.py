"""HTTP/1.1 on one connection: how a request is rejected before it reaches a route, and how the connection is closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from vitserve.service import errors
from vitserve.service.http_worker.connections.capacity import Capacity
from vitserve.service.http_worker.connections.head import Header
from vitserve.service.http_worker.connections.limits import MAX_UNFINISHED_HEAD_BYTES, ConnectionLimits
from vitserve.service.http_worker.connections.rejections import Rejections
from vitserve.service.http_worker.exchange import request_id
from vitserve.service.http_worker.inference.response import Response, problem
from vitserve.service.http_worker.state import State

# A client that sends more than this after its response is disconnected at once. Less is read and dropped: closing a
# socket with unread data resets the connection, and the client may not see the response.
MAX_DROPPED_BYTES = 8_388_608


def response_bytes(response: Response, headers: Sequence[Header], keep_alive: bool) -> bytes:
    """``headers``: of every response."""
    content = [STATUS_LINE[response.status]]
    for name, value in (*headers, *response.headers):
        content += (name, b": ", value, b"\r\n")
    if not keep_alive:
        content.append(b"connection: close\r\n")
    content.append(b"content-length: %d\r\n\r\n" % len(response.body))
    content.append(response.body)
    return b"".join(content)


class ClosingProtocol(HttpToolsProtocol):
    """Extends uvicorn's protocol class.

    It and its subclasses have __slots__: CPython accesses the attributes of an object with more than 30 of them in its
    dictionary more slowly.
    """

    __slots__ = (
        "_dropped_bytes",
        "_error_after_response",
        "_heard",
        "_in_body",
        "_lingers",
        "_since",
        "_unfinished",
        "_unfinished_head_bytes",
    )

    service: State
    limits: ConnectionLimits
    capacity: Capacity
    rejections: Rejections

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Times of the limits' clock
        self._heard = self.limits.next_tick  # data arrived, or a response was still to be sent
        self._since = self.limits.next_tick  # the connection, its latest request, or lingering began
        self._unfinished = self._in_body = False  # a request has not arrived completely; its headers have
        self._error_after_response: errors.ServiceError | None = None
        self._lingers = False
        self._dropped_bytes = 0
        self._unfinished_head_bytes = 0  # see ConnectionLimits

    def connection_lost(self, exc: Exception | None) -> None:
        self._release_head()
        super().connection_lost(exc)

    def _keep_head(self, length: int) -> None:
        """Raises TooManyConnectionsError if the unfinished headers of all connections are too large together."""
        self._unfinished_head_bytes += length
        self.limits.unfinished_head_bytes += length
        if self.limits.unfinished_head_bytes > MAX_UNFINISHED_HEAD_BYTES:
            raise errors.TooManyConnectionsError("too many clients send large headers slowly")

    def _release_head(self) -> None:
        self.limits.unfinished_head_bytes -= self._unfinished_head_bytes
        self._unfinished_head_bytes = 0

    def reject(self, error: errors.ServiceError) -> None:
        """Responds to the request that arrives, if that is still possible, and closes the connection."""
        if self._unfinished and self._in_body:
            self._reject_body(error)
        elif self.cycle is None or self.cycle.response_complete:
            self._send_problem(error)
        else:  # an earlier request gets its response first
            self._error_after_response = error
            self.flow.pause_reading()

    def _reject_body(self, error: errors.ServiceError) -> None:
        """The request is with the application, or has been answered."""
        cycle = self.cycle
        if cycle.response_complete:
            self.linger()
        elif self.pipeline:  # an earlier request gets its response first
            self.pipeline.popleft()
            self._error_after_response = error
        elif cycle.response_started:
            cycle.keep_alive = False
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            self._send_problem(error, is_counted=True)  # by its route, as one whose client has left

    def _send_problem(self, error: errors.ServiceError, is_counted: bool = False) -> None:
        self.rejections.record(error, self.client, None if is_counted else self.service.metrics)
        response, identifier = problem(error), request_id.new()
        response.headers.append((request_id.HEADER, identifier))
        if self.service.request_log.on:
            self.service.request_log.write(identifier, self.client, "-", "", error.status, error.code, 0.0)
        self._write_response(response, keep_alive=False)
        self.parser = None  # type: ignore[assignment]  # it may hold a large part of the request
        self.linger()

    def _write_response(self, response: Response, keep_alive: bool) -> None:
        self.transport.write(response_bytes(response, self.server_state.default_headers, keep_alive))

    def linger(self) -> None:
        """Sends the end of the stream, and closes the connection once the client has, or a moment later."""
        if not self._lingers and not self.transport.is_closing():
            self._lingers = True
            self._release_head()
            self._since, self._dropped_bytes = self.limits.next_tick, 0
            self.flow.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()
            elif not self._unfinished:  # TLS cannot close one direction only
                self.transport.close()

    def _drop(self, data: bytes) -> None:
        self._dropped_bytes += len(data)
        if self._dropped_bytes > MAX_DROPPED_BYTES:
            self.transport.abort()
