"""What this process may use of the machine."""

from __future__ import annotations

import hashlib
import os
import platform
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


def cpu() -> str:
    """A name for this kind of CPU and how much of it may be used: what is fastest on one is so on its like alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()}-{cores()}"
    described = [
        line
        for line in lines
        if line.startswith(("model name", "cpu family", "model\t", "stepping", "flags", "Features"))
    ]
    return f"{platform.machine()}-{cores()}-{hashlib.sha256(chr(10).join(described).encode()).hexdigest()[:12]}"


def multiplies_int8(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for int8 products (VNNI; on ARM, dot products). Without them int8 is slower than float32, not faster."""
    try:
        flags = set(cpuinfo.read_text().split())
    except OSError:
        return platform.machine() == "arm64"  # Apple's all have them
    return bool(flags & {"avx512_vnni", "avx_vnni", "asimddp"})


def gpus(drivers: Path = Path("/proc/driver/nvidia/gpus"), devices: Path = Path("/dev")) -> list[str]:
    """NVIDIA's devices that CUDA would show this process, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = list(drivers.iterdir()) if drivers.is_dir() else []
    found = found or list(devices.glob("nvidia[0-9]*"))  # a sandbox may show the devices alone
    there = [str(index) for index, _ in enumerate(found)]
    if not there and Path("/dev/dxg").exists():  # WSL, which tells no more
        there = ["0"]
    return there if visible is None or not there else [each.strip() for each in visible.split(",") if each.strip()]


def plan_dir() -> Path:
    """Where what is built for a GPU lies, unless told."""
    return cache_dir() / "plans"


def cache_dir() -> Path:
    """Where vitserve keeps what it can make again, of the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "vitserve"
