"""Gives storage to files that are mapped into memory, before they are written.

A file in memory (tmpfs, memfd) gets its pages when they are first written. If none is left then, the kernel kills the
process that writes with SIGBUS, hours after the start perhaps: mmap(2), posix_fallocate(3).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def allocate(descriptor: int, size: int) -> None:
    """Makes the file at least ``size`` bytes long, and gives storage to all of them. Raises OSError."""
    fallocate: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    if fallocate is None:  # macOS has neither this call nor tmpfs
        os.ftruncate(descriptor, size)
    else:
        fallocate(descriptor, 0, size)


def allocate_file(path: Path, size: int) -> None:
    """Makes a file of ``size`` zero bytes that all have storage. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        allocate(descriptor, size)
    finally:
        os.close(descriptor)
