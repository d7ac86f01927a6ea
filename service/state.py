"""The life of the service: starting → ready → draining, or broken, and the reasons it gives. Imported by app.py and serve.py."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from model.bundle import Bundle, open_bundle
from model.preprocess import Decoder, prepare_pillow
from service.engines.open import EngineOptions, Opened, open_engine
from service.metrics import Metrics
from service.runtime import Runtime, warm_up
from service.settings import Settings

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent / "default_bundle"


@dataclass
class Serving:
    """What exists once the engine is open, warm and proven."""

    bundle: Bundle
    opened: Opened
    runtime: Runtime


@dataclass
class State:
    settings: Settings
    metrics: Metrics
    serving: Serving | None = None
    failure: str | None = None
    draining: bool = False
    _starting: asyncio.Task[None] | None = None

    def reasons(self) -> list[str]:
        """Why the service cannot answer well now; empty when it can."""
        reasons = []
        if self.draining:
            reasons.append("draining: the service is stopping")
        if self.failure is not None:
            reasons.append(self.failure)
        elif self.serving is None:
            reasons.append("starting: the engine is being opened, warmed up and proven")
        elif self.serving.runtime.broken is not None:
            reasons.append(self.serving.runtime.broken)
        self.metrics.ready.set(not reasons)
        return reasons

    def begin(self) -> None:
        """Opens the engine in the background, so that liveness and the reasons can be asked meanwhile."""
        prepare_pillow()
        self._starting = asyncio.create_task(self._start())

    async def end(self) -> None:
        if self._starting is not None:
            await self._starting
        if self.serving is not None:
            await self.serving.runtime.drain()

    async def _start(self) -> None:
        try:
            bundle, opened, seconds = await asyncio.to_thread(_open, self.settings)
        except Exception as error:  # whatever it is, the service lives on, never becomes ready, and says why
            self.failure = f"{type(error).__name__}: {error}"
            log.critical("the service cannot become ready: %s", self.failure)
            return
        manifest, settings = bundle.manifest, self.settings
        runtime = Runtime(
            engine=opened.engine,
            decoder=Decoder(manifest.preprocessing, settings.max_image_pixels, settings.jpeg_draft),
            metrics=self.metrics,
            seconds=seconds,
            slots=settings.slots,
            decode_threads=settings.decode_threads or os.cpu_count() or 1,
            loop=asyncio.get_running_loop(),
        )
        runtime.start()
        self.serving = Serving(bundle, opened, runtime)
        engine = opened.engine
        self.metrics.model_info.labels(manifest.name, manifest.version, engine.name, engine.precision).set(1)
        log.info("ready: %s %s on %s in %s, batches of up to %d", manifest.name, manifest.version, engine.name, engine.precision, runtime.scheduler.knee)
        self.reasons()


def _open(settings: Settings) -> tuple[Bundle, Opened, dict[int, float]]:
    bundle = open_bundle(Path(settings.bundle) if settings.bundle else EMBEDDED)
    options = EngineOptions(settings.engine, settings.precision, settings.lanes, settings.threads, settings.max_batch)
    opened = open_engine(bundle, options)
    return bundle, opened, warm_up(opened.engine, bundle.manifest.preprocessing.image_size)
