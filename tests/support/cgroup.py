"""A control group with a memory limit, of version 1 or 2. Creating one requires root."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    def __init__(self, path: Path, is_v1: bool) -> None:
        self.path, self._is_v1 = path, is_v1

    def limit(self, limit_bytes: int) -> None:
        (self.path / ("memory.limit_in_bytes" if self._is_v1 else "memory.max")).write_text(str(limit_bytes))

    @property
    def prefix(self) -> list[str]:
        """A command that runs the command that follows it in the group."""
        return ["sh", "-c", f'echo $$ > {self.path / "cgroup.procs"} && exec "$@"', "sh"]

    def kills(self) -> int:
        """Processes that the kernel has killed because of the limit."""
        events = (self.path / ("memory.oom_control" if self._is_v1 else "memory.events")).read_text().split()
        return int(events[events.index("oom_kill") + 1])

    def peak_bytes(self) -> int:
        """Of memory and file cache."""
        return int((self.path / ("memory.max_usage_in_bytes" if self._is_v1 else "memory.peak")).read_text())


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Skips the test where no group can be created."""
    is_v1 = (_ROOT / "memory").is_dir()
    path = (_ROOT / "memory" if is_v1 else _ROOT) / f"vitserve-test-{uuid.uuid4().hex}"
    try:
        path.mkdir()
        group = MemoryGroup(path, is_v1)
        group.limit(limit_bytes)
        group.kills()
    except (OSError, ValueError) as error:
        if path.exists():
            path.rmdir()
        pytest.skip(f"no control group with a memory limit can be created: {error}")
    try:
        yield group
    finally:
        for pid in (path / "cgroup.procs").read_text().split():
            os.kill(int(pid), 9)
        while (path / "cgroup.procs").read_text().split():
            pass
        path.rmdir()
