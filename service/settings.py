"""Every setting of the service, once: name with unit, default, help. The command line, the environment (VITSERVE_*) and README's table follow from it.

Nothing is read here: vitserve.py gives the values, from the command line or else the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_BUNDLE = Path(__file__).parent / "default_bundle"  # of the model that is served when no bundle is named


class SettingsError(ValueError):
    """Settings that contradict one another or the machine; the service rejects to start."""


_PRECISIONS = {
    "tensorrt": ("bf16", "fp16", "fp8"),
    "onnxruntime-cuda": ("bf16", "fp16"),
    "torch": ("fp32", "bf16", "fp16"),
    "openvino": ("fp32", "bf16", "int8"),
    "onnxruntime": ("fp32", "int8"),  # on a CPU, where it has no bf16
}


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Settings:
    host: str = _setting(
        "127.0.0.1", "Address to listen on. 0.0.0.0 serves the network; vitserve has no authentication of its own."
    )
    port: int = _setting(8000, "Port to listen on; 0 takes a free one and logs it.")
    bundle: str = _setting("", "Directory of the bundle to serve; empty serves the model that comes with vitserve.")
    engine: str = _setting(
        "auto",
        "auto, tensorrt, onnxruntime-cuda, torch, openvino or onnxruntime. auto: on a GPU the first that can; else what `vitserve tune` found.",
    )
    precision: str = _setting(
        "auto",
        "auto, fp32, bf16, fp16 or fp8 (GPU), or int8. auto takes the fastest that there is; what is in a bundle lost little enough when made.",
    )
    workers: int = _setting(
        0, "Front processes, which speak HTTP and decode; 0 takes one for every four cores, at most eight."
    )
    engines: int = _setting(0, "Engine processes; 0 takes one for each device. A CPU is one.")
    streams: int = _setting(
        0,
        "Batches that run at once; 0 takes what `vitserve tune` found, or else 1. More pay on many cores, which one batch cannot fill.",
    )
    threads: int = _setting(
        0,
        "Threads per stream; 0 takes what `vitserve tune` found, or else shares the machine's cores among the streams.",
    )
    max_batch: int = _setting(
        8, "Largest batch measured at start. The service settles on the smallest within 5 % of the best throughput."
    )
    decode: str = _setting(
        "cpu",
        "Where JPEGs are decoded: cpu, or gpu, which pays where decode threads are the bottleneck and needs vitserve[gpu-decode].",
    )
    decode_threads: int = _setting(
        0,
        "Threads that decode images in each HTTP worker; 0 shares the machine's cores among the HTTP workers, and takes 32 for the GPU.",
    )
    slots: int = _setting(
        256,
        "Images in the house at once, each holding its pixels, shared among the HTTP workers. A further one is answered 429.",
    )
    timeout_ms: int = _setting(
        10_000,
        "How long a client waits who does not say (timeout_ms in the request). What cannot be done in time is answered 429.",
    )
    max_body_bytes: int = _setting(33_554_432, "Largest request body, enforced while it streams in.")
    max_image_pixels: int = _setting(50_000_000, "Largest image, checked in its header before it is decoded.")
    max_images: int = _setting(64, "Images in one request.")
    jpeg_draft: bool = _setting(
        True,
        "Let libjpeg decode JPEGs at 1/2, 1/4 or 1/8 where three times the needed size remains: faster, not equal to the bit.",
    )
    engine_cache_dir: str = _setting(
        "auto",
        "Where engines keep what they compiled, for a quicker start: a directory; auto, in $XDG_CACHE_HOME/vitserve; or none.",
    )
    plan_dir: str = _setting(
        "auto",
        "Where what is built for a GPU lies, TensorRT's plans above all: a directory; auto, in $XDG_CACHE_HOME/vitserve; or none.",
    )
    while_building: str = _setting(
        "wait",
        "What a start does that must first build a plan, for minutes: wait, or serve by the next engine meanwhile and change over without a loss.",
    )
    torch_compile: bool = _setting(
        False, "Have engine torch compile kernels for every batch size at start, which takes minutes and a C compiler."
    )
    admin_key: str = _setting(
        "",
        "Key for POST /v1/admin/reload, sent as a bearer token; without one that route is closed. SIGHUP needs none.",
    )
    hang_seconds: float = _setting(
        10.0,
        "A process silent for so long, or a batch running for so long and five times its measure, is killed and replaced.",
    )
    drain_seconds: float = _setting(
        30.0, "After SIGTERM, how long admitted work may take to be answered. A second SIGTERM ends it now."
    )
    log_level: str = _setting("info", "debug, info, warning or error.")

    def __post_init__(self) -> None:
        for name in ("max_batch", "slots", "timeout_ms", "max_body_bytes", "max_image_pixels", "max_images"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("workers", "engines", "streams", "threads", "decode_threads"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be 0 (choose for me) or more")
        for name in ("hang_seconds", "drain_seconds"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"port is {self.port}; it must be from 0 to 65535")
        self._one_of("engine", "auto", *_PRECISIONS)
        self._one_of(
            "precision", "auto", *dict.fromkeys(each for precisions in _PRECISIONS.values() for each in precisions)
        )
        self._one_of("decode", "cpu", "gpu")
        self._one_of("while_building", "wait", "serve")
        self._one_of("log_level", "debug", "info", "warning", "error")
        if self.engine != "auto" and self.precision not in ("auto", *_PRECISIONS[self.engine]):
            raise SettingsError(
                f"engine {self.engine} has no {self.precision}; it has {', '.join(_PRECISIONS[self.engine])}"
            )
        if self.engine in ("tensorrt", "onnxruntime-cuda") and self.plan_dir == "none":
            raise SettingsError(f"engine {self.engine} needs a plan_dir, which is none")
        if self.torch_compile and self.engine not in ("auto", "torch"):
            raise SettingsError(f"torch_compile is of engine torch, and engine is {self.engine}")
        if self.slots < self.max_batch * max(1, self.streams):
            raise SettingsError(
                f"{self.slots} slots cannot fill {max(1, self.streams)} streams with batches of {self.max_batch}"
            )
        share = self.slots // max(1, self.workers)
        if self.max_images > share:
            raise SettingsError(
                f"max_images is {self.max_images}, but each of {max(1, self.workers)} HTTP workers has only {share} slots for them"
            )

    def _one_of(self, name: str, *allowed: str) -> None:
        if getattr(self, name) not in allowed:
            raise SettingsError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
