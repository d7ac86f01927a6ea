"""Wakes a coroutine at a moment, to some ten microseconds: an event loop's own timers are whole milliseconds."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_MONOTONIC, _NONBLOCK, _ABSOLUTE = 1, os.O_NONBLOCK, 1  # timerfd_create(2), timerfd_settime(2)


class Alarm:
    """``until`` waits for a moment of time.monotonic(), by a timerfd where there is one, else by the loop's timer."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._rung = asyncio.Event()
        if descriptor is not None:
            asyncio.get_running_loop().add_reader(descriptor, self._slot_table, descriptor)

    async def until(self, moment: float) -> None:
        if self._descriptor is None:
            await asyncio.sleep(moment - time.monotonic())
            return
        self._rung.clear()
        whole, rest = divmod(max(1, int(moment * 1e9)), 1_000_000_000)
        setting = (ctypes.c_long * 4)(0, 0, whole, rest)
        if self._libc.timerfd_settime(self._descriptor, _ABSOLUTE, setting, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")
        await self._rung.wait()

    def _slot_table(self, descriptor: int) -> None:
        try:
            os.read(descriptor, 8)
        except BlockingIOError:  # it was set again meanwhile
            return
        self._rung.set()


@contextmanager
def alarm() -> Iterator[Alarm]:
    descriptor = ctypes.CDLL(None).timerfd_create(_MONOTONIC, _NONBLOCK) if sys.platform == "linux" else -1
    if descriptor < 0:
        yield Alarm(None)
        return
    try:
        yield Alarm(descriptor)
    finally:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
