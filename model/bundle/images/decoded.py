"""A decoded image in its own mode, and the conversions of its parts to opaque ones.

Converting a whole image takes up to 16 bytes a pixel. So images are converted in strips, before they are resized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

# The same part of each plane → that part of the image in L or RGB, opaque.
Conversion = Callable[..., Image.Image]


@dataclass(frozen=True)
class Footprint:
    """Memory that an image takes, in bytes, known from its header. The encoded image itself is not included."""

    decoding: int  # at most while decode() runs, its result included
    decoded: int  # of its result
    converted: int = 0  # of each pixel after the conversion: 1 for L, 4 for RGB; 0 if there is no conversion
    in_place: bool = False  # the conversion overwrites the decoded pixels
    scale: int = 1  # both sides are divided by it


@dataclass(frozen=True)
class Decoded:
    """The pixels of an image as they are stored."""

    planes: tuple[Image.Image, ...]  # all of the same size; one, unless samples are stored apart
    convert: Conversion
    orientation: int = 1  # EXIF; 1 is upright


class EncodedImage(Protocol):
    """An image whose header was read. Reading it again, or decoding it, gives the same result."""

    @property
    def format(self) -> str:
        """Pillow's name."""

    @property
    def mode(self) -> str:
        """Pillow's name."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels as stored."""

    @property
    def orientation(self) -> int:
        """EXIF; 1 is upright, and also the value where only decoding shows the orientation."""

    @property
    def footprint(self) -> Footprint: ...

    @property
    def seconds(self) -> float:
        """An estimate of the time that decode() takes."""

    def decode(self) -> Decoded:
        """Raises ImageError, or any exception for damaged data."""


def as_stored(part: Image.Image) -> Image.Image:
    """L and RGB need no conversion."""
    return part


def opaque(part: Image.Image) -> Image.Image:
    return part.convert("RGB")


def gray(part: Image.Image) -> Image.Image:
    return part.convert("L")


def over_white(part: Image.Image) -> Image.Image:
    part = part.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB")


def gray_over_white(part: Image.Image) -> Image.Image:
    """For transparent images whose color samples are equal."""
    return over_white(part).getchannel("R")


def fourth_over_white(part: Image.Image) -> Image.Image:
    """For RGBX whose X is alpha. An RGBX image can be converted in place."""
    return over_white(Image.frombuffer("RGBA", part.size, part.tobytes(), "raw", "RGBA", 0, 1))


def palette_over_white(palette: bytes, alpha: bytes) -> bytes:
    """The opaque palette that looks like the transparent one on white. RGB triples, and one alpha for each of them."""
    count = len(palette) // 3
    entries = Image.frombytes("RGB", (count, 1), palette[: 3 * count])
    opacity = Image.frombytes("L", (count, 1), alpha[:count].ljust(count, b"\xff"))
    entries.putalpha(opacity)
    return over_white(entries).tobytes()


def mapped(table: list[int]) -> Conversion:
    """Replaces each of the 256 values of a gray image."""
    return lambda part: part.convert("L").point(table)


@dataclass(frozen=True)
class DeepGray:
    """Scales gray samples of more than 8 bits to 8."""

    maximum: int  # the sample of full intensity
    inverted: bool = False  # 0 is white
    transparent: int | None = None  # the sample that is transparent, shown as white

    def __call__(self, part: Image.Image) -> Image.Image:
        deep = np.asarray(part)
        levels = (deep.astype(np.uint32) * 255 // self.maximum).clip(0, 255).astype(np.uint8)
        if self.inverted:
            levels = 255 - levels
        if self.transparent is not None:
            levels[deep == self.transparent] = 255
        return Image.fromarray(levels)
