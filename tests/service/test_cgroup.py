"""CPU quota and memory limit of control groups: both versions, nested groups, with and without a namespace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitserve.service import cgroup, machine

CPU_V1 = Path("/sys/fs/cgroup/cpu")


class Host:
    """A /proc/self and hierarchies of control groups, as files in a directory whose name has a space."""

    def __init__(self, directory: Path) -> None:
        self.proc, self.mounts = directory / "proc", directory / "mount points"
        self.proc.mkdir()
        self.mounts.mkdir()

    def mount(self, root: str, point: str, kind: str, options: str = "rw") -> None:
        place = str(self.mounts / point).replace(" ", "\\040")
        with (self.proc / "mountinfo").open("a") as file:
            file.write(f"31 23 0:28 {root} {place} rw,relatime shared:9 - {kind} {kind} {options}\n")

    def enter(self, *lines: str) -> None:
        (self.proc / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def write(self, path: str, text: str) -> None:
        file = self.mounts / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def limits(self) -> tuple[float | None, int | None]:
        point = self.mounts / "none"
        return cgroup.cpu_quota(self.proc, point), cgroup.memory_limit_bytes(self.proc, point)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_container_of_version_2_with_a_namespace(host: Host) -> None:
    host.mount("/", "cgroup", "cgroup2")
    host.enter("0::/")
    host.write("cgroup/cpu.max", "150000 100000")
    host.write("cgroup/memory.max", "2147483648")
    assert host.limits() == (1.5, 2**31)


def test_a_systemd_unit_is_in_a_nested_group_and_the_least_limit_of_its_ancestors_applies(host: Host) -> None:
    host.mount("/", "cgroup", "cgroup2")
    host.enter("0::/system.slice/vitserve.service")
    host.write("cgroup/system.slice/cpu.max", "400000 100000")
    host.write("cgroup/system.slice/memory.max", str(2**30))
    host.write("cgroup/system.slice/vitserve.service/cpu.max", "50000 50000")
    host.write("cgroup/system.slice/vitserve.service/memory.max", "max")
    host.write("cgroup/user.slice/cpu.max", "10000 100000")  # not an ancestor
    assert host.limits() == (1.0, 2**30)


def test_a_container_of_version_1_sees_its_own_group_at_the_mount_point(host: Host) -> None:
    host.mount("/docker/0123", "cpu,cpuacct", "cgroup", "rw,cpu,cpuacct")
    host.mount("/docker/0123", "memory", "cgroup", "rw,memory")
    host.enter("5:memory:/docker/0123", "4:cpuacct,cpu:/docker/0123", "1:name=systemd:/docker/0123", "0::/")
    host.write("cpu,cpuacct/cpu.cfs_quota_us", "100000")
    host.write("cpu,cpuacct/cpu.cfs_period_us", "100000")
    host.write("memory/memory.limit_in_bytes", "9223372036854771712")
    host.write("memory/memory.stat", f"cache 1\nhierarchical_memory_limit {2**29}\nhierarchical_memsw_limit 1")
    assert host.limits() == (1.0, 2**29)


def test_nested_groups_of_version_1_without_a_namespace(host: Host) -> None:
    host.mount("/", "cpu", "cgroup", "rw,cpu")
    host.mount("/", "memory", "cgroup", "rw,memory")
    host.mount("/", "unified", "cgroup2")  # the hybrid layout: version 2 has no controllers
    host.enter("4:memory:/a/b", "2:cpu:/a/b", "0::/")
    host.write("cpu/cpu.cfs_quota_us", "-1")
    host.write("cpu/a/cpu.cfs_quota_us", "75000")
    host.write("cpu/a/cpu.cfs_period_us", "100000")
    host.write("cpu/a/b/cpu.cfs_quota_us", "-1")
    host.write("memory/a/memory.limit_in_bytes", str(2**28))
    assert host.limits() == (0.75, 2**28)


@pytest.mark.parametrize("group", ["/../outside", "/other", "/docker/01234"])
def test_a_group_outside_of_the_mount_has_the_limits_of_what_is_visible(host: Host, group: str) -> None:
    host.mount("/docker/0123", "cgroup", "cgroup2")
    host.enter(f"0::{group}")
    host.write("cgroup/cpu.max", "200000 100000")
    host.write("cgroup/4/cpu.max", "1 100000")
    assert host.limits() == (2.0, None)


@pytest.mark.parametrize("text", ["max 100000", "", "100000", "100000 0", "a b", "-5 100000", "\x00\xff"])
def test_no_limit_and_unreadable_limits_are_none(host: Host, text: str) -> None:
    host.mount("/", "cgroup", "cgroup2")
    host.enter("0::/")
    host.write("cgroup/cpu.max", text)
    host.write("cgroup/memory.max", "max")
    assert host.limits() == (None, None)


@pytest.mark.parametrize("place", ["", "cpu/"])
def test_without_mount_information_the_conventional_directories_are_read(host: Host, place: str) -> None:
    host.write(f"{place}cpu.cfs_quota_us", "250000")
    host.write(f"{place}cpu.cfs_period_us", "100000")
    assert cgroup.cpu_quota(host.proc, host.mounts) == 2.5


def test_nothing_is_known_without_control_groups(host: Host) -> None:
    assert host.limits() == (None, None)


@pytest.mark.parametrize("limit", [None, 2**20, 2**60])
def test_the_least_of_limit_and_physical_memory(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "memory_limit_bytes", lambda: limit)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.memory_limit() == (2**20 if limit == 2**20 else physical)


@pytest.fixture
def nested_group() -> Iterator[Path]:
    """A group in a group of the real cpu hierarchy, whose parent has a quota of 0.7."""
    reason = "needs root and a writable cpu hierarchy of version 1"
    if not (CPU_V1 / "cpu.cfs_quota_us").exists():
        pytest.skip(reason)
    parent = CPU_V1 / f"vitserve-test-{os.getpid()}"
    child = parent / "child"
    try:
        try:
            child.mkdir(parents=True)
            (parent / "cpu.cfs_quota_us").write_text("70000")
        except OSError:
            pytest.skip(reason)
        yield child
    finally:
        for group in (child, parent):
            if group.exists():
                group.rmdir()


def test_a_process_in_a_real_nested_group_finds_its_quota(nested_group: Path) -> None:
    code = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
    code += "from vitserve.service import cgroup; print(cgroup.cpu_quota())"
    command = [sys.executable, "-c", code, str(nested_group / "cgroup.procs")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0.7\n"
