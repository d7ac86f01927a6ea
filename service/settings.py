"""Every setting of the service: name with unit, default and help text.

The command line, the environment variables (VITSERVE_*) and the README's table are derived from this class. It reads
nothing itself: vitserve/cli passes the values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitserve.service.engines.catalog import ENGINES, PRECISIONS

DEFAULT_BUNDLE = Path(__file__).parent / "default_bundle"  # of the default model


class SettingsError(ValueError):
    """A setting is invalid, or settings contradict each other or the machine. The service does not start."""


def _setting(default: Any, help_text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices})


_PLAN_DIR_ENGINES = tuple(name for name, kind in ENGINES.items() if kind.needs_plan_dir)


@dataclass(frozen=True)
class Settings:
    host: str = _setting(
        "127.0.0.1",
        "Address to listen on. 0.0.0.0 accepts connections from the network: vitserve has no authentication.",
    )
    port: int = _setting(8000, "Port to listen on. 0: a free port, which is logged.")
    bundle: str = _setting("", "Directory of the bundle to serve. Empty: the default model.")
    engine: str = _setting(
        "auto",
        f"auto, {', '.join(ENGINES)}. auto: the fastest GPU engine that works here, otherwise the result of "
        "`vitserve tune`, otherwise the fastest CPU engine.",
        ("auto", *ENGINES),
    )
    precision: str = _setting(
        "auto",
        f"auto, {', '.join(PRECISIONS)}. auto: the fastest precision that the bundle and the engine support.",
        ("auto", *PRECISIONS),
    )
    workers: int = _setting(
        0,
        "HTTP workers, which handle requests and decode images. 0: one per four cores, or one per core if the network "
        "takes less than a quarter of a millisecond per image; at most eight.",
    )
    engines: int = _setting(0, "Engine workers. 0: one per GPU, or one for the CPU.")
    streams: int = _setting(
        0,
        "Batches that an engine worker runs at the same time. 0: the result of `vitserve tune`, otherwise one per "
        "core, at most eight, for a small network on a CPU, and 1 for others. More than one helps on CPUs "
        "with many cores.",
    )
    threads: int = _setting(
        0,
        "Threads per stream. 0: the result of `vitserve tune`, otherwise 1 for a small network on a CPU, and the "
        "machine's cores divided by the number of streams for others.",
    )
    max_batch: int = _setting(
        8,
        "Largest batch size. All sizes up to it are measured at start-up, and the smallest one within 5% of the best "
        "throughput is preferred.",
    )
    decode: str = _setting(
        "cpu",
        "Where JPEGs are decoded: cpu or gpu. gpu helps when decoding is the bottleneck. It requires "
        "vitserve[gpu-decode].",
        ("cpu", "gpu"),
    )
    decode_threads: int = _setting(
        0,
        "Threads per HTTP worker that decode images. 0: the machine's cores divided by the number of HTTP workers, "
        "without those that are added for a light network; 32 with decode gpu.",
    )
    slots: int = _setting(
        256, "Maximum number of in-flight images across all HTTP workers. Further images are rejected with 429."
    )
    timeout_ms: int = _setting(
        10_000,
        "Default request deadline in milliseconds. A request may override it with `timeout_ms`. Images that cannot "
        "meet their deadline are rejected with 429.",
    )
    max_body_bytes: int = _setting(33_554_432, "Maximum size of a request body, checked while it is received.")
    max_image_pixels: int = _setting(
        50_000_000, "Maximum number of pixels of an image, checked in its header before decoding."
    )
    max_images: int = _setting(64, "Maximum number of images per request.")
    jpeg_draft: bool = _setting(
        True,
        "Decode a JPEG at 1/2, 1/4 or 1/8 of its size if at least three times the needed size remains. This is faster "
        "and changes the pixels slightly.",
    )
    engine_cache_dir: str = _setting(
        "auto",
        "Directory where engines cache compiled models for a faster start. auto: in $XDG_CACHE_HOME/vitserve. none: no "
        "cache.",
    )
    plan_dir: str = _setting(
        "auto",
        "Directory for TensorRT plans, compiled kernels and other files that are made for this machine's GPU. auto: in "
        f"$XDG_CACHE_HOME/vitserve. none: {' and '.join(_PLAN_DIR_ENGINES)} are not used, except for plans that the "
        "bundle has.",
    )
    while_building: str = _setting(
        "wait",
        "What to do while a missing TensorRT plan is built, which takes seconds to minutes. wait: become ready "
        "afterwards. serve: use the next engine until then and switch without downtime.",
        ("wait", "serve"),
    )
    torch_compile: bool = _setting(
        False, "Use torch.compile in engine torch. It takes minutes at start-up and requires a C compiler."
    )
    admin_key: str = _setting(
        "",
        "Bearer token for POST /v1/admin/reload. Empty: that route is disabled. Reloading with SIGHUP needs no token.",
    )
    hang_seconds: float = _setting(
        10.0,
        "A worker is restarted when it sends no heartbeat for this long, or when a batch exceeds both this and 5× its "
        "expected duration.",
    )
    drain_seconds: float = _setting(
        30.0,
        "After SIGTERM, how long admitted requests may take to finish. A second SIGTERM stops the service at once.",
    )
    log_level: str = _setting("info", "debug, info, warning or error.", ("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()
        self._check_engine()
        self._check_slots()

    def _check_numbers(self) -> None:
        for name in ("max_batch", "slots", "timeout_ms", "max_body_bytes", "max_image_pixels", "max_images"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("workers", "engines", "streams", "threads", "decode_threads"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 0 (0: automatic)")
        for name in ("hang_seconds", "drain_seconds"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be greater than 0")
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"port is {self.port}; it must be from 0 to 65535")

    def _check_choices(self) -> None:
        for name, setting in self.__dataclass_fields__.items():
            choices = setting.metadata["choices"]
            if choices and getattr(self, name) not in choices:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")

    def _check_engine(self) -> None:
        if self.torch_compile and self.engine not in ("auto", "torch"):
            raise SettingsError(f"torch_compile requires engine torch, but engine is {self.engine}")
        if self.engine == "auto":
            return
        kind = ENGINES[self.engine]
        if self.precision not in ("auto", *kind.precisions):
            raise SettingsError(
                f"engine {self.engine} does not support {self.precision}; it supports {', '.join(kind.precisions)}"
            )
        if kind.needs_plan_dir and self.plan_dir == "none":
            raise SettingsError(f"engine {self.engine} requires plan_dir, but plan_dir is none")

    def _check_slots(self) -> None:
        streams, workers = max(1, self.streams), max(1, self.workers)
        if self.slots < streams * self.max_batch:
            raise SettingsError(
                f"slots is {self.slots}; streams × max_batch is {streams} × {self.max_batch} and needs at least "
                f"{streams * self.max_batch} slots"
            )
        slots_per_worker = self.slots // workers
        if self.max_images > slots_per_worker:
            raise SettingsError(
                f"max_images is {self.max_images}, but slots / workers is {self.slots} / {workers} and leaves "
                f"{slots_per_worker} slots per HTTP worker"
            )
