"""What this process may use of the machine. Imported by supervisor.py and engines/open.py."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup/cpu.max")


def cores(quota_file: Path = _CGROUP) -> int:
    """Cores by affinity, and no more than the container's quota allows (cgroup v2: "<microseconds or max> <period>")."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):
        return allowed
