"""A directory of compiled models with a list of their SHA-256. A file that differs from the list is compiled again."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vitserve.service.cache_directory import private_directory

log = logging.getLogger(__name__)

LIST = "SHA256SUMS"  # in the format of sha256sum(1)
_LOCK = ".lock"


@contextmanager
def compiled_models(cache: Path, *key: object) -> Iterator[Path | None]:
    """The directory for the files that a runtime compiles from a model and options named by ``key``.

    Before the block, files that are damaged or not listed are deleted. After it, the files are listed, and if there are
    new ones, the others are deleted: they were compiled from an earlier model. Other processes wait meanwhile.
    None if the directory cannot be used.
    """
    name = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:16]
    with ExitStack() as stack:
        try:
            directory = private_directory(cache, name)
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            verified = _delete_unverified(directory)
        except OSError as error:
            log.warning("the compiled model is not cached: %s", error)
            stack.close()
            yield None
            return
        yield directory
        _list(directory, verified)


def _delete_unverified(directory: Path) -> dict[str, str]:
    """Returns the files that are left, with their SHA-256."""
    listed, actual = _read_list(directory), _digests(directory)
    for name, digest in actual.items():
        if listed.get(name) != digest:
            reason = "is not listed" if name not in listed else "is damaged"
            log.warning("%s %s; compiling the model again", directory / name, reason)
            (directory / name).unlink(missing_ok=True)
    return {name: digest for name, digest in actual.items() if listed.get(name) == digest}


def _list(directory: Path, verified: dict[str, str]) -> None:
    try:
        names = {path.name for path in _files(directory)}
        if names == verified.keys():
            return
        for name in names & verified.keys():
            (directory / name).unlink()
        text = "".join(f"{digest}  {name}\n" for name, digest in sorted(_digests(directory).items()))
        temporary = directory / f".{LIST}"
        temporary.write_text(text)
        temporary.replace(directory / LIST)
    except OSError as error:
        log.warning("the compiled model cannot be verified at the next start: %s", error)


def _read_list(directory: Path) -> dict[str, str]:
    try:
        lines = (directory / LIST).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _digests(directory: Path) -> dict[str, str]:
    digests = {}
    for path in _files(directory):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name != LIST and path.name[0] != "." and path.is_file()]
