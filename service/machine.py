"""The part of the machine that this process may use: cores, memory, GPUs, cache directory."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

from vitserve.service import cache_directory, cgroup


def cores() -> int:
    """The number of cores, limited by CPU affinity and by the CPU quota of the control groups.

    A fraction of a core is dropped, except that one core is left.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup.cpu_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def memory_limit() -> int:
    """Bytes that this process and its children may use: the least of the control groups' limits and the memory."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup.memory_limit_bytes()
    return physical if limit is None else min(physical, limit)


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


def multiplies_int8_exactly(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether int8 products are exact on this CPU, so that another CPU computes nearly the same: x86 with VNNI.

    Without VNNI, sums of two products saturate at 16 bits (VPMADDUBSW, Intel SDM). ARM was not measured.
    """
    return platform.machine() in ("x86_64", "AMD64") and multiplies_int8(cpuinfo)


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
    """The default directory of TensorRT plans and other artifacts built for the GPU of this machine.

    Raises CacheError as cache_dir().
    """
    return cache_directory.private_directory(cache_dir(), "plans")


def cache_dir() -> Path:
    """The directory for files that can be made again. Raises CacheError: see cache_directory.py."""
    return cache_directory.cache_dir()
