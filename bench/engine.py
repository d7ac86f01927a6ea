"""Measures engines without the server: images per second at each batch size, in alternation. Needs no torch."""

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

RunBatch = Callable[[int, Pixels], object]  # arguments: the stream, the batch


@dataclass(frozen=True)
class Subject:
    """Something to measure: an engine, or anything else that runs batches."""

    engine: str
    precision: str
    streams: int
    threads: int  # per stream
    run: RunBatch
    close: Callable[[], None] = lambda: None
    share: Callable[[Pixels], None] = lambda pixels: None


@dataclass
class Timings:
    """Results of one subject at one batch size."""

    rates: list[float] = field(default_factory=list)  # images per second, one for each round
    batch_seconds: list[float] = field(default_factory=list)  # of every batch of all rounds

    def row(self, subject: Subject, size: int) -> EngineRow:
        p99 = percentile(self.batch_seconds, 0.99)
        return EngineRow(
            engine=subject.engine,
            precision=subject.precision,
            streams=subject.streams,
            threads=subject.threads,
            batch_size=size,
            images_per_second=statistics.median(self.rates),
            min_images_per_second=min(self.rates),
            max_images_per_second=max(self.rates),
            p50_ms=1000 * statistics.median(self.batch_seconds),
            p99_ms=None if p99 is None else 1000 * p99,
        )


Results = Mapping[tuple[int, int], Timings]  # by index of the subject and batch size


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


def measure_in_rounds(
    subjects: Sequence[Subject],
    pixels: Pixels,
    sizes: Sequence[int],
    seconds: float,
    rounds: int,
    progress: Callable[[], None] = lambda: None,
) -> Results:
    """Measures each subject at each batch size for ``seconds`` in every round.

    The order reverses from round to round, so that a drift in the machine's speed affects all subjects alike. The
    batches lie in shared memory as they do in service: page-aligned, and registered with the engine.
    """
    results = {(index, size): Timings() for index in range(len(subjects)) for size in sizes}
    images = np.frombuffer(mmap.mmap(-1, max(sizes) * pixels[0].nbytes), np.uint8).reshape(-1, *pixels.shape[1:])
    images[:] = np.resize(pixels, images.shape)
    for subject in subjects:
        subject.share(images)
    for number in range(rounds):
        order = range(len(subjects))
        for size in sizes:
            for index in order if number % 2 == 0 else reversed(order):
                times = run_interval(subjects[index].run, subjects[index].streams, images[:size], seconds)
                results[index, size].rates.append(sum(size * len(stream) / sum(stream) for stream in times))
                results[index, size].batch_seconds += [batch for stream in times for batch in stream]
                progress()
    return results


def run_interval(run: RunBatch, streams: int, batch: Pixels, seconds: float) -> list[list[float]]:
    """Runs the batch on all streams at once until the time is up, at least once on each.

    Returns the seconds of every batch, by stream. Raises what ``run`` raises.
    """
    times: list[list[float]] = [[] for _ in range(streams)]
    failures: list[BaseException] = []
    start = threading.Barrier(streams)

    def keep_busy(stream: int) -> None:
        try:
            run(stream, batch)  # not measured: the first batch of a size is slower
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
