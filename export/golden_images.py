"""Golden images: made from a seed, so that a bundle carries nobody's pictures."""

from __future__ import annotations

import numpy as np
import torch

from vitserve.export.graph.trace import Servable
from vitserve.model.arrays import Outputs, Pixels
from vitserve.model.bundle.bundle import Golden


def golden(network: Servable, image_size: int, count: int = 16, seed: int = 0) -> Golden:
    """Pixels [count, image size, image size, 3] of every kind of texture, and what the float32 torch network says to them."""
    pixels = _images(image_size, count, seed)
    with torch.inference_mode():
        logits, embedding = network(torch.from_numpy(pixels))
    return Golden(pixels, Outputs(logits.numpy(), embedding.numpy()))


def _images(side: int, count: int, seed: int) -> Pixels:
    """Random waves of rising frequency over a random color, from smooth gradients to noise at the pixel's own scale."""
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
