"""The results of `vitserve tune`: the fastest engine for a bundle on this kind of CPU.

They are kept in the cache directory and not in the bundle, because other machines may serve the same bundle.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from vitserve.model.arrays import Precision
from vitserve.service import machine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuningResult:
    engine: str
    precision: Precision
    streams: int
    threads: int  # per stream
    images_per_second: float  # as measured, at the best batch size


def path_of(identity: str) -> Path:
    """``identity`` is the sha256 of the bundle's manifest."""
    return machine.cache_dir() / "tuned" / f"{identity[:16]}-{machine.cpu()}.json"


def save_tuning_result(identity: str, tuning_result: TuningResult) -> Path:
    path = path_of(identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(tuning_result), indent=1))
    temporary.replace(path)
    return path


def load_tuning_result(identity: str) -> TuningResult | None:
    """None if the bundle was not tuned on this kind of CPU, or if the file cannot be read. That only costs speed."""
    path = path_of(identity)
    try:
        return TuningResult(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("ignoring invalid tuning result %s: %s", path, error)
        return None
