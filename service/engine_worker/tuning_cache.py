"""What `vitserve tune` found fastest for a bundle on this kind of CPU: kept outside the bundle, which other machines serve too.

Written by vitserve.py's `tune`, read by opening.py.
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
    images_per_second: float  # that it reached when it was chosen, at its best batch size


def path_of(identity: str) -> Path:
    """``identity`` is the sha256 of the bundle's manifest."""
    return machine.cache_dir() / "tuned" / f"{identity[:16]}-{machine.cpu()}.json"


def save_tuning_result(identity: str, tuning_result: TuningResult) -> Path:
    path = path_of(identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(asdict(tuning_result), indent=1))
    fresh.replace(path)
    return path


def load_tuning_result(identity: str) -> TuningResult | None:
    """None where nothing was measured, or what was written cannot be read: then nothing is lost but speed."""
    path = path_of(identity)
    try:
        return TuningResult(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s is not a choice of `vitserve tune` and is left aside: %s", path, error)
        return None
