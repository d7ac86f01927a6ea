"""Measures which of a bundle's artifacts, with how many streams and threads, is fastest on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vitserve.bench.engine import interval
from vitserve.model.arrays import Pixels
from vitserve.model.bundle.bundle import Artifact, Bundle
from vitserve.service import machine
from vitserve.service.engine_worker.tuning_cache import TuningResult
from vitserve.service.engines.engine import Engine, EngineOptions
from vitserve.service.engines.selection import candidates, open_verified, runs_on_gpu

WITHIN = 0.97  # of the highest rate: the simpler setting is taken, for what separates them is noise


@dataclass(frozen=True)
class Measurement:
    engine: str
    precision: str
    streams: int
    threads: int  # per stream
    batch_size: int
    images_per_second: float  # all streams together
    p50_seconds: float  # of one batch


@dataclass(frozen=True)
class SkippedEngine:
    engine: str
    precision: str
    reason: str


def measure(
    bundle: Bundle, cores: int, max_batch: int, seconds: float, skipped: Callable[[SkippedEngine], None]
) -> Iterator[Measurement]:
    """Every artifact that runs here and passes the golden check, at every split of the cores, each batch size for ``seconds``."""
    plans = str(machine.plan_dir())
    for artifact in candidates(bundle, EngineOptions(plan_dir=plans)):
        for streams in (1, 2) if runs_on_gpu(artifact) else splits(cores):
            options = EngineOptions(streams=streams, threads=cores // streams, max_batch=max_batch, plan_dir=plans)
            try:
                engine = _opened(bundle, artifact, options)
            except Exception as error:  # whatever a foreign library raises: it is not what will serve here
                skipped(SkippedEngine(artifact.engine, artifact.precision, str(error)))
                break
            try:
                for size in sizes(max_batch):
                    yield _measure(engine, streams, options.threads, bundle.golden().pixels, size, seconds)
            finally:
                engine.close()


def choose(measurements: Sequence[Measurement]) -> TuningResult:
    """Of what comes close to the highest rate, the fewest streams, since those answer a lone image soonest. Raises ValueError if nothing was measured."""
    if not measurements:
        raise ValueError("no engine can serve the bundle here, so there is nothing to choose")
    best: dict[tuple[str, str, int], Measurement] = {}
    for each in measurements:
        key = (each.engine, each.precision, each.streams)
        if key not in best or each.images_per_second > best[key].images_per_second:
            best[key] = each
    highest = max(each.images_per_second for each in best.values())
    near = [each for each in best.values() if each.images_per_second >= WITHIN * highest]
    taken = min(near, key=lambda each: (each.streams, -each.images_per_second))
    return TuningResult(taken.engine, taken.precision, taken.streams, taken.threads, taken.images_per_second)  # type: ignore[arg-type]  # a Precision from a bundle


def splits(cores: int) -> list[int]:
    """Numbers of streams that share the cores without a rest: the powers of two among them, and one for each core."""
    return sorted(
        {streams for streams in (*(2**power for power in range(cores.bit_length())), cores) if cores % streams == 0}
    )


def sizes(max_batch: int) -> list[int]:
    return sorted({min(2**power, max_batch) for power in range(max_batch.bit_length() + 1)})


def _opened(bundle: Bundle, artifact: Artifact, options: EngineOptions) -> Engine:
    return open_verified(bundle, artifact, options).engine


def _measure(engine: Engine, streams: int, threads: int, golden: Pixels, size: int, seconds: float) -> Measurement:
    times = interval(engine.run, streams, np.resize(golden, (size, *golden.shape[1:])), seconds)
    rate = sum(size * len(its) / sum(its) for its in times)
    return Measurement(
        engine.name, engine.precision, streams, threads, size, rate, float(np.median(np.concatenate(times)))
    )
