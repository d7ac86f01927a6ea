"""The directory of the metrics files, which all processes of the service map into memory.

All files are allocated before any process starts: see allocation.py.
"""

from __future__ import annotations

import errno
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from vitserve.service.ipc.allocation import allocate_file

log = logging.getLogger("vitserve.supervisor")

# Of one file. All counters of a process, with every route and status, take less than half of it; so do its histograms.
FILE_BYTES = 1 << 17
DECODE_MEMORY, DECODE_MEMORY_BYTES = "decode-memory", 1 << 16  # see http_worker/dispatch/decode_memory.py
KINDS = ("counter", "histogram")  # prometheus-client names a file KIND_PROCESS.db
SHARED_MEMORY = Path("/dev/shm")


class NoSpaceError(OSError):
    """No directory has room for the metrics files."""


def create(processes: Sequence[str], directories: Sequence[Path] | None = None) -> str:
    """Makes the directory, with the allocated files of all ``processes``, and returns its path.

    The first of ``directories`` with enough room is used: by default /dev/shm, then the directory for temporary files.
    Raises NoSpaceError.
    """
    needed = len(processes) * len(KINDS) * FILE_BYTES + DECODE_MEMORY_BYTES
    failures = []
    for parent in directories or _default_directories():
        try:
            path = _create_in(parent, processes)
        except OSError as error:
            failures.append(f"{parent}: {_reason(error)}")
            continue
        for failure in failures:
            log.warning("the metrics files are in %s, because %s (%d KiB are needed)", parent, failure, needed >> 10)
        return path
    raise NoSpaceError(
        f"{needed >> 10} KiB are needed for the metrics files, but there is no room ({'; '.join(failures)}); enlarge "
        f"{SHARED_MEMORY} (docker run --shm-size, or a volume of medium Memory in Kubernetes), delete files in it, "
        "or set TMPDIR to a writable directory"
    )


def _default_directories() -> Iterator[Path]:
    yield SHARED_MEMORY
    try:
        temporary = Path(tempfile.gettempdir())
    except OSError:  # none can be written, as in a container with a read-only root filesystem
        return
    yield temporary


def _create_in(parent: Path, processes: Sequence[str]) -> str:
    path = tempfile.mkdtemp(prefix="vitserve-", dir=parent)
    try:
        allocate_file(Path(path) / DECODE_MEMORY, DECODE_MEMORY_BYTES)
        for process in processes:
            for kind in KINDS:
                allocate_file(Path(path) / f"{kind}_{process}.db", FILE_BYTES)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return path


def _reason(error: OSError) -> str:
    return "it is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)


def process_names(workers: int, engines: int) -> Iterator[str]:
    """The roles of all processes that the supervisor may start, of two generations."""
    yield from (f"http-worker-{index}" for index in range(workers))
    yield from (f"engine-worker-{index}-{generation}" for index in range(engines) for generation in "ab")
