"""One end of the socket between an HTTP worker and an engine worker."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable

from vitserve.service.ipc import wire_format


class Connection:
    """Sends whole messages from any thread without blocking. Messages that the socket does not accept are queued.

    A slow peer therefore never blocks the sender. Messages to a peer that has exited are dropped, as if it had exited
    a moment later. The messages of one thread arrive in order.
    The lock is not held while a message is sent: sending releases the interpreter lock, and threads waiting for this
    lock would then wait for both.
    """

    def __init__(
        self, connection: socket.socket, peer: int, peer_incarnation: int, on_backlog: Callable[[Connection], None]
    ) -> None:
        """``on_backlog`` is called on the sending thread when a message is queued and none was queued before.

        Call flush() once the socket is writable.
        """
        connection.setblocking(False)
        self.peer, self.peer_incarnation = peer, peer_incarnation
        self._connection, self._on_backlog = connection, on_backlog
        self._lock = threading.Lock()
        self._backlog: deque[bytes] = deque()
        # Threads in the middle of sending. The descriptor is closed only when there are none, because its number
        # could otherwise be reused for another file.
        self._senders = 0
        self._closed = False

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: bytes) -> None:
        with self._lock:
            if self._closed:
                return
            if self._backlog:
                self._backlog.append(message)
                return
            self._senders += 1
        sent = self._try_send(message)
        with self._lock:
            self._senders -= 1
            if not sent:
                self._backlog.append(message)
            backlog_started = len(self._backlog) == 1 and not sent
            self._close_if_unused()
        if backlog_started:
            self._on_backlog(self)

    def flush(self) -> bool:
        """Sends queued messages. True if none is left."""
        with self._lock:
            while self._backlog and self._try_send(self._backlog[0]):
                self._backlog.popleft()
            return not self._backlog

    def receive(self) -> bytes | None:
        """The next message, or None if none has arrived. Raises EOFError when the peer has closed the connection."""
        try:
            message = self._connection.recv(wire_format.MAX_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise EOFError from error
        if not message:
            raise EOFError
        return message

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._closed and not self._senders:
            self._connection.close()

    def _try_send(self, message: bytes) -> bool:
        try:
            self._connection.send(message)
        except BlockingIOError:
            return False
        except OSError:  # the peer has exited, which the next receive() reports
            return True
        return True
