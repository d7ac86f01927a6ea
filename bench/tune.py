"""Finds the fastest engine, precision and number of streams for a bundle on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vitserve.bench.engine import run_interval
from vitserve.model.arrays import Pixels
from vitserve.model.bundle.bundle import Artifact, Bundle
from vitserve.service import machine
from vitserve.service.engine_worker.tuning_cache import TuningResult
from vitserve.service.engines.engine import Engine, EngineOptions
from vitserve.service.engines.selection import candidates, open_verified, runs_on_gpu

CLOSE_TO_BEST = 0.97  # of the highest throughput: a smaller difference is noise, so the simpler setting is chosen


@dataclass(frozen=True)
class Measurement:
    engine: str
    precision: str
    streams: int
    threads: int  # per stream
    batch_size: int
    images_per_second: float  # of all streams together
    p50_seconds: float  # of one batch


@dataclass(frozen=True)
class SkippedEngine:
    engine: str
    precision: str
    reason: str


def measure(
    bundle: Bundle, cores: int, max_batch: int, seconds: float, skipped: Callable[[SkippedEngine], None]
) -> Iterator[Measurement]:
    """Measures every artifact that passes the golden check here, with every split of the cores into streams, at every
    batch size for ``seconds``. Calls ``skipped`` for an artifact that cannot run."""
    plans = str(machine.plan_dir())
    for artifact in candidates(bundle, EngineOptions(plan_dir=plans)):
        for streams in (1, 2) if runs_on_gpu(artifact) else splits(cores):
            options = EngineOptions(streams=streams, threads=cores // streams, max_batch=max_batch, plan_dir=plans)
            try:
                engine = _opened(bundle, artifact, options)
            except Exception as error:  # runtimes raise exceptions of many types
                skipped(SkippedEngine(artifact.engine, artifact.precision, str(error)))
                break
            try:
                for size in sizes(max_batch):
                    yield _measure(engine, streams, options.threads, bundle.golden().pixels, size, seconds)
            finally:
                engine.close()


def choose(measurements: Sequence[Measurement]) -> TuningResult:
    """Chooses the fewest streams whose throughput is close to the highest: they have the lowest latency at light load.

    Raises ValueError if there are no measurements.
    """
    if not measurements:
        raise ValueError("no engine can serve the bundle on this machine, so there is nothing to choose")
    best: dict[tuple[str, str, int], Measurement] = {}  # by setting, at its best batch size
    for measurement in measurements:
        key = (measurement.engine, measurement.precision, measurement.streams)
        if key not in best or measurement.images_per_second > best[key].images_per_second:
            best[key] = measurement
    highest = max(measurement.images_per_second for measurement in best.values())
    close = [measurement for measurement in best.values() if measurement.images_per_second >= CLOSE_TO_BEST * highest]
    chosen = min(close, key=lambda measurement: (measurement.streams, -measurement.images_per_second))
    return TuningResult(
        chosen.engine,
        chosen.precision,  # type: ignore[arg-type]  # a Precision, since it is from a bundle
        chosen.streams,
        chosen.threads,
        chosen.images_per_second,
    )


def splits(cores: int) -> list[int]:
    """Numbers of streams that divide the cores evenly: the powers of two among them, and one stream per core."""
    powers = [2**exponent for exponent in range(cores.bit_length())]
    return sorted({streams for streams in (*powers, cores) if cores % streams == 0})


def sizes(max_batch: int) -> list[int]:
    """Powers of two up to ``max_batch``, and ``max_batch``."""
    return sorted({min(2**exponent, max_batch) for exponent in range(max_batch.bit_length() + 1)})


def _opened(bundle: Bundle, artifact: Artifact, options: EngineOptions) -> Engine:
    return open_verified(bundle, artifact, options).engine


def _measure(engine: Engine, streams: int, threads: int, golden: Pixels, size: int, seconds: float) -> Measurement:
    times = run_interval(engine.run, streams, np.resize(golden, (size, *golden.shape[1:])), seconds)
    return Measurement(
        engine=engine.name,
        precision=engine.precision,
        streams=streams,
        threads=threads,
        batch_size=size,
        images_per_second=sum(size * len(stream) / sum(stream) for stream in times),
        p50_seconds=float(np.median(np.concatenate(times))),
    )
