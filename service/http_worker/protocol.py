"""HTTP/1.1 on one connection. POST /v1/classify is handled here, all other requests by the ASGI application.

An ASGI request costs a task, an event, a timer and two writes. For a small image that is as much as all other work, so
classify requests skip it. Only pipelined ones, which are rare, are handled by the application.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from vitserve.service import errors
from vitserve.service.http_worker.classify.call import ROUTE, ClassifyCall
from vitserve.service.http_worker.classify.response import Response, problem
from vitserve.service.http_worker.exchange import request_id
from vitserve.service.http_worker.state import State

# After a response that is sent before the body has arrived, a body of up to this size is read and dropped, and the
# connection is kept. After a larger one it is closed, but not at once: closing a socket with unread data resets the
# connection, and the client may not see the response.
_MAX_DROPPED_BYTES = 1_048_576
_LINGER_SECONDS = 1.0


class _Exchange:
    """A classify request and its response. Has the attributes of uvicorn's RequestResponseCycle that uvicorn uses."""

    __slots__ = ("body_complete", "call", "disconnected", "keep_alive", "message_event", "response_complete")

    def __init__(self, keep_alive: bool, message_event: asyncio.Event) -> None:
        self.keep_alive, self.message_event = keep_alive, message_event
        self.body_complete = self.response_complete = self.disconnected = False
        self.call: ClassifyCall | None = None


class ClassifyProtocol(HttpToolsProtocol):
    """Pass a subclass with ``service`` and ``classify_paths`` to uvicorn: see protocol_class()."""

    service: State
    classify_paths: frozenset[bytes]
    _unused_event = asyncio.Event()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._exchange: _Exchange | None = None  # the latest classify request that is handled here
        self._arrived = 0.0

    def close_if_idle(self, now: float, seconds: float) -> None:
        """Closes the connection if it has been waiting for a request for more than ``seconds``."""
        waiting = self.cycle is None or self.cycle.response_complete
        if waiting and now - self._arrived > seconds and not self.transport.is_closing():
            self.transport.close()

    # -- called by the event loop

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arrived = self.service.turns.arrived()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._exchange is not None and self._exchange.call is not None:
            self._exchange.call.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._arrived = self.service.turns.arrived()
        if self.transport.is_closing():
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self.parser.get_method() == b"CONNECT":  # it opens a tunnel, with or without an Upgrade header
                self.send_400_response("the method CONNECT is not supported")
            else:
                self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("the request is not valid HTTP/1.1")

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Handles the request as HTTP/1.1 (RFC 9110, 7.8): clients offer HTTP/2 with their first request.

        The parser stops after the headers of a request with an Upgrade header. A new parser reads the same headers
        without it, and then the rest.
        """
        method = self.parser.get_method()
        headers = [pair for pair in self.headers if pair[0] not in (b"upgrade", b"connection", b"http2-settings")]
        lines = [b"%b %b HTTP/1.1" % (method, self.url), *(b"%b: %b" % pair for pair in headers)]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    # -- called by the parser

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # see _ignore_upgrade()
        path, _, query = self.url.partition(b"?")
        idle = self.cycle is None or self.cycle.response_complete
        if path not in self.classify_paths or not idle or self.parser.get_method() != b"POST":
            super().on_headers_complete()
            return
        keep_alive = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        exchange = self._exchange = _Exchange(keep_alive, self._unused_event)
        self.cycle = cast(RequestResponseCycle, exchange)
        exchange.call = ClassifyCall(self.service, self._respond)
        exchange.call.begin(query, self.headers, self._arrived, self.client, self.expect_100_continue)
        if self.expect_100_continue and not exchange.call.finished:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        call = self._current_call()
        if call is None:
            super().on_body(body)
        elif not call.finished:
            call.receive(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        call = self._current_call()
        if call is None:
            super().on_message_complete()
            return
        assert self._exchange is not None
        self._exchange.body_complete = True
        if not call.finished:
            call.end()
        elif not self._exchange.keep_alive:
            self.transport.close()

    def _current_call(self) -> ClassifyCall | None:
        """None if the application handles the request whose body arrives."""
        exchange = self._exchange
        return exchange.call if exchange is not None and cast(object, self.cycle) is exchange else None

    # -- the response

    def _respond(self, response: Response) -> None:
        exchange = self._exchange
        assert exchange is not None
        if self.transport.is_closing():  # the client has disconnected, which connection_lost() will report
            return
        if self.service.draining.is_set() or not (exchange.body_complete or self._drops_body()):
            exchange.keep_alive = False
        self._write(response, exchange.keep_alive)
        exchange.response_complete = True
        if exchange.keep_alive:
            self.on_response_complete()
        elif exchange.body_complete:
            self.transport.close()
        else:
            self.transport.write_eof()
            self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def _write(self, response: Response, keep_alive: bool) -> None:
        content = [STATUS_LINE[response.status]]
        for name, value in (*self.server_state.default_headers, *response.headers):
            content += (name, b": ", value, b"\r\n")
        if not keep_alive:
            content.append(b"connection: close\r\n")
        content.append(b"content-length: %d\r\n\r\n" % len(response.body))
        content.append(response.body)
        self.transport.write(b"".join(content))

    def send_400_response(self, msg: str) -> None:
        """For a request that cannot be parsed."""
        error = errors.BadRequestError(msg)
        response, identifier = problem(error), request_id.new()
        response.headers.append((request_id.HEADER, identifier))
        if self.service.request_log.on:
            self.service.request_log.write(identifier, self.client, "-", "", error.status, error.code, 0.0)
        self._write(response, keep_alive=False)
        self.transport.close()

    def _drops_body(self) -> bool:
        """Whether a body that has not arrived yet is read and dropped. A client that waits for 100 may not send it."""
        length = next((int(value) for name, value in self.headers if name == b"content-length"), None)
        return length is not None and length <= _MAX_DROPPED_BYTES and not self.expect_100_continue

    def on_response_complete(self) -> None:
        """As uvicorn's method, without a timer for each response: see close_if_idle()."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)

    def _unset_keepalive_if_required(self) -> None:
        """There is no timer: see close_if_idle()."""


def protocol_class(state: State) -> type[ClassifyProtocol]:
    """The class that uvicorn creates for each connection."""
    prefixes = ("", state.settings.root_path)
    paths = frozenset(f"{prefix}{ROUTE}{slash}".encode() for prefix in prefixes for slash in ("", "/"))
    return type("Protocol", (ClassifyProtocol,), {"service": state, "classify_paths": paths})
