"""What this process may use of the machine: cores, GPUs, cache directory."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup/cpu.max")


def cores(quota_file: Path = _CGROUP) -> int:
    """The number of cores, limited by CPU affinity and by the container's quota.

    ``quota_file`` is cgroup v2's cpu.max: "<microseconds or max> <period in microseconds>".
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):
        return allowed


def cpu() -> str:
    """Identifies the kind of CPU and the number of usable cores. Tuning results hold for equal names only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()}-{cores()}"
    fields = ("model name", "cpu family", "model\t", "stepping", "flags", "Features")
    description = "\n".join(line for line in lines if line.startswith(fields))
    return f"{platform.machine()}-{cores()}-{hashlib.sha256(description.encode()).hexdigest()[:12]}"


def multiplies_int8(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for int8 dot products: VNNI on x86, asimddp on ARM.

    Without them, int8 is slower than float32.
    """
    try:
        flags = set(cpuinfo.read_text().split())
    except OSError:
        return platform.machine() == "arm64"  # every Apple CPU has them
    return bool(flags & {"avx512_vnni", "avx_vnni", "asimddp"})


def gpus(drivers: Path = Path("/proc/driver/nvidia/gpus"), devices: Path = Path("/dev")) -> list[str]:
    """The NVIDIA GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = list(drivers.iterdir()) if drivers.is_dir() else []
    present = present or list(devices.glob("nvidia[0-9]*"))  # some sandboxes hide /proc/driver
    names = [str(index) for index in range(len(present))]
    if not names and Path("/dev/dxg").exists():  # WSL does not show how many there are
        names = ["0"]
    if visible is None or not names:
        return names
    return [name.strip() for name in visible.split(",") if name.strip()]


def plan_dir() -> Path:
    """The default directory of TensorRT plans and other artifacts built for the GPU of this machine."""
    return cache_dir() / "plans"


def cache_dir() -> Path:
    """The directory for files that can be made again, per the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "vitserve"
