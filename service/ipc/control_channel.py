"""The channel between the supervisor and one of its child processes. control_messages.py defines the messages."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from vitserve.service.ipc.control_messages import Message, decode, encode

MAX_BYTES = 1 << 17  # of one message
MAX_DESCRIPTORS = 4  # with one message
METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"  # the environment variable that prometheus-client reads


class Channel:
    """One end of a seqpacket socket, which keeps message boundaries and carries file descriptors."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def fileno(self) -> int:
        return self._connection.fileno()

    def setblocking(self, blocking: bool) -> None:
        self._connection.setblocking(blocking)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Raises BlockingIOError if the socket's buffer is full, OSError if the peer has closed."""
        socket.send_fds(self._connection, [encode(message)], descriptors)

    def receive(self) -> tuple[Message, list[int]] | None:
        """Returns None after the peer has closed. Raises BlockingIOError if no message has arrived."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._connection, MAX_BYTES, MAX_DESCRIPTORS)
        except ConnectionResetError:
            return None
        return (decode(data), list(descriptors)) if data else None

    def close(self) -> None:
        self._connection.close()
