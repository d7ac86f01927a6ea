"""The results of `vitserve tune`: the fastest engine for a bundle on this kind of CPU.

They are kept in the cache directory and not in the bundle, because other machines may serve the same bundle.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from vitserve.model.arrays import Precision
from vitserve.service import cache_directory, machine
from vitserve.service.cache_directory import CacheError
from vitserve.service.engines.catalog import ENGINES, PRECISIONS

log = logging.getLogger(__name__)


MAX_STREAMS, MAX_THREADS = 256, 1024  # of a result that is taken for valid


@dataclass(frozen=True)
class TuningResult:
    """Raises ValueError for a value that no measurement can have."""

    engine: str
    precision: Precision
    streams: int
    threads: int  # per stream
    images_per_second: float  # as measured, at the best batch size

    def __post_init__(self) -> None:
        for name, known in (("engine", tuple(ENGINES)), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        for name, most in (("streams", MAX_STREAMS), ("threads", MAX_THREADS)):
            number = getattr(self, name)
            if type(number) is not int or not 1 <= number <= most:
                raise ValueError(f"{name} is {number!r}; it must be a number from 1 to {most}")
        rate = self.images_per_second
        if type(rate) not in (int, float) or not 0 < rate < math.inf:
            raise ValueError(f"images_per_second is {rate!r}; it must be a number greater than 0")


def path_of(identity: str) -> Path:
    """``identity`` is the sha256 of the bundle's manifest. Raises CacheError."""
    directory = cache_directory.private_directory(machine.cache_dir(), "tuned")
    return directory / f"{identity[:16]}-{machine.cpu()}.json"


def save_tuning_result(identity: str, tuning_result: TuningResult) -> Path:
    path = path_of(identity)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(tuning_result), indent=1))
    temporary.replace(path)
    return path


def load_tuning_result(identity: str) -> TuningResult | None:
    """None if the bundle was not tuned on this kind of CPU, or if the file is not valid. That only costs speed."""
    try:
        path = path_of(identity)
    except CacheError as error:
        log.warning("tuning results are not used: %s", error)
        return None
    try:
        return _usable_here(TuningResult(**json.loads(path.read_text())))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        log.warning("ignoring invalid tuning result %s: %s", path, error)
        return None


def _usable_here(tuning_result: TuningResult) -> TuningResult:
    """Raises ValueError for more threads than `vitserve tune` tries: one per core, and two streams on a GPU."""
    cores = machine.cores()
    if tuning_result.streams > max(2, cores) or tuning_result.threads > cores:
        given = f"streams is {tuning_result.streams} and threads is {tuning_result.threads}"
        raise ValueError(f"{given}; this machine has {cores} cores")
    return tuning_result
