"""Decodes large images in a process of their own, which can be killed. A thread cannot be."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess

import numpy as np

from vitserve.model.arrays import Pixels
from vitserve.model.bundle import preprocess
from vitserve.service import log_format
from vitserve.service.ipc.framed_process import (
    FramedProcess,
    ProcessEndedError,
    ProcessStartError,
    ProcessTimeoutError,
)
from vitserve.service.python_process import python_command, python_environment

log = logging.getLogger(__name__)

_START_SECONDS = 60.0


class DecodeTimeoutError(Exception):
    """The image was not decoded in time. The process was killed."""


class DecodeProcessError(Exception):
    """The process could not be started."""


class DecodeProcess:
    """Starts the process for the first image, and again after it has ended. For one thread."""

    def __init__(self) -> None:
        self.process = FramedProcess(_start, _START_SECONDS)

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def decode(self, decoder: preprocess.Decoder, encoded: bytes, until: float) -> Pixels:
        """uint8 [height, width, channels]. ``until``: monotonic seconds.

        Raises ImageError, DecodeTimeoutError or DecodeProcessError.
        """
        description = json.dumps(dataclasses.asdict(decoder)).encode()
        try:
            received = self.process.exchange([description, encoded], until)
        except ProcessTimeoutError:
            raise DecodeTimeoutError from None
        except ProcessStartError as error:
            log.error("the decode process failed: %s", error)
            raise DecodeProcessError(f"the decode process failed: {error}") from error
        except ProcessEndedError as error:
            log.error("the decode process ended with %s", error)
            raise preprocess.DamagedImageError(f"the image cannot be decoded: its decoder ended with {error}") from None
        if len(received) == 2:
            failure = preprocess.named_error(received[0].decode(), received[1].decode())
            assert failure is not None
            raise failure
        return np.frombuffer(received[0], np.uint8).reshape(decoder.preprocessing.shape)

    def close(self) -> None:
        """Kills the process."""
        self.process.close()


def _start(descriptor: int) -> subprocess.Popen[bytes]:
    module = "vitserve.service.http_worker.dispatch.decode_process_main"
    return subprocess.Popen(
        python_command(module, str(descriptor), *log_format.arguments_of("decoder")),
        env=python_environment(),
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
    )
