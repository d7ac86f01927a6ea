"""The images that the HTTP benchmark sends, in three sizes. They are generated, so that they need no download."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from vitserve.bench.request import EncodedImage


def thumbnail() -> EncodedImage:
    """A JPEG of 32 × 32 pixels and about 1 KB, like an image of CIFAR-10."""
    return _noise(32, 32, cell=2, quality=75)


def small_photo() -> EncodedImage:
    """A JPEG of 500 × 333 pixels and about 36 KB."""
    return _noise(500, 333, cell=8, quality=77)


def large_photo() -> EncodedImage:
    """A JPEG of 500 × 333 pixels and about 77 KB."""
    return _noise(500, 333, cell=4, quality=88)


def _noise(width: int, height: int, cell: int, quality: int) -> EncodedImage:
    """Random colors, one for each ``cell`` × ``cell`` pixels, with smooth transitions."""
    colors = np.random.default_rng(0).integers(0, 256, (height // cell + 1, width // cell, 3), np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)
    image.save(out, "JPEG", quality=quality)
    return EncodedImage(out.getvalue(), "image/jpeg")
