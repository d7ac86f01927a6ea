"""The interface of an engine. An engine knows nothing of HTTP, labels or settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vitserve.model.arrays import Outputs, Pixels, Precision


class EngineUnavailableError(RuntimeError):
    """The engine cannot run here: its library, its device or its artifact is missing."""


class DeviceLostError(BaseException):
    """The device no longer accepts calls from this process, so the process must exit.

    The supervisor starts another one, which runs the interrupted batches again. This is not an ``Exception``, so that
    the handling of a failed batch does not catch it.
    """


@dataclass(frozen=True)
class EngineOptions:
    """How to open an engine. ``auto`` leaves the choice to selection.py."""

    engine: str = "auto"
    precision: str = "auto"
    streams: int = 1
    threads: int = 0  # per stream; 0: the machine's cores divided by the number of streams
    max_batch: int = 8
    engine_cache_dir: str = ""  # for models that the engines compile; empty: no cache
    plan_dir: str = ""  # for TensorRT plans and cast graphs; empty: the engines that need them are not used
    defer_builds: bool = False  # reject a TensorRT plan that is not built yet, instead of building it for minutes
    compile: bool = False  # torch only: torch.compile


class Engine(Protocol):
    """Runs batches on one device. One thread at a time may use a stream; different streams run at the same time."""

    name: str
    precision: Precision
    streams: int
    max_batch: int

    def share(self, pixels: Pixels) -> None:
        """Registers the slot table's pixels, uint8 [slots, H, W, C]. Call it once, before run() with ``rows``."""
        ...

    def run(self, stream: int, pixels: Pixels, rows: Sequence[int] | None = None) -> Outputs:
        """uint8 [n, H, W, C] with 1 ≤ n ≤ max_batch → float32 logits [n, classes] and embedding [n, width].

        With ``rows``, ``pixels`` is the array given to share(), and the batch is those rows of it, in this order.
        The returned arrays are new; a later run does not overwrite them.
        """
        ...

    def close(self) -> None: ...


def select_rows(pixels: Pixels, rows: Sequence[int] | None) -> Pixels:
    """The batch of run() as one array. A single image is not copied."""
    if rows is None:
        return pixels
    return pixels[rows[0] : rows[0] + 1] if len(rows) == 1 else pixels[rows]
