"""Decodes large images in a process of their own, which can be killed. A thread cannot be."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import socket
import subprocess
import time

import numpy as np

from vitserve.model.arrays import Pixels
from vitserve.model.bundle import preprocess
from vitserve.service import log_format
from vitserve.service.ipc import frames
from vitserve.service.python_process import python_command, python_environment

log = logging.getLogger(__name__)

_START_SECONDS, _EXIT_SECONDS = 60.0, 5.0
_IMAGE_ERRORS = {
    kind.__name__: kind
    for kind in (
        preprocess.DamagedImageError,
        preprocess.NotAnImageError,
        preprocess.TooComplexError,
        preprocess.TooManyPixelsError,
        preprocess.UnsupportedImageError,
    )
}


class DecodeTimeoutError(Exception):
    """The image was not decoded in time. The process was killed."""


class DecodeProcessError(Exception):
    """The process could not be started."""


class DecodeProcess:
    """Starts the process for the first image, and again after it has ended. For one thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._ready, self._started = False, 0.0  # monotonic seconds

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def decode(self, decoder: preprocess.Decoder, encoded: bytes, until: float) -> Pixels:
        """uint8 [height, width, channels]. ``until``: monotonic seconds.

        Raises ImageError, DecodeTimeoutError or DecodeProcessError.
        """
        description = json.dumps(dataclasses.asdict(decoder)).encode()
        received = self._exchange([description, encoded], until) or self._exchange([description, encoded], until)
        if received is None:
            raise preprocess.DamagedImageError("the image cannot be decoded: the decode process exited")
        if len(received) == 2:
            raise _IMAGE_ERRORS[received[0].decode()](received[1].decode())
        return np.frombuffer(received[0], np.uint8).reshape(decoder.preprocessing.shape)

    def close(self) -> None:
        """Kills the process."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _exchange(self, request: list[bytes], until: float) -> list[bytes] | None:
        """None if the process exited at this moment, because it was idle. Raises like decode()."""
        try:
            connection = self._running()
            connection.settimeout(max(0.001, until - time.monotonic()))
            if not self._ready:
                frames.receive(connection)
                self._ready = True
            frames.send(connection, request)
            return frames.receive(connection)
        except TimeoutError:
            if self._ready or time.monotonic() - self._started > _START_SECONDS:
                self.close()  # else it is still starting, for the next image
            raise DecodeTimeoutError from None
        except (EOFError, OSError):
            status = self._exit_status()
            if status == 0:
                return None
            ending = signal.Signals(-status).name if status < 0 else f"status {status}"
            log.error("the decode process ended with %s", ending)
            if not self._ready:
                raise DecodeProcessError(f"the decode process ended with {ending} while it started") from None
            raise preprocess.DamagedImageError(
                f"the image cannot be decoded: its decoder ended with {ending}"
            ) from None

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
        if self._connection is None or self._has_ended():
            self.close()
            try:
                self._connection = self._start()
            except OSError as error:  # no process or no descriptor is left
                raise DecodeProcessError(f"a decode process cannot be started: {error}") from error
        return self._connection

    def _has_ended(self) -> bool:
        """Also while the process is about to exit because it was idle."""
        assert self._connection is not None
        self._connection.setblocking(False)
        try:
            return not self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        module = "vitserve.service.http_worker.dispatch.decode_process_main"
        with theirs:
            try:
                self._process = subprocess.Popen(
                    python_command(module, str(theirs.fileno()), *log_format.arguments_of("decoder")),
                    env=python_environment(),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                )
            except OSError:
                ours.close()
                raise
        self._ready, self._started = False, time.monotonic()
        return ours
