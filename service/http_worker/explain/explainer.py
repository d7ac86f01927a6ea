"""Explanations of predictions, computed in a process of its own at the lowest priority."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitserve.model.arrays import Floats, Pixels
from vitserve.model.bundle import preprocess
from vitserve.service import errors, log_format
from vitserve.service.ipc.framed_process import (
    FramedProcess,
    ProcessEndedError,
    ProcessStartError,
    ProcessTimeoutError,
)
from vitserve.service.python_process import python_command, python_environment
from vitserve.service.settings import DEFAULT_BUNDLE, Settings

log = logging.getLogger(__name__)

MOST_WAITING = 4  # images that wait for the process; further ones are rejected
_SECONDS, _START_SECONDS = 60.0, 60.0


class Explanation(NamedTuple):
    description: dict[str, Any]  # method and what belongs to it
    grid: Floats  # [rows, columns], from 0 to 1
    pixels: Pixels  # that the network sees, [height, width, channels]


class Explainer:
    """Starts the process for the first image. It exits after a minute without images."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._identity = ""  # of the bundle that the process has read
        self._process = FramedProcess(self._start, _START_SECONDS)
        self._thread = ThreadPoolExecutor(1, "explain")
        self._waiting = 0
        self._stopped = False

    def check_room(self) -> None:
        """Raises OverloadedError, and NotReadyError after stop()."""
        if self._stopped:
            raise errors.NotReadyError("the service is stopping")
        if self._waiting >= MOST_WAITING:
            raise errors.OverloadedError("other images wait for their explanation", "full", 5.0)

    async def explain(self, encoded: bytes, options: dict[str, Any], identity: str) -> Explanation:
        """``identity``: of the bundle that is served. Raises ServiceError."""
        self.check_room()
        self._waiting += 1
        try:
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._run, encoded, options, identity)
            return await work
        finally:
            self._waiting -= 1

    def stop(self) -> None:
        """Ends the image that is being explained, and rejects those that wait: they do not hold up the drain."""
        self._stopped = True
        pid = self._process.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self.stop()
        self._thread.shutdown(cancel_futures=True)
        self._process.close()

    def _run(self, encoded: bytes, options: dict[str, Any], identity: str) -> Explanation:
        if self._stopped:
            raise errors.NotReadyError("the service is stopping")
        if identity != self._identity:
            self._process.close()
            self._identity = identity
        options = options | {"identity": identity}
        try:
            received = self._process.exchange([json.dumps(options).encode(), encoded], time.monotonic() + _SECONDS)
        except ProcessTimeoutError:
            raise errors.DeadlineExceededError(f"the explanation takes more than {_SECONDS:g} s") from None
        except (ProcessStartError, ProcessEndedError) as error:
            if self._stopped:
                raise errors.NotReadyError("the service is stopping") from None
            log.error("the process for explanations failed: %s", error)
            raise errors.EngineFailedError("the process for explanations failed; the log has the reason") from None
        if len(received) == 2:
            raise _error(received[0].decode(), received[1].decode())
        description = json.loads(received[0])
        shape, size = description.pop("shape"), (description.pop("rows"), description.pop("columns"))
        grid = np.frombuffer(received[1], np.float32).reshape(size)
        return Explanation(description, grid, np.frombuffer(received[2], np.uint8).reshape(shape))

    def _start(self, descriptor: int) -> subprocess.Popen[bytes]:
        bundle = str(Path(self._settings.bundle or DEFAULT_BUNDLE).absolute())
        arguments = str(descriptor), bundle, *log_format.arguments_of("explainer")
        return subprocess.Popen(
            python_command("vitserve.service.explain_worker", *arguments),
            env=python_environment() | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
        )


def _error(kind: str, text: str) -> errors.ServiceError:
    of_image = preprocess.named_error(kind, text)
    if of_image is not None:
        return errors.from_image_error(of_image)
    return errors.BadRequestError(text) if kind == "IndexError" else errors.NotExplainableError(text)
