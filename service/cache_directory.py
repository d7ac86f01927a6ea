"""Directories for files that can be made again, such as compiled models. No other user may write to them.

A compiled model is native code, so a user who can replace it controls the process that loads it.
"""

from __future__ import annotations

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_ROOT = 0


class CacheError(OSError):
    """A directory cannot be used for a cache. ``strerror`` is not set: str() gives the reason."""


def cache_dir() -> Path:
    """The directory of all caches, created with mode 0700: $XDG_CACHE_HOME/vitserve or ~/.cache/vitserve.

    Where that cannot be used, a directory of this user among the temporary files, with one warning. Raises CacheError
    if there is none either. See the XDG base directory specification.
    """
    return _cache_dir(*(os.environ.get(name, "") for name in ("XDG_CACHE_HOME", "HOME", "TMPDIR")))


@functools.cache
def _cache_dir(xdg_cache_home: str, home: str, tmpdir: str) -> Path:
    """The arguments are the keys of the cache, which gives the warning once."""
    try:
        return usable_directory(_standard(xdg_cache_home))
    except CacheError as error:
        reason = str(error)
    try:
        path = private_directory(Path(tempfile.gettempdir()), f"vitserve-{os.geteuid()}")
    except OSError as error:  # also if no directory for temporary files can be written
        raise CacheError(f"{reason}; {error}") from error
    log.warning("caching in %s: %s", path, reason)
    return path


def _standard(xdg_cache_home: str) -> Path:
    if Path(xdg_cache_home).is_absolute():
        return Path(xdg_cache_home) / "vitserve"
    try:
        return Path.home() / ".cache" / "vitserve"
    except RuntimeError as error:
        raise CacheError(f"user {os.geteuid()} has no home directory; set XDG_CACHE_HOME") from error


def private_directory(base: Path, name: str) -> Path:
    """``base/name``, created with mode 0700, and ``base`` too. Raises CacheError: see usable_directory()."""
    path = usable_directory(base) / name
    _create(path)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise CacheError(f"{path} is not a directory")
    _check(path, status)
    return path


def usable_directory(path: Path) -> Path:
    """Creates the directory with mode 0700 if it is missing.

    Raises CacheError if it belongs to a user other than this one and root, or if others may write to it. Two kinds of
    directories are accepted although others may write to them: a sticky one, such as /tmp, in which they cannot replace
    this user's directories; and one of root, whatever its mode, because Kubernetes mounts volumes with mode 0777.
    """
    _create(path)
    status = path.stat()
    if not (status.st_uid == _ROOT or (status.st_uid == os.geteuid() and status.st_mode & stat.S_ISVTX)):
        _check(path, status)
    return path


def check_writable(path: Path) -> None:
    """Raises CacheError if no file can be written to the directory."""
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise CacheError(f"{path} cannot be written: {error.strerror}") from error


def _create(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{path} cannot be created: {error.strerror}") from error


def _check(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), _ROOT):
        raise CacheError(f"{path} belongs to user {status.st_uid}, who could replace its files")
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise CacheError(f"{path} is writable for other users (mode {status.st_mode & 0o7777:o}): chmod 700 {path}")
