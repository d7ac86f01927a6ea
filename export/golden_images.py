"""Golden images: synthetic images from a fixed seed, and real ones only if the owner of the images provides them."""

from __future__ import annotations

import numpy as np
import torch

from vitserve.export.graph.reference import ReferenceNetwork
from vitserve.model.arrays import Outputs, Pixels
from vitserve.model.bundle.bundle import Golden

COUNT = 16


class GoldenError(ValueError):
    """The source network has no outputs to compare with."""


def make_golden(network: ReferenceNetwork, image_size: int, domain: Pixels | None = None, seed: int = 0) -> Golden:
    """Pixels [16 + k, image size, image size, 3]: many kinds of texture, then the k images of the model's domain.

    With the network's outputs for them. Raises GoldenError if these are NaN or infinite.
    """
    pixels = _textures(image_size, COUNT, seed)
    if domain is not None:
        pixels = np.concatenate([pixels, domain])
    with torch.inference_mode():
        logits, embedding = network(torch.from_numpy(pixels))
    outputs = Outputs(logits.numpy(), embedding.numpy())
    if not all(np.isfinite(each).all() for each in outputs):
        raise GoldenError("the source network itself computes NaN or infinity: its weights are damaged or too large")
    return Golden(pixels, outputs, len(pixels) - COUNT)


def _textures(side: int, count: int, seed: int) -> Pixels:
    """Random waves over a random color, with rising frequency: from smooth gradients to noise between pixels."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    images = np.empty((count, side, side, 3), np.float64)
    for index in range(count):
        frequency = 0.5 * side ** (index / count)  # cycles per side
        angles, phases = random.uniform(0, 2 * np.pi, (2, 3, 4))  # [channel, wave]
        along = x[..., None, None] * np.cos(angles) + y[..., None, None] * np.sin(angles)
        waves = np.sin(2 * np.pi * frequency * along + phases).mean(axis=-1)  # [side, side, channel]
        images[index] = random.uniform(64, 192, 3) + 127 * waves
    return images.clip(0, 255).astype(np.uint8)
