"""Measures which of a bundle's artefacts, with how many lanes and threads, is fastest on this machine. Imported by vitserve.py's `tune`; needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vitserve.bench.engine import spell
from vitserve.model.arrays import Pixels
from vitserve.model.bundle.bundle import Artefact, Bundle
from vitserve.service import machine
from vitserve.service.engine_worker.tuning_cache import Choice
from vitserve.service.engines.engine import Engine
from vitserve.service.engines.selection import EngineOptions, candidates, golden_gate, open_artefact, runs_on_gpu

WITHIN = 0.97  # of the highest rate: the simpler setting is taken, for what separates them is noise


@dataclass(frozen=True)
class Measurement:
    engine: str
    precision: str
    lanes: int
    threads: int  # per lane
    batch_size: int
    images_per_second: float  # all lanes together
    p50_seconds: float  # of one batch


@dataclass(frozen=True)
class LeftOut:
    engine: str
    precision: str
    reason: str


def measure(bundle: Bundle, cores: int, max_batch: int, seconds: float, left_out: Callable[[LeftOut], None]) -> Iterator[Measurement]:
    """Every artefact that runs here and passes the golden gate, at every split of the cores, each batch size for ``seconds``."""
    plans = str(machine.plan_folder())
    for artefact in candidates(bundle, EngineOptions(plan_folder=plans)):
        for lanes in (1, 2) if runs_on_gpu(artefact) else splits(cores):
            options = EngineOptions(lanes=lanes, threads=cores // lanes, max_batch=max_batch, plan_folder=plans)
            try:
                engine = _opened(bundle, artefact, options)
            except Exception as error:  # whatever a foreign library raises: it is not what will serve here
                left_out(LeftOut(artefact.engine, artefact.precision, str(error)))
                break
            try:
                for size in sizes(max_batch):
                    yield _measure(engine, lanes, options.threads, bundle.golden().pixels, size, seconds)
            finally:
                engine.close()


def choose(measurements: Sequence[Measurement]) -> Choice:
    """Of what comes close to the highest rate, the fewest lanes, since those answer a lone image soonest. Raises ValueError if nothing was measured."""
    if not measurements:
        raise ValueError("no engine can serve the bundle here, so there is nothing to choose")
    best: dict[tuple[str, str, int], Measurement] = {}
    for each in measurements:
        key = (each.engine, each.precision, each.lanes)
        if key not in best or each.images_per_second > best[key].images_per_second:
            best[key] = each
    highest = max(each.images_per_second for each in best.values())
    near = [each for each in best.values() if each.images_per_second >= WITHIN * highest]
    taken = min(near, key=lambda each: (each.lanes, -each.images_per_second))
    return Choice(taken.engine, taken.precision, taken.lanes, taken.threads, taken.images_per_second)  # type: ignore[arg-type]  # a Precision from a bundle


def splits(cores: int) -> list[int]:
    """Numbers of lanes that share the cores without a rest: the powers of two among them, and one for each core."""
    return sorted({lanes for lanes in (*(2**power for power in range(cores.bit_length())), cores) if cores % lanes == 0})


def sizes(max_batch: int) -> list[int]:
    return sorted({min(2**power, max_batch) for power in range(max_batch.bit_length() + 1)})


def _opened(bundle: Bundle, artefact: Artefact, options: EngineOptions) -> Engine:
    engine = open_artefact(bundle, artefact, options)
    try:
        golden_gate(engine, bundle, artefact)
    except BaseException:
        engine.close()
        raise
    return engine


def _measure(engine: Engine, lanes: int, threads: int, golden: Pixels, size: int, seconds: float) -> Measurement:
    times = spell(engine.run, lanes, np.resize(golden, (size, *golden.shape[1:])), seconds)
    rate = sum(size * len(its) / sum(its) for its in times)
    return Measurement(engine.name, engine.precision, lanes, threads, size, rate, float(np.median(np.concatenate(times))))
