"""The memory that the decode processes of all HTTP workers take together.

A file has an integer for each decode process: the bytes that it may use now. Only the holder of a lock adds to them.
The kernel frees the lock when its holder is killed, and an HTTP worker that starts clears the entries of its
predecessor. So no crash keeps memory reserved.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from pathlib import Path

from vitserve.service.ipc.metrics_directory import DECODE_MEMORY

MAX_PROCESSES = 64  # per HTTP worker
_ENTRY = struct.Struct("<q")
_POLL_SECONDS = 0.005
_LOCK = "decode-memory-lock"


class DecodeMemory:
    """Thread-safe, except that an entry belongs to one thread."""

    def __init__(self, directory: Path, worker: int, capacity: int) -> None:
        """``capacity``: bytes, of all HTTP workers."""
        self.capacity = capacity
        self._lock = directory / _LOCK
        self._first = worker * MAX_PROCESSES
        self._file = os.open(directory / DECODE_MEMORY, os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(self._file, bytes(MAX_PROCESSES * _ENTRY.size), self._first * _ENTRY.size)

    def reserve(self, process: int, size: int, until: float) -> bool:
        """Waits for ``size`` bytes. False if they are not free by ``until`` (monotonic seconds)."""
        lock = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while not (_locked(lock) and self._reserved() + size <= self.capacity):
                if time.monotonic() >= until:
                    return False
                time.sleep(_POLL_SECONDS)
            self._write(process, size)
            return True
        finally:
            os.close(lock)

    def release(self, process: int) -> None:
        self._write(process, 0)

    def close(self) -> None:
        os.close(self._file)

    def _reserved(self) -> int:
        entries = os.pread(self._file, os.fstat(self._file).st_size, 0)
        return sum(size for (size,) in _ENTRY.iter_unpack(entries))

    def _write(self, process: int, size: int) -> None:
        os.pwrite(self._file, _ENTRY.pack(size), (self._first + process) * _ENTRY.size)


def _locked(lock: int) -> bool:
    """The first process that waits keeps the lock until its memory is free, so that small images do not overtake it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
