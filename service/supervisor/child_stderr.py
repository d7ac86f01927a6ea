"""The standard error of a child process. The setting log_format chooses: inherited, or made into JSON log lines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys

from vitserve.service.log_format import FieldsMessage, is_json_line

log = logging.getLogger("vitserve.stderr")
log.setLevel(logging.WARNING)  # whatever the setting log_level is

MOST_LINE_BYTES = 8192  # longer lines are divided
_READ_BYTES = 65536


def stderr_of(process: str, log_format: str) -> InheritedStderr:
    """Call start() when the child runs, and close() when it has exited."""
    return LoggedStderr(process) if log_format == "json" else InheritedStderr()


class InheritedStderr:
    """That of the supervisor."""

    descriptor: int | None = None  # the child's standard error; None: the supervisor's
    log_descriptors: tuple[int, ...] = ()  # for the child's own log lines

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass


class LoggedStderr(InheritedStderr):
    """A pipe. Each line, of a native library for example, becomes a log line of the supervisor.

    The supervisor has the other end, so the last words of a process that crashes are not lost. The child writes its own
    log lines to the log itself.
    """

    def __init__(self, process: str) -> None:
        self._process, self._rest = process, b""  # the rest: a line whose end has not arrived
        self._readable, self.descriptor = os.pipe()
        self.log_descriptors = (os.dup(sys.stderr.fileno()),)
        os.set_blocking(self._readable, False)

    def start(self) -> None:
        """Closes the child's descriptors here, and reads from now on."""
        assert self.descriptor is not None
        for descriptor in (self.descriptor, *self.log_descriptors):
            os.close(descriptor)
        asyncio.get_running_loop().add_reader(self._readable, self._read)

    def close(self) -> None:
        """Logs the rest."""
        while self._read():
            pass
        self._end()

    def _read(self) -> bool:
        """Returns whether there may be more."""
        try:
            received = os.read(self._readable, _READ_BYTES) if self._readable >= 0 else b""
        except BlockingIOError:
            return False
        if not received:
            self._end()
            return False
        *lines, self._rest = (self._rest + received).split(b"\n")
        for line in lines:
            self._log(line)
        if len(self._rest) >= MOST_LINE_BYTES:
            self._log(self._rest)
            self._rest = b""
        return True

    def _end(self) -> None:
        if self._readable >= 0:
            asyncio.get_running_loop().remove_reader(self._readable)
            os.close(self._readable)
            self._readable = -1
            self._log(self._rest)

    def _log(self, line: bytes) -> None:
        if is_json_line(line):  # of a process that the child has started
            with contextlib.suppress(OSError):
                sys.stderr.write(line.decode("ascii") + "\n")
                sys.stderr.flush()
            return
        for start in range(0, len(line), MOST_LINE_BYTES):
            text = line[start : start + MOST_LINE_BYTES].decode("utf-8", "backslashreplace").rstrip()
            if text:
                log.warning(FieldsMessage(text, {"process": self._process}))
