"""Notices that files have been replaced, as editors, cert-manager and Kubernetes do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

CHECK_SECONDS = 1.0  # between two looks at the files


class WatchedFiles:
    def __init__(self, *paths: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._paths, self._clock, self._checked = paths, clock, -math.inf
        self._versions: list[tuple[int, int, int] | None] | None = None

    def changed(self) -> bool:
        """Whether they must be read: at the first call, and after a change. Looks at most once a second."""
        now = self._clock()
        if now - self._checked < CHECK_SECONDS:
            return False
        self._checked = now
        previous, self._versions = self._versions, [_version(path) for path in self._paths]
        return self._versions != previous


def _version(path: Path) -> tuple[int, int, int] | None:
    """Changes with the content: editors replace the file, and Kubernetes replaces the directory of a Secret."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
