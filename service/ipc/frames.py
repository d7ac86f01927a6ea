"""Messages of any size over a stream socket: the number of parts, then each part after its length.

Both processes belong to vitserve, so the lengths are trusted.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

_NUMBER = struct.Struct("<Q")


def send(endpoint: socket.socket, parts: Sequence[bytes]) -> None:
    """Raises OSError: TimeoutError if the socket has a timeout and it expires."""
    endpoint.sendall(_NUMBER.pack(len(parts)) + b"".join(_NUMBER.pack(len(part)) for part in parts))
    for part in parts:
        endpoint.sendall(part)


def receive(endpoint: socket.socket) -> list[bytes]:
    """Raises EOFError if the other process has closed the connection, OSError as send() does."""
    (count,) = _NUMBER.unpack(_exactly(endpoint, _NUMBER.size))
    lengths = struct.unpack(f"<{count}Q", _exactly(endpoint, count * _NUMBER.size))
    return [_exactly(endpoint, length) for length in lengths]


def _exactly(endpoint: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        received = endpoint.recv_into(view)
        if not received:
            raise EOFError("the connection was closed")
        view = view[received:]
    return bytes(data)
