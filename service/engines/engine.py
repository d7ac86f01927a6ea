"""What an engine is. Knows nothing of HTTP, labels or settings."""

from __future__ import annotations

from typing import Protocol

from model.parity import Outputs, Precision
from model.preprocess import Pixels


class EngineUnavailable(RuntimeError):
    """The engine cannot run here: its library, its device or its artefact is missing."""


class Engine(Protocol):
    """Runs batches on one device. Each lane may be used by one thread at a time, different lanes at once."""

    name: str
    precision: Precision
    lanes: int
    max_batch: int

    def run(self, lane: int, pixels: Pixels) -> Outputs:
        """uint8 [n, H, W, 3] with 1 ≤ n ≤ max_batch → float32 logits [n, classes], embedding [n, width], owned by the caller."""
        ...

    def close(self) -> None: ...
