"""HTTP/1.1 on one connection. Requests with images are handled here, all others by the ASGI application.

An ASGI request costs a task, an event, a timer and two writes. For a small image that is as much as all other work, so
requests with images skip it. Only pipelined ones, which are rare, are handled by the application.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from vitserve.service import errors
from vitserve.service.http_worker.connections.bounded_protocol import CHUNK_BYTES
from vitserve.service.http_worker.connections.capacity import Capacity
from vitserve.service.http_worker.connections.limits import ConnectionLimits
from vitserve.service.http_worker.connections.rejections import Rejections
from vitserve.service.http_worker.connections.timed_protocol import TimedProtocol
from vitserve.service.http_worker.inference.call import InferenceCall
from vitserve.service.http_worker.inference.operations import CLASSIFY, EMBED, Operation
from vitserve.service.http_worker.inference.response import Response
from vitserve.service.http_worker.state import State

# After a response that is sent before the body has arrived, a body of up to this size is read and dropped, and the
# connection is kept. After a larger one it is closed, but not at once: see linger().
_MAX_DROPPED_BYTES = 1_048_576
_SHORTEST_GAP_SECONDS = 1.0  # networks lose packets, and send them again


class _Exchange:
    """A request with images and its response, with the attributes of RequestResponseCycle that uvicorn uses."""

    __slots__ = ("body_complete", "call", "disconnected", "keep_alive", "message_event", "response_complete")

    def __init__(self, keep_alive: bool, message_event: asyncio.Event) -> None:
        self.keep_alive, self.message_event = keep_alive, message_event
        self.body_complete = self.response_complete = self.disconnected = False
        self.call: InferenceCall | None = None


class InferenceProtocol(TimedProtocol):
    """Pass a subclass with the attributes of ClosingProtocol and ``operations`` to uvicorn: protocol_class()."""

    __slots__ = ("_exchange",)

    operations: Mapping[bytes, Operation]  # by path
    _unused_event = asyncio.Event()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._exchange: _Exchange | None = None  # the latest request that is handled here

    def connection_lost(self, exc: Exception | None) -> None:
        if self._exchange is not None and self._exchange.call is not None:
            self._exchange.call.cancel()
        super().connection_lost(exc)

    # -- called by the parser

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # see _ignore_upgrade()
        self._check_head()
        path, _, query = self.url.partition(b"?")
        idle = self.cycle is None or self.cycle.response_complete
        operation = self.operations.get(path)
        if operation is None or not idle or self.parser.get_method() != b"POST":
            self._start_application()
        else:
            self._start_call(operation, query)
        self._in_body = True

    def _start_call(self, operation: Operation, query: bytes) -> None:
        keep_alive = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        exchange = self._exchange = _Exchange(keep_alive and not self.crowded, self._unused_event)
        self.cycle = cast(RequestResponseCycle, exchange)
        exchange.call = InferenceCall(self.service, operation, self._respond)
        if self.crowded:
            exchange.call.fail(errors.TooManyConnectionsError("there are too many connections"))
            return
        exchange.call.begin(query, self.headers, self._arrived, self.client, self.expect_100_continue)
        if self.expect_100_continue and not exchange.call.decided:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        call = self._current_call()
        if call is None:
            super().on_body(body)
            return
        self._content_bytes += len(body) + CHUNK_BYTES
        if not call.finished:
            call.receive(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        call = self._current_call()
        if call is None:
            super().on_message_complete()
            return
        arrived = self._end_request()
        assert self._exchange is not None
        self._exchange.body_complete = True
        if not call.finished:
            call.end(arrived)
        elif not self._exchange.keep_alive:
            self.linger()

    def _current_call(self) -> InferenceCall | None:
        """None if the application handles the request whose body arrives."""
        exchange = self._exchange
        return exchange.call if exchange is not None and cast(object, self.cycle) is exchange else None

    def _gap_seconds(self) -> float:
        """A client that waits for a shorter time has given up when its body pauses for longer."""
        call, seconds = self._current_call(), super()._gap_seconds()
        if call is None or call.timeout_seconds is None:
            return seconds
        return min(seconds, max(_SHORTEST_GAP_SECONDS, call.timeout_seconds))

    def _reject_body(self, error: errors.ServiceError) -> None:
        call = self._current_call()
        if call is None or call.finished:
            super()._reject_body(error)
            return
        assert self._exchange is not None
        self._exchange.keep_alive = False
        self.rejections.record(error, self.client, None)  # the call is counted as one of its route
        call.fail(error)

    # -- the response

    def _respond(self, response: Response) -> None:
        exchange = self._exchange
        assert exchange is not None
        if self.transport.is_closing():  # the client has disconnected, which connection_lost() will report
            return
        draining = self.service.draining.is_set()
        if draining or not (exchange.body_complete or self._drops_body()):
            exchange.keep_alive = False
        self._write_response(response, exchange.keep_alive)
        exchange.response_complete = True
        if exchange.keep_alive:
            self.on_response_complete()
        elif exchange.body_complete and not draining:
            self.transport.close()
        else:
            self.linger()

    def _drops_body(self) -> bool:
        """Whether a body that has not arrived yet is read and dropped. A client that waits for 100 may not send it."""
        length = next((int(value) for name, value in self.headers if name == b"content-length"), None)
        return length is not None and length <= _MAX_DROPPED_BYTES and not self.expect_100_continue

    def on_response_complete(self) -> None:
        """As uvicorn's method, without a timer for each response, see check(), and with a bounded pipeline.

        Uvicorn reads on after each response, although the pipeline holds further requests.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self._error_after_response is not None:
            self._send_problem(self._error_after_response)
        else:
            self.flow.resume_reading()

    def _unset_keepalive_if_required(self) -> None:
        """There is no timer: see check()."""


def protocol_class(
    state: State, limits: ConnectionLimits, capacity: Capacity, rejections: Rejections
) -> type[InferenceProtocol]:
    """The class of the connections of this HTTP worker."""
    shared = {"service": state, "limits": limits, "capacity": capacity, "rejections": rejections}
    return type("Protocol", (InferenceProtocol,), {**shared, "operations": operations_by_path(state)})


def operations_by_path(state: State) -> dict[bytes, Operation]:
    return {
        f"{prefix}{operation.route}{slash}".encode(): operation
        for operation in (CLASSIFY, EMBED)
        for prefix in ("", state.settings.root_path)
        for slash in ("", "/")
    }
