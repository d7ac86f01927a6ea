"""HTTP client of the load generator: one process, asyncio, connections that stay open."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, NamedTuple, TypeVar, cast

import httptools

T = TypeVar("T")


class NoResponseError(Exception):
    """A request without a response. The message is one word for the report: timeout, disconnected or malformed."""


class ConnectionGoneError(ConnectionError):
    """No server is listening at the address."""


class Response(NamedTuple):
    status: int
    body: bytes
    keep_alive: bool  # the connection can carry another request


class ResponseReader:
    """Parses HTTP/1.1 responses with httptools. Does no I/O."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._complete: list[Response] = []
        self.on_message_begin()

    def feed(self, data: bytes) -> list[Response]:
        """Returns the responses that ``data`` completes. Raises httptools.HttpParserError."""
        self._parser.feed_data(data)
        if not self._complete:
            return []
        responses, self._complete = self._complete, []
        return responses

    def end(self) -> Response | None:
        """Returns the response that ends with the connection: one without a Content-Length that is not chunked."""
        if not self._has_headers or self._has_length:
            return None
        return Response(self._parser.get_status_code(), b"".join(self._body), False)

    # Called by httptools

    def on_message_begin(self) -> None:
        self._body: list[bytes] = []
        self._has_headers = self._has_length = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self._has_headers = True

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._has_headers = False
        status = self._parser.get_status_code()
        if status >= 200:  # 1xx responses such as "100 Continue" precede the final response
            self._complete.append(Response(status, b"".join(self._body), self._parser.should_keep_alive()))


def run(main: Coroutine[Any, Any, T]) -> T:
    """Like asyncio.run(), but with uvloop if installed. uvloop halves the CPU time for each request."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


class Client:
    """Sends each request over an idle connection. Opens another connection if all are busy."""

    def __init__(self, host: str, port: int, timeout_seconds: float = 60.0) -> None:
        self._host, self._port, self._timeout_seconds = host, port, timeout_seconds
        self._idle: list[_Connection] = []

    async def send(self, request: bytes) -> Response:
        """Sends a complete request and reads the complete response. Raises NoResponseError and ConnectionGoneError."""
        connection = await self._idle_connection()
        timer = asyncio.get_running_loop().call_later(self._timeout_seconds, connection.fail, "timeout")
        try:
            response = await connection.send(request)
        except BaseException:
            connection.abort()
            raise
        finally:
            timer.cancel()
        if response.keep_alive:
            self._idle.append(connection)
        else:
            connection.abort()
        return response

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()

    async def _idle_connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        try:
            _, opened = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        except ConnectionRefusedError as error:
            raise ConnectionGoneError(f"no server is listening on {self._host}:{self._port}") from error
        except OSError as error:
            raise NoResponseError("disconnected") from error
        return opened


class _Connection(asyncio.Protocol):
    """Carries one request at a time."""

    def __init__(self) -> None:
        self.closed = False
        self._reader = ResponseReader()
        self._pending: asyncio.Future[Response] | None = None

    def send(self, request: bytes) -> asyncio.Future[Response]:
        self._pending = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._pending

    def abort(self) -> None:
        self.closed = True
        self._transport.abort()

    def fail(self, reason: str) -> None:
        if self._pending is not None and not self._pending.done():
            self._pending.set_exception(NoResponseError(reason))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transport is not a subclass

    def data_received(self, data: bytes) -> None:
        try:
            responses = self._reader.feed(data)
        except httptools.HttpParserError:
            self.fail("malformed")
            return
        for response in responses:
            self._succeed(response)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        response = self._reader.end()
        if response is not None:
            self._succeed(response)
        self.fail("disconnected")

    def _succeed(self, response: Response) -> None:
        if self._pending is not None and not self._pending.done():
            self._pending.set_result(response)
