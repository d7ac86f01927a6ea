"""The source of a bundle: a network in torch, or an ONNX file. The export needs nothing else of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from vitserve.model.arrays import Activation, Outputs, Pixels
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import NetworkConfig


class SourceModel(Protocol):
    """The methods take pixels, uint8 [n, H, W, C], in any number."""

    @property
    def config(self) -> NetworkConfig: ...

    @property
    def architecture(self) -> str: ...

    @property
    def preprocessing(self) -> Preprocessing: ...

    @property
    def reference(self) -> str:
        """The owner of the network that computes the golden outputs: a library with its version, or vitserve."""
        ...

    def run(self, pixels: Pixels) -> Outputs:
        """The outputs of the source itself, in float32."""
        ...

    def run_unmerged(self, pixels: Pixels) -> Outputs | None:
        """The same without token merging. None if the network merges no tokens."""
        ...

    def run_bf16(self, pixels: Pixels) -> Outputs:
        """The same with the arithmetic of bf16, simulated."""
        ...

    def write_graph(self, path: Path) -> None:
        """Writes the graph to ``path`` and its weights to ``path``.data.

        uint8 pixels [n, H, W, C] in; float32 logits [n, classes] and embedding [n, width] out.
        """
        ...


class Exportable(Protocol):
    """A checkpoint that was read."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def classes(self) -> int: ...

    @property
    def activation(self) -> Activation: ...

    @property
    def preprocessing(self) -> Preprocessing: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Decisions that the user should know of."""
        ...

    @property
    def processor(self) -> Path | None:
        """The file or directory with the configuration of the image processor that the source names, if it does."""
        ...

    def source_model(self, progress: Callable[[str], None]) -> SourceModel:
        """Builds the source's own network. ``progress`` receives warnings."""
        ...
