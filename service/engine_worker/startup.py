"""Opens a bundle in an engine worker: chooses and verifies the engine, warms it up, makes the slot table that it founds."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitserve.model.bundle.bundle import MANIFEST, Bundle, BundleError, open_bundle, sha256
from vitserve.service.engine_worker.tuning_cache import load_tuning_result
from vitserve.service.engines.engine import Engine, EngineOptions
from vitserve.service.engines.selection import NoEngineError, Opened, open_engine
from vitserve.service.ipc import memory_layout
from vitserve.service.ipc.control_channel import Channel
from vitserve.service.ipc.memory_layout import Shape
from vitserve.service.ipc.model_info import ModelInfo
from vitserve.service.machine import cache_dir, plan_dir
from vitserve.service.settings import DEFAULT_BUNDLE, Settings

log = logging.getLogger(__name__)

WARM_UP_SECONDS = 0.5  # after which only batch sizes that are powers of two are still measured


class BundleRejectedError(Exception):
    """The bundle cannot be served: ``result`` is for the metric, the message for people."""

    def __init__(self, result: str, reason: str) -> None:
        super().__init__(reason)
        self.result = result


class Progress:
    """Tells the supervisor what the opening is at, so that it is patient, and /readyz can say it; a few times a second at most."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._next = channel, 0.0
        self._trying: str | None = None

    def __call__(self, step: str) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 0.5
            self._say(step)

    def trying(self, engine: str) -> None:
        """Always told: if this process dies, it is what the next one may have to do without."""
        self._trying = engine
        self._say(f"opening {engine}")

    def _say(self, step: str) -> None:
        self._channel.send({"kind": "progress", "step": step[:1000], "trying": self._trying})


def open_model(settings: Settings, progress: Progress, skipped: Sequence[str]) -> tuple[Bundle, Opened, EngineOptions]:
    """Raises Refused."""
    try:
        bundle = open_bundle(Path(settings.bundle) if settings.bundle else DEFAULT_BUNDLE)
    except BundleError as error:
        raise BundleRejectedError("bad_bundle", str(error)) from error
    tuning_result = load_tuning_result(sha256(bundle.path / MANIFEST))
    if tuning_result is not None and (
        settings.engine not in ("auto", tuning_result.engine)
        or settings.precision not in ("auto", tuning_result.precision)
    ):
        tuning_result = None  # another engine was asked for than the one that was measured
    streams = settings.streams or (
        min(tuning_result.streams, settings.slots // settings.max_batch) if tuning_result else 1
    )
    threads = settings.threads or (tuning_result.threads if tuning_result and not settings.streams else 0)
    plans = {"none": "", "auto": str(plan_dir())}.get(settings.plan_dir, settings.plan_dir)
    options = EngineOptions(
        settings.engine,
        settings.precision,
        streams,
        threads,
        settings.max_batch,
        _engine_cache_dir(settings),
        plans,
        defer_builds=settings.while_building == "serve",
        compile=settings.torch_compile,
    )
    try:
        first = (tuning_result.engine, tuning_result.precision) if tuning_result else None
        return bundle, open_engine(bundle, options, first, progress, progress.trying, skipped), options
    except NoEngineError as error:
        raise BundleRejectedError("no_engine", str(error)) from error


def _engine_cache_dir(settings: Settings) -> str:
    """Empty where there is none or it cannot be written: then engines compile at every start."""
    if settings.engine_cache_dir == "none":
        return ""
    directory = cache_dir() / "compiled" if settings.engine_cache_dir == "auto" else Path(settings.engine_cache_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return str(directory)
    except OSError as error:
        log.warning("engines are compiled at every start: %s", error)
        return ""


def warm_up(engine: Engine, image_size: int, patience_seconds: float = WARM_UP_SECONDS) -> dict[int, float]:
    """Runs batches of every size and returns the seconds each took: kernels are chosen, memory is touched, and the scheduler has its figures.

    A quick batch is run three times and the best counts; a slow one is not repeated, because the start waits for it. Powers of two come first, and what is
    left after ``patience_seconds`` is taken to lie on the line between its neighbors: on none of the engines does the first batch of a further size cost more.
    """
    sizes = range(1, engine.max_batch + 1)
    important = [size for size in sizes if size & (size - 1) == 0 or size == engine.max_batch]
    began, seconds = time.monotonic(), dict[int, float]()
    for size in [*important, *(each for each in sizes if each not in important)]:
        if size not in important and time.monotonic() - began >= patience_seconds:
            break
        pixels = np.zeros((size, image_size, image_size, 3), np.uint8)
        times: list[float] = []
        if size == 1:
            engine.run(
                0, pixels
            )  # not counted: the first of all is slower by a fifth, and of a slow engine it would be the only one of its size
        while len(times) < 3 and sum(times) < 0.1:
            started = time.monotonic()
            engine.run(0, pixels)
            times.append(time.monotonic() - started)
        seconds[size] = min(times)
    known = sorted(seconds)
    return dict(zip(sizes, np.interp(sizes, known, [seconds[size] for size in known]).tolist(), strict=True))


def describe(bundle: Bundle, opened: Opened) -> ModelInfo:
    manifest, engine = bundle.manifest, opened.engine
    rejected = [vars(each) for each in opened.rejected]
    serving = {
        "engine": engine.name,
        "precision": engine.precision,
        "parity": vars(opened.parity),
        "rejected": rejected,
        "streams": engine.streams,
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
    )


def create_slot_table(
    bundle: Bundle, opened: Opened, model_info: ModelInfo, settings: Settings, workers: int, engines: int
) -> int:
    engine, golden = opened.engine, bundle.golden()
    classes, width = golden.reference.logits.shape[1], golden.reference.embedding.shape[1]
    shape = Shape(
        workers,
        settings.slots // workers,
        engines,
        engine.streams,
        engine.max_batch,
        golden.pixels.shape[1],
        classes,
        width,
    )
    return memory_layout.create(shape, model_info.to_json())
