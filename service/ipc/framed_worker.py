"""The other end of framed_process.py: a process that answers messages until it is idle for long, or its parent ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from vitserve.service.ipc import frames

_DIE_WITH_PARENT = 1  # prctl(2): PR_SET_PDEATHSIG


def give_way() -> int:
    """This process ends with its parent, and the kernel kills it before those that serve. Returns the parent's pid."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    return parent


def answer_messages(
    descriptor: int, parent: int, idle_seconds: float, answer: Callable[[list[bytes]], list[bytes]]
) -> None:
    """``descriptor``: of the connection. Ends after ``idle_seconds`` without a message, so that its memory is free."""
    with socket.socket(fileno=descriptor) as connection:
        frames.send(connection, [])  # ready
        # A parent that was killed before prctl() sends no signal.
        while os.getppid() == parent and select.select([connection], [], [], idle_seconds)[0]:
            try:
                message = frames.receive(connection)
            except EOFError:
                return
            frames.send(connection, answer(message))
