"""HTTP/1.1 on one connection, with bounds on the size of headers, and without the requests that RFC 9112 forbids.

A request that arrives with one read pays only for a few attributes.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httptools

from vitserve.service import errors
from vitserve.service.http_worker.connections.body_clock import BodyClock
from vitserve.service.http_worker.connections.closing_protocol import MAX_DROPPED_BYTES, ClosingProtocol
from vitserve.service.http_worker.connections.head import MAX_TARGET_BYTES, check_head, check_size

log = logging.getLogger(__name__)

# The size of a chunk in 16 digits and "\r\n" twice (RFC 9112, 7.1). Further bytes around a chunk count as headers.
CHUNK_BYTES = 20
# Requests behind the one that is answered, which the client has sent without waiting. A read may have thousands.
MAX_PIPELINED = 64


class BoundedProtocol(ClosingProtocol):
    __slots__ = (
        "_arrived",
        "_backlog_arrival",
        "_body_clock",
        "_content_bytes",
        "_error",
        "_head_end",
        "_hosts",
        "_read_bytes",
        "_received_bytes",
        "_transfer_coded",
    )

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._arrived = 0.0  # the earliest time at which the latest data can have arrived, monotonic seconds
        self._backlog_arrival = 0.0  # of the first data, if it waited in the backlog with the connection
        # The request that arrives
        self._received_bytes = 0  # of it, before the latest read
        self._read_bytes = 0  # of the latest read, as far as they belong to it
        self._content_bytes = 0  # of its body, with the usual bytes around chunks
        self._head_end = b""  # the last bytes of a head that is not complete
        self._hosts, self._transfer_coded = 0, False
        self._body_clock: BodyClock | None = None
        self._error: errors.ServiceError | None = None  # raised in a callback of the parser

    # -- called by the event loop

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arrived = self.service.turns.arrived()

    def waited(self, arrived: float) -> None:
        """``arrived``: when the first data arrived, while the connection waited in the backlog; monotonic seconds."""
        self._backlog_arrival = arrived

    def data_received(self, data: bytes) -> None:
        self._arrived = self.service.turns.arrived()
        if self._backlog_arrival:
            self._arrived, self._backlog_arrival = min(self._arrived, self._backlog_arrival), 0.0
        self._heard = self.limits.next_tick
        self._read_bytes = len(data)
        if self._lingers or self._error_after_response is not None or self.transport.is_closing():
            self._drop(data)
            return
        if self._unfinished and self._in_body:
            self._continue_body()
        elif self._read_bytes > self.limits.header_bytes - self._received_bytes and not self._head_fits(data):
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self.parser.get_method() == b"CONNECT":  # it opens a tunnel, with or without an Upgrade header
                self.reject(errors.BadRequestError("the method CONNECT is not supported"))
            else:
                self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as failure:
            self._parser_failed(failure)
        else:
            if self._unfinished:
                self._part_received(data)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Handles the request as HTTP/1.1 (RFC 9110, 7.8): clients offer HTTP/2 with their first request.

        The parser stops after the headers of a request with an Upgrade header. A new parser reads the same headers
        without it, and then the rest.
        """
        method = self.parser.get_method()
        headers = [pair for pair in self.headers if pair[0] not in (b"upgrade", b"connection", b"http2-settings")]
        lines = [b"%b %b HTTP/1.1" % (method, self.url), *(b"%b: %b" % pair for pair in headers)]
        self.parser = httptools.HttpRequestParser(self)
        self._unfinished, self._received_bytes = False, 0
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def _parser_failed(self, failure: httptools.HttpParserError) -> None:
        error, self._error = self._error, None
        cause = failure.__context__  # raised in a callback
        if error is None and cause is not None and not isinstance(cause, (httptools.HttpParserError, UnicodeError)):
            log.error("unexpected error while a request was parsed", exc_info=cause)
        self.reject(error or errors.BadRequestError("the request is not valid HTTP/1.1"))

    # -- called by the parser

    def on_message_begin(self) -> None:
        """As uvicorn's method, without the scope of ASGI, which classify requests do not need."""
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._unfinished, self._in_body = True, False
        self._content_bytes = self._hosts = 0
        self._transfer_coded = False
        self._since = self.limits.next_tick

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"host":
            self._hosts += 1
        elif name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        elif name == b"transfer-encoding":
            self._transfer_coded = True
        self.headers.append((name, value))

    def _check_head(self) -> None:
        """Call it first when the headers are complete. Raises an exception, which ends the parsing."""
        if self._unfinished_head_bytes:
            self._release_head()
        if (
            self._hosts == 1
            and not self._transfer_coded
            and self.url.startswith(b"/")
            and len(self.url) <= MAX_TARGET_BYTES
            and len(self.headers) <= self.limits.headers
        ):
            return
        try:
            check_size(self.url, self.headers, self.limits.headers)
            check_head(self.url, self.headers, self.parser.get_http_version())
        except errors.ServiceError as error:
            self._error = error
            raise

    def _start_application(self) -> None:
        """Passes the request to the ASGI application. Raises an exception, which ends the parsing."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self._error = errors.BadRequestError(f"more than {MAX_PIPELINED} requests wait for earlier responses")
            raise self._error
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()  # creates the scope
        self.headers += headers
        self.url, self.expect_100_continue = url, expects
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._content_bytes += len(body) + CHUNK_BYTES
        super().on_body(body)
        if self.cycle.response_complete:
            self._dropped_bytes += len(body)

    def _end_request(self) -> float:
        """Call it first when the body is complete. Returns the time from which the deadline counts.

        Raises an exception, which ends the parsing, if there was too much around the chunks.
        """
        if self._transfer_coded:
            self._check_framing()
        self._unfinished = False
        # If another request follows in the same read, only its later reads are counted.
        self._received_bytes = self._read_bytes = 0
        if self._body_clock is None:
            return self._arrived
        start, self._body_clock = self._body_clock.start, None
        return start

    def on_message_complete(self) -> None:
        self._end_request()
        super().on_message_complete()

    # -- requests that arrive with several reads

    def _head_fits(self, data: bytes) -> bool:
        """Rejects headers that are too large before the parser has them, because it copies them at every read."""
        room = self.limits.header_bytes - self._received_bytes
        if data.find(b"\r\n\r\n", 0, room + 4) >= 0:
            return True
        if self._received_bytes and b"\r\n\r\n" in self._head_end + data[:3]:
            return True
        self.reject(errors.HeadersTooLargeError(f"the header is larger than {self.limits.header_bytes:,} bytes"))
        return False

    def _continue_body(self) -> None:
        if self._body_clock is not None:
            self._body_clock.read(self._arrived, self.service.turns.started, self._read_bytes)

    def _part_received(self, data: bytes) -> None:
        """After a read that does not end the request."""
        try:
            if self._in_body:
                self._check_framing()
                if self._body_clock is None:
                    self._body_clock = BodyClock(self._arrived, self.service.turns.started, self._read_bytes)
            else:
                self._head_end = (self._head_end + data[-3:])[-3:]
                check_size(self.url, self.headers, self.limits.headers)
                self._keep_head(len(data))
        except errors.ServiceError as error:
            self._error = None
            self.reject(error)
            return
        self._received_bytes += self._read_bytes
        if self._dropped_bytes > MAX_DROPPED_BYTES:
            self.linger()

    def _check_framing(self) -> None:
        """Chunk extensions and trailers count as headers (RFC 9112, 7.1.1). Raises HeadersTooLargeError."""
        framing = self._received_bytes + self._read_bytes - self._content_bytes
        if framing > self.limits.header_bytes or len(self.headers) > self.limits.headers:
            self._error = errors.HeadersTooLargeError("headers, chunk extensions and trailers are too large")
            raise self._error
