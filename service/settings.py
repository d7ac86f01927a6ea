"""Every setting of the service: name with unit, default and help text.

The command line, the environment variables (VITSERVE_*) and the README's table are derived from this class. It reads
nothing itself: vitserve/cli passes the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitserve.service.engines.catalog import ENGINES, PRECISIONS
from vitserve.service.http_settings import HttpSettings, SettingsError, check_least, setting

__all__ = ["DEFAULT_BUNDLE", "LEAST_IMAGE_MEMORY_BYTES", "Settings", "SettingsError"]

DEFAULT_BUNDLE = Path(__file__).parent / "default_bundle"  # of the default model
MOST_THREAD_BYTES = 32 * 2**20  # that decoding an image on a decode thread may take; larger ones have processes
LEAST_IMAGE_MEMORY_BYTES = 64 * 2**20

_PLAN_DIR_ENGINES = tuple(name for name, kind in ENGINES.items() if kind.needs_plan_dir)
_LEAST = {"max_batch": 1, "slots": 1, "max_image_pixels": 1}
_AUTOMATIC = dict.fromkeys(("workers", "engines", "streams", "threads", "decode_threads", "image_memory_bytes"), 0)


@dataclass(frozen=True)
class Settings(HttpSettings):
    bundle: str = setting("", "Directory of the bundle to serve. Empty: the default model.")
    engine: str = setting(
        "auto",
        f"auto, {', '.join(ENGINES)}. auto: the fastest GPU engine that works here, otherwise the result of "
        "`vitserve tune`, otherwise the fastest CPU engine.",
        ("auto", *ENGINES),
    )
    precision: str = setting(
        "auto",
        f"auto, {', '.join(PRECISIONS)}. auto: the fastest precision that the bundle and the engine support.",
        ("auto", *PRECISIONS),
    )
    workers: int = setting(
        0,
        "HTTP workers, which handle requests and decode images. 0: one per four cores, or one per core if the network "
        "takes less than a quarter of a millisecond per image; at most eight.",
    )
    engines: int = setting(0, "Engine workers. 0: one per GPU, or one for the CPU.")
    streams: int = setting(
        0,
        "Batches that an engine worker runs at the same time. 0: the result of `vitserve tune`, otherwise one per "
        "core, at most eight, for a small network on a CPU, and 1 for others. More than one helps on CPUs "
        "with many cores.",
    )
    threads: int = setting(
        0,
        "Threads per stream. 0: the result of `vitserve tune`, otherwise 1 for a small network on a CPU, and the "
        "machine's cores divided by the number of streams for others.",
    )
    max_batch: int = setting(
        8,
        "Largest batch size. All sizes up to it are measured at start-up, and the smallest one within 5% of the best "
        "throughput is preferred.",
    )
    decode: str = setting(
        "cpu",
        "Where JPEGs are decoded: cpu or gpu. gpu helps when decoding is the bottleneck. It requires "
        "vitserve[gpu-decode].",
        ("cpu", "gpu"),
    )
    decode_threads: int = setting(
        0,
        "Threads per HTTP worker that decode images. 0: the machine's cores divided by the number of HTTP workers, "
        "without those that are added for a light network; 32 with decode gpu.",
    )
    slots: int = setting(
        256, "Maximum number of in-flight images across all HTTP workers. Further images are rejected with 429."
    )
    max_image_pixels: int = setting(
        50_000_000, "Maximum number of pixels of an image, checked in its header before decoding."
    )
    max_decode_seconds: float = setting(
        10.0, "Maximum time for decoding one large image. Afterwards it is rejected with 422, and its decoder is ended."
    )
    image_memory_bytes: int = setting(
        0,
        "Memory for request bodies and for decoding, of all HTTP workers together. 0: half of the memory limit of the "
        "container or machine, at most 4 GiB.",
    )
    decode_mode: str = setting(
        "fast",
        "exact: the same pixels as the source library. fast: decode a JPEG at 1/2, 1/4 or 1/8 of its size if at least "
        "three times the needed size remains (six times for models below 128 pixels), and resize only the part "
        "that the crop keeps. fastest: three times for every model.",
        ("exact", "fast", "fastest"),
    )
    engine_cache_dir: str = setting(
        "auto",
        "Directory where engines cache compiled models for a faster start. auto: in $XDG_CACHE_HOME/vitserve. none: no "
        "cache.",
    )
    plan_dir: str = setting(
        "auto",
        "Directory for TensorRT plans, compiled kernels and other files that are made for this machine's GPU. auto: in "
        f"$XDG_CACHE_HOME/vitserve. none: {' and '.join(_PLAN_DIR_ENGINES)} are not used, except for plans that the "
        "bundle has.",
    )
    while_building: str = setting(
        "wait",
        "What to do while a missing TensorRT plan is built, which takes seconds to minutes. wait: become ready "
        "afterwards. serve: use the next engine until then and switch without downtime.",
        ("wait", "serve"),
    )
    torch_compile: bool = setting(
        False, "Use torch.compile in engine torch. It takes minutes at start-up and requires a C compiler."
    )
    hang_seconds: float = setting(
        10.0,
        "A worker is restarted when it sends no heartbeat for this long, or when a batch exceeds both this and 5× its "
        "expected duration.",
    )
    drain_seconds: float = setting(
        30.0,
        "After SIGTERM, how long admitted requests may take to finish. A second SIGTERM stops the service at once.",
    )
    log_level: str = setting("info", "debug, info, warning or error.", ("debug", "info", "warning", "error"))
    log_format: str = setting(
        "text", "text, or json: one JSON object per line, of every process, for log collectors.", ("text", "json")
    )

    @property
    def body_memory_bytes(self) -> int:
        """Of all HTTP workers together."""
        return self.image_memory_bytes // 4

    def thread_memory_bytes(self, workers: int) -> int:
        """Of one decode thread, with so many HTTP workers. All threads together take at most half of the rest."""
        rest = self.image_memory_bytes - self.body_memory_bytes
        return min(MOST_THREAD_BYTES, rest // (2 * self._decode_threads(workers)))

    def process_memory_bytes(self, workers: int) -> int:
        """Of all decode processes together, with so many HTTP workers."""
        threads = self._decode_threads(workers) * self.thread_memory_bytes(workers)
        return self.image_memory_bytes - self.body_memory_bytes - threads

    def _decode_threads(self, workers: int) -> int:
        return max(1, workers) * max(1, self.decode_threads)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, _LEAST)
        check_least(self, _AUTOMATIC, " (0: automatic)")
        if self.image_memory_bytes:
            check_least(self, {"image_memory_bytes": LEAST_IMAGE_MEMORY_BYTES}, " (0: automatic)")
        self._check_engine()
        self._check_slots()

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
