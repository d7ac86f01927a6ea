"""A read-only root filesystem, as in the container images: no directory for temporary files can be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from vitserve.service import cache_directory
from vitserve.service.cache_directory import CacheError
from vitserve.service.ipc import metrics_directory


@pytest.fixture(autouse=True)
def no_temporary_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_the_metrics_files_are_in_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_directory, "SHARED_MEMORY", tmp_path)
    assert Path(metrics_directory.create(["http-worker-0"])).parent == tmp_path


def test_a_cache_directory_that_is_set_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory.cache_dir() == tmp_path / "vitserve"


def test_without_any_directory_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with pytest.raises(CacheError, match="No usable temporary directory"):
        cache_directory.cache_dir()
