"""Caches are private: directories that others could write to are not used, and there is always another way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.http import classify
from tests.support.images import encoded, random_image
from tests.support.paths import ROOT
from tests.support.processes import line_count, serving
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.cache_directory import CacheError, cache_dir, private_directory, usable_directory

OTHER_USER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to another user")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.fixture(autouse=True)
def wide_umask() -> Iterator[None]:
    """Directories are private whatever the umask is."""
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "base"


def test_directories_are_created_for_this_user_only(base: Path) -> None:
    path = private_directory(base, "compiled")
    assert (mode(base), mode(path)) == (0o700, 0o700)
    assert private_directory(base, "compiled") == path


@pytest.mark.parametrize("permissions", [0o770, 0o720, 0o702, 0o777, 0o1777])
def test_a_directory_that_others_may_write_to_is_not_used(base: Path, permissions: int) -> None:
    private_directory(base, "compiled").chmod(permissions)
    with pytest.raises(CacheError, match=f"compiled is writable for other users .mode {permissions:o}.: chmod 700"):
        private_directory(base, "compiled")


@as_root
def test_a_directory_of_another_user_is_not_used(base: Path) -> None:
    os.chown(private_directory(base, "compiled"), OTHER_USER, -1)
    with pytest.raises(CacheError, match=f"compiled belongs to user {OTHER_USER}, who could replace its files"):
        private_directory(base, "compiled")
    os.chown(base, OTHER_USER, -1)
    with pytest.raises(CacheError, match=f"base belongs to user {OTHER_USER}"):
        private_directory(base, "tuned")


@as_root
def test_a_volume_of_root_that_all_may_write_to_is_used(base: Path) -> None:
    """As Kubernetes mounts an emptyDir: the directories in it are this user's own."""
    base.mkdir()
    base.chmod(0o2777)
    assert private_directory(base, "compiled").is_dir()


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_something_else_in_its_place_is_not_used(base: Path, kind: str) -> None:
    base.mkdir(mode=0o700)
    (base / "target").mkdir(mode=0o700)
    if kind == "file":
        (base / "compiled").touch()
    else:
        (base / "compiled").symlink_to(base / ("target" if kind == "link" else "none"))
    with pytest.raises(CacheError, match=r"compiled (is not a directory|cannot be created: File exists)"):
        private_directory(base, "compiled")


@as_root
def test_the_cache_is_among_the_temporary_files_if_the_usual_one_is_unsafe(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    monkeypatch.setattr("tempfile.tempdir", str(base.parent / "temporary"))
    (base / "vitserve").mkdir(parents=True)
    os.chown(base / "vitserve", OTHER_USER, -1)
    for _ in range(2):
        assert cache_dir() == base.parent / "temporary" / f"vitserve-{os.geteuid()}"
    assert caplog.text.count("caching in") == 1
    (base.parent / "temporary").rename(base.parent / "moved")
    (base.parent / "temporary").touch()
    with pytest.raises(CacheError, match=r"belongs to user .*; .*temporary"):
        cache_dir.__globals__["_cache_dir"].__wrapped__(str(base), "", str(base.parent / "temporary"))


def test_a_directory_that_cannot_be_created_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="file/x cannot be created: "):
        usable_directory(tmp_path / "file" / "x")


@pytest.fixture
def without_home(tmp_path: Path) -> tuple[str, ...]:
    """The start of a command line that runs as a user without passwd entry, HOME and XDG_CACHE_HOME."""
    environment = ("env", "-u", "HOME", "-u", "XDG_CACHE_HOME", f"TMPDIR={tmp_path}")
    command = ("unshare", "-U", f"--map-user={OTHER_USER}", *environment)
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs user namespaces")
    return command


def test_a_user_without_home_directory_is_served(bundle: Bundle, tmp_path: Path, without_home: tuple[str, ...]) -> None:
    with serving("--bundle", str(bundle.path), "--precision", "fp32", prefix=without_home) as running:
        assert line_count(running, "caching in .*: user 54321 has no home directory; set XDG_CACHE_HOME") == 1
        with httpx.Client(base_url=running.url, timeout=60) as client:
            assert classify(client, encoded(random_image())).status_code == 200
        assert list((tmp_path / f"vitserve-{OTHER_USER}" / "compiled").rglob("*.blob"))
        assert running.stop() == 0


def test_commands_say_why_there_is_no_cache(tmp_path: Path, without_home: tuple[str, ...]) -> None:
    (tmp_path / f"vitserve-{OTHER_USER}").touch()
    code = "from vitserve.service import machine; machine.cache_dir()"
    result = subprocess.run(
        [*without_home, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "CacheError: user 54321 has no home directory; set XDG_CACHE_HOME; " in result.stderr
