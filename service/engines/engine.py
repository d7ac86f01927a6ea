"""What an engine is. Knows nothing of HTTP, labels or settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vitserve.model.arrays import Outputs, Pixels, Precision


class EngineUnavailableError(RuntimeError):
    """The engine cannot run here: its library, its device or its artifact is missing."""


class DeviceLostError(BaseException):
    """The device will answer nothing more to this process, which therefore must end: another takes over and runs again what this one was running.

    Not an Exception, so that nobody who handles a failed batch takes it for one.
    """


@dataclass(frozen=True)
class EngineOptions:
    engine: str = "auto"
    precision: str = "auto"
    streams: int = 1
    threads: int = 0  # per stream; 0: the machine's cores shared among the streams
    max_batch: int = 8
    engine_cache_dir: str = ""  # where engines keep what they compiled, for a quicker start; empty: nowhere
    plan_dir: str = ""  # where TensorRT's plans and typed graphs lie or are built; empty: neither TensorRT nor ONNX Runtime on CUDA is used
    serve_meanwhile: bool = False  # leave out what has to be built first for minutes; missing_plans() says what that is
    compile: bool = False  # torch: have it make kernels of its own


class Engine(Protocol):
    """Runs batches on one device. Each stream may be used by one thread at a time, different streams at once."""

    name: str
    precision: Precision
    streams: int
    max_batch: int

    def share(self, pixels: Pixels) -> None:
        """Before the first run() with rows: the array that all rows will be of, which the engine may arrange itself for."""
        ...

    def run(self, stream: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
        """uint8 [n, H, W, 3] with 1 ≤ n ≤ max_batch → float32 logits [n, classes], embedding [n, width], owned by the client.

        With ``rows``, those n images of ``pixels`` in this order: then ``pixels`` is the slot table, always the same, which a device may read by itself.
        """
        ...

    def close(self) -> None: ...


def gathered(pixels: Pixels, rows: Sequence[int] | None) -> Pixels:
    """The batch that run() was asked for as one array; a single image is not copied."""
    if rows is None:
        return pixels
    return pixels[rows[0] : rows[0] + 1] if len(rows) == 1 else pixels[rows]
