"""A light HTTP client that keeps its connections: one process, asyncio, raw sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from vitserve.bench.http1 import Answer, AnswerReader, MalformedResponseError

T = TypeVar("T")


class NoResponseError(Exception):
    """A request that has no answer; the message is one word for the table: timeout, broken, malformed."""


class ConnectionGoneError(ConnectionError):
    """Nobody listens there (any more)."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run(), on uvloop where it is installed: half the CPU for a request, and the service shares these cores."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


class Client:
    """Takes a connection that is idle, and opens one more where all are busy."""

    def __init__(self, host: str, port: int, timeout_seconds: float = 60.0) -> None:
        self._host, self._port, self._timeout_seconds = host, port, timeout_seconds
        self._idle: list[_Connection] = []

    async def ask(self, request: bytes) -> Answer:
        """Sends a whole request and reads the whole answer. Raises Unanswered or Gone."""
        connection = await self._taken()
        timer = asyncio.get_running_loop().call_later(self._timeout_seconds, connection.fail, "timeout")
        try:
            answer = await connection.ask(request)
        except BaseException:
            connection.abort()
            raise
        finally:
            timer.cancel()
        if answer.keeps:
            self._idle.append(connection)
        else:
            connection.abort()
        return answer

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()

    async def _taken(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.ended:
                return connection
        try:
            _, made = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        except ConnectionRefusedError as error:
            raise ConnectionGoneError(f"nobody listens at {self._host}:{self._port}: connection rejected") from error
        except OSError as error:
            raise NoResponseError("broken") from error
        return made


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self.ended = False
        self._reader = AnswerReader()
        self._awaited: asyncio.Future[Answer] | None = None

    def ask(self, request: bytes) -> asyncio.Future[Answer]:
        self._awaited = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._awaited

    def abort(self) -> None:
        self.ended = True
        self._transport.abort()

    def fail(self, word: str) -> None:
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_exception(NoResponseError(word))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        try:
            answer = self._reader.feed(data)
        except MalformedResponseError:
            self.fail("malformed")
            return
        if answer is not None and self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(answer)

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = True
        answer = self._reader.end()
        if answer is not None and self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(answer)
        self.fail("broken")
