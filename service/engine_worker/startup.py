"""The start of an engine worker: choose and verify the engine, warm it up, create the slot table."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from vitserve.model.bundle.bundle import GRAPH, MANIFEST, WEIGHTS, Bundle, BundleError, open_bundle, sha256
from vitserve.model.bundle.calibration import temperature_of
from vitserve.service import cache_directory, machine
from vitserve.service.cache_directory import CacheError
from vitserve.service.engine_worker.tuning_cache import TuningResult, load_tuning_result
from vitserve.service.engines.catalog import ENGINES
from vitserve.service.engines.engine import Engine, EngineOptions
from vitserve.service.engines.selection import NoEngineError, Opened, open_engine
from vitserve.service.ipc import control_messages, memory_layout
from vitserve.service.ipc.control_channel import Channel
from vitserve.service.ipc.memory_layout import Shape
from vitserve.service.ipc.model_info import ModelInfo
from vitserve.service.settings import DEFAULT_BUNDLE, Settings

log = logging.getLogger(__name__)

SMALL_SECONDS = 0.003  # a network is small if one thread needs at most this for an image
LIGHT_SECONDS = 0.00025  # a network is light if an image of a full batch takes less
MAX_STREAMS = 8  # of a small network
SMALL_BYTES = 32_000_000  # of the graph in float32, above which a network is not taken for small
WARM_UP_SECONDS = 0.5  # after which only the batch sizes that are powers of two are still measured
SHORT_SECONDS = 0.005  # of measuring a batch size: a batch of a light network takes less than the noise of a machine
PROGRESS_SECONDS = 0.5  # between two progress messages


class BundleRejectedError(Exception):
    """The bundle cannot be served. ``result`` is the label of vitserve_reloads_total."""

    def __init__(self, result: Literal["bad_bundle", "no_engine", "changed"], reason: str) -> None:
        super().__init__(reason)
        self.result = result


class Progress:
    """Reports the current step of the start to the supervisor. /readyz shows it, and it resets the start timeout."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._next = channel, 0.0
        self._trying: str | None = None

    def __call__(self, step: str) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + PROGRESS_SECONDS
            self._send(step)

    def trying(self, engine: str) -> None:
        """Sent without delay: if loading this engine crashes the process, the supervisor has to know which it was."""
        self._trying = engine
        self._send(f"loading {engine}")

    def _send(self, step: str) -> None:
        self._channel.send(control_messages.Progress(step[:1000], self._trying))


class OpenedModel(NamedTuple):
    bundle: Bundle
    opened: Opened
    options: EngineOptions
    seconds: dict[int, float]  # see warm_up()
    threads: int  # per stream; 0: the engine's choice


