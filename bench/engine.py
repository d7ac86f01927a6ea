"""Engines alone: images a second at each batch size, engines taking turns. Needs no torch."""

from __future__ import annotations

import mmap
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vitserve.bench.report import EngineRow, percentile
from vitserve.model.arrays import Pixels
from vitserve.model.bundle.bundle import Artifact, Bundle
from vitserve.service import machine
from vitserve.service.engines.engine import Engine, EngineOptions
from vitserve.service.engines.selection import candidates, open_verified, openable

Run = Callable[[int, Pixels], object]  # a stream, a batch


@dataclass(frozen=True)
class Subject:
    """What is measured: named as in the table, run as an engine runs."""

    engine: str
    precision: str
    streams: int
    threads: int
    run: Run
    close: Callable[[], None] = lambda: None
    share: Callable[[Pixels], None] = lambda pixels: None


@dataclass
class Intervals:
    """What one subject did at one batch size, round by round."""

    rates: list[float] = field(default_factory=list)
    batch_seconds: list[float] = field(default_factory=list)

    def row(self, subject: Subject, size: int) -> EngineRow:
        p99 = percentile(self.batch_seconds, 0.99)
        return EngineRow(
            engine=subject.engine,
            precision=subject.precision,
            streams=subject.streams,
            threads=subject.threads,
            batch_size=size,
            images_per_second=statistics.median(self.rates),
            least_per_second=min(self.rates),
            most_per_second=max(self.rates),
            p50_ms=1000 * statistics.median(self.batch_seconds),
            p99_ms=None if p99 is None else 1000 * p99,
        )


Results = Mapping[tuple[int, int], Intervals]  # by the subject's place and the batch size


def opened(
    bundle: Bundle,
    options: EngineOptions,
    skipped: Callable[[str], None],
    precisions: Sequence[str] = (),
) -> Iterator[tuple[Artifact, Subject]]:
    """Opens every artifact that matches ``options`` and ``precisions`` (empty: all) and passes the golden check.

    ``skipped`` receives the reason for each of the others.
    """

    def opener(artifact: Artifact) -> Engine:
        return open_verified(bundle, artifact, options).engine

    artifacts = (each for each in candidates(bundle, options) if not precisions or each.precision in precisions)
    for artifact, engine in openable(artifacts, opener, lambda rejection: skipped(str(rejection))):
        yield artifact, subject(engine, options)


def subject(engine: Engine, options: EngineOptions) -> Subject:
    threads = options.threads or max(1, machine.cores() // options.streams)
    return Subject(engine.name, engine.precision, options.streams, threads, engine.run, engine.close, engine.share)


def take_turns(
    subjects: Sequence[Subject],
    pixels: Pixels,
    sizes: Sequence[int],
    seconds: float,
    rounds: int,
    progress: Callable[[], None] = lambda: None,
) -> Results:
    """Each subject at each batch size for ``seconds``, again in every round, in turned order: a machine's speed drifts, and each gets its share of it.

    Images lie where they do in service: in memory that the engine was told of, on pages of its own.
    """
    results = {(place, size): Intervals() for place in range(len(subjects)) for size in sizes}
    images = np.frombuffer(mmap.mmap(-1, max(sizes) * pixels[0].nbytes), np.uint8).reshape(-1, *pixels.shape[1:])
    images[:] = np.resize(pixels, images.shape)
    for each in subjects:
        each.share(images)
    for turn in range(rounds):
        places = range(len(subjects)) if turn % 2 == 0 else range(len(subjects) - 1, -1, -1)
        for size in sizes:
            for place in places:
                its = interval(subjects[place].run, subjects[place].streams, images[:size], seconds)
                results[place, size].rates.append(sum(size * len(each) / sum(each) for each in its))
                results[place, size].batch_seconds += [one for each in its for one in each]
                progress()
    return results


def interval(run: Run, streams: int, batch: Pixels, seconds: float) -> list[list[float]]:
    """Seconds of every batch, by stream; all streams at once, as under load, each over and over until the time is up, and once at least."""
    times: list[list[float]] = [[] for _ in range(streams)]
    failures: list[BaseException] = []
    start = threading.Barrier(streams)

    def keep_busy(stream: int) -> None:
        try:
            run(stream, batch)  # the first of a size is slower
            start.wait()
            end = time.perf_counter() + seconds
            while not times[stream] or time.perf_counter() < end:
                began = time.perf_counter()
                run(stream, batch)
                times[stream].append(time.perf_counter() - began)
        except BaseException as error:
            start.abort()
            failures.append(error)

    workers = [threading.Thread(target=keep_busy, args=(stream,)) for stream in range(streams)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return times
