"""One end of the socket between a HTTP worker and an engine."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable

from vitserve.service.ipc import wire_format


class Connection:
    """Sends whole messages from any thread and never blocks: what the socket does not take now waits, until flush().

    A peer that stands still must not make others stand still. What is sent to one that has died is dropped, as if it had died a moment later.
    Messages of one thread arrive in their order. Our lock is never held while a message is sent: that gives up the interpreter lock, and
    whoever waited for ours would wait for both.
    """

    def __init__(
        self, connection: socket.socket, peer: int, peer_incarnation: int, stuck: Callable[[Connection], None]
    ) -> None:
        """``stuck`` is called, on the sending thread, when a message has to wait: flush() is due once the socket is writable."""
        connection.setblocking(False)
        self.peer, self.peer_incarnation = peer, peer_incarnation
        self._connection, self._stuck = connection, stuck
        self._lock = threading.Lock()
        self._backlog: deque[bytes] = deque()
        self._senders = (
            0  # threads that are about to send: the descriptor must not be closed, and be another's, under them
        )
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
        taken = self._taken(message)
        with self._lock:
            self._senders -= 1
            if not taken:
                self._backlog.append(message)
            first = len(self._backlog) == 1 and not taken
            self._close_if_unused()
        if first:
            self._stuck(self)

    def flush(self) -> bool:
        """Sends what waits; True when nothing does any more."""
        with self._lock:
            while self._backlog and self._taken(self._backlog[0]):
                self._backlog.popleft()
            return not self._backlog

    def receive(self) -> bytes | None:
        """The next message that is there, or None. Raises EOFError when the peer has gone."""
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

    def _taken(self, message: bytes) -> bool:
        try:
            self._connection.send(message)
        except BlockingIOError:
            return False
        except OSError:  # it has gone; whoever reads this link learns of it
            return True
        return True