def open_model(settings: Settings, progress: Progress, skipped: Sequence[str]) -> OpenedModel:
    """Opens and warms up the engine. Raises BundleRejectedError."""
    try:
        bundle = open_bundle(Path(settings.bundle) if settings.bundle else DEFAULT_BUNDLE)
    except BundleError as error:
        raise BundleRejectedError("bad_bundle", str(error)) from error
    tuning_result = _applicable_tuning_result(settings, bundle)
    options = _engine_options(settings, tuning_result)
    small = for_small_network(bundle, options, settings.streams or settings.slots // settings.max_batch)
    first = (tuning_result.engine, tuning_result.precision) if tuning_result else None
    try:
        opened = open_engine(bundle, small, first, progress, progress.trying, skipped)
        seconds = warm_up(opened.engine, bundle.manifest.preprocessing.shape)
        threads = small.threads
        if small is not options:
            opened, seconds, threads = with_measured_streams(bundle, opened, options, seconds)
    except NoEngineError as error:
        raise BundleRejectedError("no_engine", str(error)) from error
    return OpenedModel(bundle, opened, options, seconds, threads)


def _applicable_tuning_result(settings: Settings, bundle: Bundle) -> TuningResult | None:
    """None if the settings name another engine or precision than the one that was measured to be the fastest."""
    tuning_result = load_tuning_result(sha256(bundle.path / MANIFEST))
    if tuning_result is None:
        return None
    applies = settings.engine in ("auto", tuning_result.engine)
    applies &= settings.precision in ("auto", tuning_result.precision)
    return tuning_result if applies else None


def _engine_options(settings: Settings, tuning_result: TuningResult | None) -> EngineOptions:
    streams, threads = settings.streams or 1, settings.threads
    if tuning_result is not None and not settings.streams:
        streams = min(tuning_result.streams, settings.slots // settings.max_batch)
        threads = settings.threads or tuning_result.threads
    return EngineOptions(
        settings.engine,
        settings.precision,
        streams,
        threads,
        settings.max_batch,
        _engine_cache_dir(settings),
        _plan_dir(settings),
        defer_builds=settings.while_building == "serve",
        compile=settings.torch_compile,
    )


def _engine_cache_dir(settings: Settings) -> str:
    """Empty if no directory is set or it cannot be used: then engines compile at every start."""
    if settings.engine_cache_dir == "none":
        return ""
    try:
        base = machine.cache_dir() if settings.engine_cache_dir == "auto" else Path(settings.engine_cache_dir)
        directory = cache_directory.private_directory(base, "compiled")
        cache_directory.check_writable(directory)
        return str(directory)
    except CacheError as error:
        log.warning("cannot use the engine cache, so engines compile at every start: %s", error)
        return ""


def _plan_dir(settings: Settings) -> str:
    """Empty if no directory is set or it cannot be used: then the engines that need plans are not used."""
    if settings.plan_dir == "none":
        return ""
    try:
        automatic = settings.plan_dir == "auto"
        return str(machine.plan_dir() if automatic else cache_directory.usable_directory(Path(settings.plan_dir)))
    except CacheError as error:
        if machine.gpus():
            log.warning("cannot use the directory for plans, so the engines that need it are not used: %s", error)
        return ""


def startup_hints(settings: Settings, bundle: Bundle, engine: str) -> list[str]:
    """Log lines about what the user may want to change: the model that is served, and its precision."""
    if not settings.bundle:
        name, labels = bundle.manifest.name, bundle.labels
        return [
            f"no model configured: serving the bundled demonstration model {name}, which classifies CIFAR-10 images"
            f" into {len(labels)} classes ({', '.join(labels)}); to serve your own, run `vitserve serve SOURCE`"
        ]
    has_int8 = any(artifact.precision == "int8" for artifact in bundle.manifest.artifacts)
    if "int8" in ENGINES[engine].cpu and settings.precision == "auto" and not has_int8 and machine.multiplies_int8():
        return [
            "this CPU has int8 instructions, but the bundle has no int8 artifact; int8 may be faster: to add it, run"
            " `vitserve export SOURCE --output BUNDLE --images DIR` with a directory of typical images"
        ]
    return []


def warm_up(engine: Engine, shape: tuple[int, int, int], patience_seconds: float = WARM_UP_SECONDS) -> dict[int, float]:
    """Runs zeros and returns the duration of a batch in seconds by its size, from 1 to the engine's max_batch.

    ``shape``: height, width and channels of an image.

    The libraries choose their kernels and touch their memory now, and the scheduler gets its first measurements.
    A short batch runs for a few milliseconds, at least three times, and the shortest duration counts. A long batch runs
    once, because the start waits for it. Powers of two are measured first. The sizes that are left after
    ``patience_seconds`` are interpolated linearly: with every engine, the first batch of a new size takes no longer
    than later ones.
    """
    sizes = range(1, engine.max_batch + 1)
    important = [size for size in sizes if size & (size - 1) == 0 or size == engine.max_batch]
    began, seconds = time.monotonic(), dict[int, float]()
    for size in [*important, *(size for size in sizes if size not in important)]:
        if size not in important and time.monotonic() - began >= patience_seconds:
            break
        pixels = np.zeros((size, *shape), np.uint8)
        durations: list[float] = []
        if size == 1:
            engine.run(0, pixels)  # not counted: the very first batch takes a fifth longer
        while sum(durations) < SHORT_SECONDS or (len(durations) < 3 and sum(durations) < 0.1):
            started = time.monotonic()
            engine.run(0, pixels)
            durations.append(time.monotonic() - started)
        seconds[size] = min(durations)
    known = sorted(seconds)
    return dict(zip(sizes, np.interp(sizes, known, [seconds[size] for size in known]).tolist(), strict=True))


def for_small_network(bundle: Bundle, options: EngineOptions, max_streams: int) -> EngineOptions:
    """The options to open a network with that may be small: streams of one thread.

    Threads that share a small batch wait for each other, and much longer if one of them waits for its core while HTTP
    and decoding use it. Streams of one thread do not wait. Options with streams or threads, which are set or tuned, are
    not changed.
    """
    automatic = not options.threads and options.streams == 1 and machine.cores() > 1 and not machine.gpus()
    size = sum(file.stat().st_size for file in (bundle.path / GRAPH, bundle.path / WEIGHTS) if file.exists())
    if not automatic or size > SMALL_BYTES:
        return options
    return dataclasses.replace(options, threads=1, streams=min(machine.cores(), MAX_STREAMS, max_streams))


def with_measured_streams(
    bundle: Bundle, opened: Opened, options: EngineOptions, seconds: dict[int, float]
) -> tuple[Opened, dict[int, float], int]:
    """The engine, its warm_up() results, and its threads per stream.

    Opens it again if it was opened for_small_network() and is not small.

    A light network needs one stream of one thread: its cores handle HTTP. ``options`` are those of other networks.
    """
    if is_light(seconds) and opened.engine.streams > 1:
        options = dataclasses.replace(options, threads=1)
    elif is_light(seconds) or seconds[1] <= SMALL_SECONDS:
        log.info("the network is small: streams: %d, threads per stream: 1", opened.engine.streams)
        return opened, seconds, 1
    opened.engine.close()
    engine, precision = opened.engine.name, opened.engine.precision
    if options.threads:
        log.info("the network is light: streams: 1, threads per stream: 1")
    again = open_engine(bundle, dataclasses.replace(options, engine=engine, precision=precision))
    seconds = warm_up(again.engine, bundle.manifest.preprocessing.shape)
    return dataclasses.replace(opened, engine=again.engine), seconds, options.threads


def is_light(seconds: Mapping[int, float]) -> bool:
    """Whether HTTP and decoding take most of the CPU time of a request. ``seconds``: see warm_up()."""
    return min(duration / size for size, duration in seconds.items()) < LIGHT_SECONDS


def describe(bundle: Bundle, opened: Opened, threads: int) -> ModelInfo:
    """``threads``: per stream; 0: the engine's choice."""
    manifest, engine = bundle.manifest, opened.engine
    serving = {
        "engine": engine.name,
        "precision": engine.precision,
        "parity": vars(opened.parity),
        "rejected": [vars(rejection) for rejection in opened.rejected],
        "streams": engine.streams,
        "threads": threads,
    }
    return ModelInfo(
        manifest.name,
        manifest.version,
        sha256(bundle.path / MANIFEST),
        bundle.labels,
        manifest.preprocessing,
        engine.name,
        engine.precision,
        bundle.summary() | {"serving": serving},
        manifest.activation,
        temperature_of(manifest.probability_calibration),
    )


def create_slot_table(
    bundle: Bundle, opened: Opened, model_info: ModelInfo, settings: Settings, workers: int, engines: int
) -> int:
    """Returns a file descriptor. Raises BundleRejectedError if the memory cannot be allocated."""
    engine, golden = opened.engine, bundle.golden()
    height, width, channels = golden.pixels.shape[1:]
    shape = Shape(
        workers=workers,
        slots_per_worker=settings.slots // workers,
        engines=engines,
        streams=engine.streams,
        max_batch=engine.max_batch,
        image_size=height,
        classes=golden.reference.logits.shape[1],
        width=width,
        channels=channels,
        embedding=golden.reference.embedding.shape[1],
    )
    try:
        return memory_layout.create(shape, model_info.to_json())
    except OSError as error:
        mebibytes = memory_layout.regions(shape)["logits"].end >> 20
        reason = f"{mebibytes} MiB of shared memory for {shape.slots} slots cannot be allocated: {error.strerror}"
        raise BundleRejectedError("no_engine", f"{reason}; lower the setting slots, or raise the limit") from error
