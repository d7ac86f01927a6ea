"""A process that answers one message with another, and that can be killed. A thread cannot be."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable

from vitserve.service.ipc import frames

_EXIT_SECONDS = 5.0


class ProcessTimeoutError(Exception):
    """There was no answer in time. The process was killed."""


class ProcessStartError(Exception):
    """The process could not be started."""


class ProcessEndedError(Exception):
    """The process ended while it worked. The text says how."""


class FramedProcess:
    """Starts the process for the first message, and again after it has ended. For one thread.

    The process sends an empty message when it is ready, and exits with status 0 when it has been idle for long.
    """

    def __init__(self, start: Callable[[int], subprocess.Popen[bytes]], start_seconds: float) -> None:
        """``start`` receives the file descriptor of the process's end of the connection. It may raise OSError."""
        self._start_process, self._start_seconds = start, start_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self.connection: socket.socket | None = None
        self._ready, self._started = False, 0.0  # monotonic seconds

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def exchange(self, message: list[bytes], until: float) -> list[bytes]:
        """``until``: monotonic seconds. Raises ProcessTimeoutError, ProcessStartError or ProcessEndedError."""
        answer = self._exchange(message, until) or self._exchange(message, until)
        if answer is None:
            raise ProcessEndedError("status 0")
        return answer

    def close(self) -> None:
        """Kills the process."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _exchange(self, message: list[bytes], until: float) -> list[bytes] | None:
        """None if the process exited at this moment, because it was idle."""
        try:
            connection = self._running()
            connection.settimeout(max(0.001, until - time.monotonic()))
            if not self._ready:
                frames.receive(connection)
                self._ready = True
            frames.send(connection, message)
            return frames.receive(connection)
        except TimeoutError:
            if self._ready or time.monotonic() - self._started > self._start_seconds:
                self.close()  # else it is still starting, for the next message
            raise ProcessTimeoutError from None
        except (EOFError, OSError):
            status = self._exit_status()
            if status == 0:
                return None
            ending = signal.Signals(-status).name if status < 0 else f"status {status}"
            if not self._ready:
                raise ProcessStartError(f"it ended with {ending} while it started") from None
            raise ProcessEndedError(ending) from None

    def _exit_status(self) -> int:
        """Of the process that has closed its connection."""
        assert self._process is not None
        try:
            return self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            self.close()

    def _running(self) -> socket.socket:
        if self.connection is None or self._has_ended():
            self.close()
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    self._process = self._start_process(theirs.fileno())
                except OSError as error:  # no process or no descriptor is left
                    ours.close()
                    raise ProcessStartError(f"it cannot be started: {error}") from error
            self.connection = ours
            self._ready, self._started = False, time.monotonic()
        return self.connection

    def _has_ended(self) -> bool:
        """Also while the process is about to exit because it was idle."""
        assert self.connection is not None
        self.connection.setblocking(False)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
