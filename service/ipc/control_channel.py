"""The channel between the supervisor and one of its child processes. control_messages.py defines the messages."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from vitserve.service.ipc.control_messages import Message, decode, encode

MAX_BYTES = 1 << 17  # of one message
MAX_DESCRIPTORS = 4  # with one message
METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"  # the environment variable that prometheus-client reads


class LostDescriptorsError(OSError):
    """File descriptors of a message were lost, because this process has reached its limit of open files.

    The message cannot be repeated: its sender has closed its own copies.
    """


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
        socket.send_fds(self._connection, [encode(message, len(descriptors))], descriptors)

    def receive(self) -> tuple[Message, list[int]] | None:
        """Returns None after the peer has closed.

        Raises BlockingIOError if no message has arrived, and LostDescriptorsError if one arrived without all of its
        descriptors: recvmsg(2) drops those for which no number is free.
        """
        try:
            data, descriptors, flags, _ = socket.recv_fds(self._connection, MAX_BYTES, MAX_DESCRIPTORS)
        except ConnectionResetError:
            return None
        if not data:
            return None
        message, sent = decode(data)
        if len(descriptors) != sent or flags & socket.MSG_CTRUNC:
            for descriptor in descriptors:
                os.close(descriptor)
            raise LostDescriptorsError(
                f"{type(message).__name__} arrived with {len(descriptors)} of {sent} file descriptors: this process "
                "has reached its limit of open files"
            )
        return message, list(descriptors)

    def close(self) -> None:
        self._connection.close()
