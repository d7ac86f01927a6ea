"""Golden images: synthetic images from a fixed seed, and real ones only if the owner of the images provides them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vitserve.model.arrays import Outputs, Pixels
from vitserve.model.bundle.bundle import Golden
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions

COUNT = 16


class GoldenError(ValueError):
    """The source network has no outputs to compare with."""


def make_golden(
    run: Callable[[Pixels], Outputs], shape: tuple[int, int, int], domain: Pixels | None = None, seed: int = 0
) -> Golden:
    """Pixels [16 + k, height, width, channels]: many kinds of texture, then the k images of the model's domain.

    With the outputs of ``run``, the source network, for them. Raises GoldenError if these are NaN or infinite.
    """
    pixels = textures(shape, COUNT, seed)
    if domain is not None:
        pixels = np.concatenate([pixels, domain])
    outputs = run(pixels)
    if not all(np.isfinite(array).all() for array in outputs):
        raise GoldenError("the source network itself computes NaN or infinity: its weights are damaged or too large")
    return Golden(pixels, outputs, len(pixels) - COUNT)


def textures(shape: tuple[int, int, int], count: int, seed: int = 0) -> Pixels:
    """Random waves over a random color, with rising frequency: from smooth gradients to noise between pixels."""
    random = np.random.default_rng(seed)
    height, width, channels = shape
    side = max(height, width)
    y, x = np.mgrid[0:height, 0:width] / side
    images = np.empty((count, *shape), np.float64)
    for index in range(count):
        frequency = 0.5 * side ** (index / count)  # cycles per side
        angles, phases = random.uniform(0, 2 * np.pi, (2, channels, 4))  # [channel, wave]
        along = x[..., None, None] * np.cos(angles) + y[..., None, None] * np.sin(angles)
        waves = np.sin(2 * np.pi * frequency * along + phases).mean(axis=-1)  # [height, width, channel]
        images[index] = random.uniform(64, 192, channels) + 127 * waves
    return images.clip(0, 255).astype(np.uint8)


@contextmanager
def open_graph(path: Path, batch: int) -> Iterator[Callable[[Pixels], Outputs]]:
    """Runs a graph in ONNX Runtime."""
    engine = construct_engine("onnxruntime", "fp32", path, EngineOptions(max_batch=batch))
    try:
        yield lambda pixels: engine.run(0, pixels)
    finally:
        engine.close()
