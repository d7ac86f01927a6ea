"""The limits of the control groups of this process: CPU quota and memory, versions 1 and 2, nested groups included.

A limit of any ancestor applies too, so every group from the own one up to the root of the mounted hierarchy is read.
Without a cgroup namespace (a systemd unit, or a container of version 1) the own group is not at the mount point:
/proc/self/cgroup names it and /proc/self/mountinfo says where its hierarchy is mounted.

Sources: cgroups(7), proc_pid_cgroup(5), proc_pid_mountinfo(5), and the kernel's admin-guide: cgroup-v2.rst,
cgroup-v1/memory.rst, scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

PROC = Path("/proc/self")
# Where the hierarchies are mounted by convention. Some sandboxes show neither /proc/self/cgroup nor mountinfo.
MOUNT_POINT = Path("/sys/fs/cgroup")

T = TypeVar("T")


class _Mount(NamedTuple):
    root: str  # the group that is visible at the mount point
    point: Path
    controllers: frozenset[str]  # empty for version 2


def cpu_quota(proc: Path = PROC, mount_point: Path = MOUNT_POINT) -> float | None:
    """The CPU time that this process may use, in CPU seconds per second. None without a limit."""
    return _least("cpu", _cpu_quota, proc, mount_point)


def memory_limit_bytes(proc: Path = PROC, mount_point: Path = MOUNT_POINT) -> int | None:
    """The memory that this process and the others in its groups may use together. None without a limit."""
    return _least("memory", _memory_bytes, proc, mount_point)


def _least(controller: str, read: Callable[[Path], T | None], proc: Path, mount_point: Path) -> T | None:
    limits = [limit for group in _groups(controller, proc, mount_point) if (limit := read(group)) is not None]
    return min(limits, default=None)  # type: ignore[type-var]  # float or int


def _groups(controller: str, proc: Path, mount_point: Path) -> Iterator[Path]:
    """The directories of the groups whose limits apply, from the own group to the root of the mount."""
    own = dict(_own_groups(controller, proc))
    for mount in _mounts(proc):
        name = controller if mount.controllers else ""
        if name in own and (not mount.controllers or controller in mount.controllers):
            yield from _with_ancestors(mount, own[name])
    yield from (mount_point, *(mount_point / name for name in (controller, "cpu,cpuacct", "unified")))


def _own_groups(controller: str, proc: Path) -> Iterator[tuple[str, str]]:
    """Yields (controller, group); the controller is empty for version 2. A line is ID:CONTROLLERS:GROUP."""
    for line in _lines(proc / "cgroup"):
        _, controllers, group = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            yield controller if controllers else "", group


def _mounts(proc: Path) -> Iterator[_Mount]:
    """Fields of a line: ID, parent, device, root, mount point, options, … - type, source, the type's options."""
    for line in _lines(proc / "mountinfo"):
        fields, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            _, _, _, root, point, *_ = fields.split(" ")
            controllers = frozenset(options.split(",")) if kind == "cgroup" else frozenset[str]()
            yield _Mount(_unescaped(root), Path(_unescaped(point)), controllers)


def _with_ancestors(mount: _Mount, group: str) -> Iterator[Path]:
    """A group outside of the mount (its name starts with /..) is above everything that is visible here."""
    root = mount.root.rstrip("/")
    below = group.removeprefix(root).strip("/") if f"{group}/".startswith(f"{root}/") else ""
    parts = [] if ".." in below.split("/") else [part for part in below.split("/") if part]
    yield from (mount.point.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _cpu_quota(group: Path) -> float | None:
    """Version 2: cpu.max holds "QUOTA PERIOD", in µs, or "max PERIOD". Version 1: a quota of -1 is no limit."""
    fields = " ".join(_lines(group / "cpu.max")).split() or [
        word for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us") for word in _lines(group / name)
    ]
    quota, period = (int(field) if field.isdecimal() else 0 for field in [*fields, "", ""][:2])
    return quota / period if quota > 0 and period > 0 else None


def _memory_bytes(group: Path) -> int | None:
    """Version 1 also states the least limit of the ancestors, which a container cannot read itself."""
    stated = [*_lines(group / "memory.max"), *_lines(group / "memory.limit_in_bytes")]
    figures = dict(line.partition(" ")[::2] for line in _lines(group / "memory.stat"))
    stated.append(figures.get("hierarchical_memory_limit", ""))
    return min((int(text) for text in stated if text.isdecimal()), default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _unescaped(text: str) -> str:
    """Mount points have spaces and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
