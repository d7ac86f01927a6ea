"""Rejects requests on connections that have just been accepted, without opening them on the event loop.

Under overload, most requests are rejected from their headers. If each has a connection of its own, opening it costs
more than everything else.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import struct
import time
from collections.abc import Mapping
from typing import NamedTuple

from vitserve.service import errors
from vitserve.service.http_worker.connections.closing_protocol import MAX_DROPPED_BYTES, response_bytes
from vitserve.service.http_worker.connections.head import Header
from vitserve.service.http_worker.connections.limits import LINGER_SECONDS, ConnectionLimits
from vitserve.service.http_worker.exchange import request_id
from vitserve.service.http_worker.inference.counting import count_rejected
from vitserve.service.http_worker.inference.operations import Operation
from vitserve.service.http_worker.inference.request_parsing import DEFAULT_PRIORITY
from vitserve.service.http_worker.state import State

log = logging.getLogger(__name__)

_PEEKED_BYTES = 4_096  # headers that are larger are read on the event loop
_MOST_LINES = 256  # of different requests, remembered
# Headers, in lower case, that decide about the response, or about the number of images.
_DECISIVE = re.compile(
    rb"\r\n(?:authorization|content-encoding|expect|origin|traceparent|transfer-encoding|upgrade|vitserve-priority"
    rb"|x-request-id|content-type:[ \t]*(?:multipart/|application/json))"
)
_POLL_SECONDS = 0.005
# One of so many descriptors may belong to connections whose client has not read its response yet. They are within
# those that are kept back for the service.
_DESCRIPTORS_SHARE, _MOST_LINGERING = 32, 256
# tcpi_last_data_recv of struct tcp_info (linux/tcp.h), milliseconds since the client's latest data arrived.
_TCP_INFO_BYTES, _LAST_DATA_RECEIVED = 56, 52


class _Line(NamedTuple):
    """Of a request: its operation, and its timeout."""

    operation: Operation
    timeout_ms: int


class BacklogRejections:
    """All methods run on the event loop."""

    def __init__(
        self, state: State, limits: ConnectionLimits, operations: Mapping[bytes, Operation], headers: list[Header]
    ) -> None:
        """``headers``: of every response, a list that others update."""
        self._state, self._limits, self._operations, self._headers = state, limits, operations, headers
        self._loop = asyncio.get_running_loop()
        self._most = max(1, min(_MOST_LINGERING, limits.open_files // _DESCRIPTORS_SHARE))
        self._lingering: list[_Lingering] = []
        self._lines: dict[bytes, _Line | None] = {}
        self._polls = False
        self._scratch = bytearray(1_048_576)

    def reject(self, connection: socket.socket, arrived: float) -> bool:
        """Whether a request was rejected. Otherwise, the connection is as it was before.

        ``arrived``: see arrival_of(). Requests with headers that decide about the response are left to the event loop.
        """
        if not self._may_reject:
            return False
        began = time.monotonic()
        head = _peek(connection)
        line, fields = head[: head.find(b"\r\n")], head.lower()
        if not line.endswith(b" HTTP/1.1") or fields.count(b"\r\nhost:") != 1 or _DECISIVE.search(fields):
            return False
        request = self._remembered(line)
        dispatcher = self._state.current
        if request is None or dispatcher is None:
            return False
        error = dispatcher.admission.reject_early(arrived, request.timeout_ms, DEFAULT_PRIORITY, 1, None)
        if error is None:
            return False
        response = request.operation.problem(error)
        response.headers.append((request_id.HEADER, request_id.new()))
        self._answer(connection, response_bytes(response, self._headers, keep_alive=False))
        count_rejected(self._state.metrics, error, 1)
        self._state.count_request(request.operation.route, str(error.status), time.monotonic() - began)
        return True

    @property
    def _may_reject(self) -> bool:
        """Not where each rejection is delayed, logged, or traced, nor while too many clients still read theirs."""
        state, has_room = self._state, len(self._lingering) < self._most
        return has_room and not state.settings.api_keys and not state.request_log.on and state.tracing is None

    def _remembered(self, line: bytes) -> _Line | None:
        """The request line, read. None if the event loop must check it."""
        if line not in self._lines:
            if len(self._lines) >= _MOST_LINES:
                self._lines.clear()
            self._lines[line] = self._read(line)
        return self._lines[line]

    def _read(self, line: bytes) -> _Line | None:
        method, _, rest = line.partition(b" ")
        path, _, query = rest.removesuffix(b" HTTP/1.1").partition(b"?")
        operation = self._operations.get(path)
        if method != b"POST" or operation is None:
            return None
        try:
            return _Line(operation, operation.parse_head(query, (), self._state.settings).timeout_ms)
        except errors.ServiceError:
            return None

    def _answer(self, connection: socket.socket, content: bytes) -> None:
        lingering = _Lingering(connection, time.monotonic() + LINGER_SECONDS)
        try:
            closed = lingering.drop(self._scratch)  # makes room for a client that must send its body first
            connection.send(content, socket.MSG_DONTWAIT)
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:  # the client has disconnected, or takes no more
            log.debug("a rejected client got no response: %s", error)
            closed = True
        if closed:
            connection.close()
            return
        self._lingering.append(lingering)
        if not self._polls:
            self._polls = True
            self._loop.call_later(_POLL_SECONDS, self._poll)

    def _poll(self) -> None:
        """Closes the connections whose clients have closed them, and those that have had enough time."""
        now, remaining = time.monotonic(), list[_Lingering]()
        for lingering in self._lingering:
            if lingering.drop(self._scratch) or now >= lingering.ends:
                lingering.connection.close()
            else:
                remaining.append(lingering)
        self._lingering = remaining
        self._polls = bool(remaining)
        if self._polls:
            self._loop.call_later(_POLL_SECONDS, self._poll)

    async def finish(self) -> None:
        """Waits for the clients that have not read their responses yet."""
        while self._lingering:
            await asyncio.sleep(_POLL_SECONDS)


def arrival_of(connection: socket.socket, now: float, latest: float) -> float | None:
    """When the latest data arrived on a connection that waited in the backlog; monotonic seconds. None without data.

    ``latest``: the time to return if the system does not say.
    """
    try:
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        milliseconds: int = struct.unpack_from("I", info, _LAST_DATA_RECEIVED)[0]
    except BlockingIOError:
        return None
    except (OSError, AttributeError, struct.error):  # the client has disconnected, or this is not Linux
        return latest
    return min(latest, now - milliseconds / 1000)


class _Lingering:
    """A connection whose response has been sent."""

    __slots__ = ("_dropped", "connection", "ends")

    def __init__(self, connection: socket.socket, ends: float) -> None:
        self.connection, self.ends, self._dropped = connection, ends, 0

    def drop(self, scratch: bytearray) -> bool:
        """Drops the bytes that have arrived. True if the client has closed the connection, or sends too much.

        Linux drops the bytes without copying them (MSG_TRUNC, tcp(7)).
        """
        try:
            while count := self.connection.recv_into(scratch, 0, socket.MSG_TRUNC | socket.MSG_DONTWAIT):
                self._dropped += count
                if self._dropped > MAX_DROPPED_BYTES:
                    return True
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True


def _peek(connection: socket.socket) -> bytes:
    """The head of the request, which stays unread. Empty if it has not arrived, or is large."""
    try:
        data = connection.recv(_PEEKED_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return b""
    return data[: data.find(b"\r\n\r\n") + 1]
