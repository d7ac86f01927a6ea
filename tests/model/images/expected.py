"""A gradient whose pixels are known, and the pixels that a decoder has to make of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitserve.model.arrays import Pixels
from vitserve.model.bundle.preprocess import Decoder, Preprocessing

Floats = NDArray[np.float64]

SIDE = 40
WIDTH, HEIGHT = 48, 40
# Nearest: the pixels of the result are pixels of the image.
DECODER = Decoder(Preprocessing(SIDE, squash=True, interpolation="nearest"))

_Y, _X = np.mgrid[0:HEIGHT, 0:WIDTH]
# [height, width, 3], 0 to 1, different in each channel.
COLORS: Floats = np.stack([_X / (WIDTH - 1), _Y / (HEIGHT - 1), (_X + _Y) / (WIDTH + HEIGHT - 2)], axis=-1)
GRAY: Floats = COLORS[..., :1]
ALPHA: Floats = COLORS[..., 1:2]


def levels(intensity: Floats, bits: int) -> NDArray[np.int64]:
    """0 to 1 → 0 to the largest sample."""
    samples: NDArray[np.int64] = np.round(intensity * (2**bits - 1)).astype(np.int64)
    return samples


def over_white(intensity: Floats, alpha: Floats) -> Floats:
    return intensity * alpha + 1 - alpha


def difference(encoded: bytes, intensity: Floats) -> int:
    """The largest, in levels, of the decoded image from ``intensity`` [height, width, 1 or 3]."""
    rgb = np.broadcast_to(levels(intensity, 8).astype(np.uint8), (*intensity.shape[:2], 3))
    image = Image.fromarray(np.ascontiguousarray(rgb)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return int(np.abs(DECODER.decode(encoded).astype(int) - np.asarray(image)).max())


def decoded(encoded: bytes) -> Pixels:
    return DECODER.decode(encoded)
