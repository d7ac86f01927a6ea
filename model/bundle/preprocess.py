"""Encoded image → pixels, identical to the evaluation transform of the source library. Uses Pillow and numpy only.

Steps: header → limits → decode (JPEGs at a reduced scale if allowed) → RGB and EXIF orientation → resize → crop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from vitserve.model.arrays import Pixels
from vitserve.model.bundle.images.decoded import EncodedImage
from vitserve.model.bundle.images.errors import (
    DamagedImageError,
    ImageError,
    NotAnImageError,
    TooComplexError,
    TooManyPixelsError,
    UnsupportedImageError,
    named_error,
)
from vitserve.model.bundle.images.formats.jpeg import JpegImage
from vitserve.model.bundle.images.header import allowed_formats, read_header
from vitserve.model.bundle.images.process import prepare_pillow, return_freed_memory
from vitserve.model.bundle.images.resample import Target, is_transposed, peak_bytes, resized

__all__ = [
    "DamagedImageError",
    "DecodeMode",
    "Decoder",
    "Header",
    "ImageError",
    "Interpolation",
    "NotAnImageError",
    "OpenedImage",
    "Preprocessing",
    "TooComplexError",
    "TooManyPixelsError",
    "UnsupportedImageError",
    "allowed_formats",
    "named_error",
    "prepare_pillow",
]

Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]
# exact: the pixels of the source library. fast: JPEGs are decoded at a reduced scale where much more than the needed
# size remains, and only the part that the crop keeps is resized. fastest: JPEGs are reduced also where less remains.
DecodeMode = Literal["exact", "fast", "fastest"]

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# JPEGs are decoded at a reduced scale only if at least this multiple of the resized size remains.
# docs/experiments.md has the measured differences.
DRAFT_GAP = 3.0
# In the mode fast, a larger multiple for smaller outputs: more images are reduced, and each pixel matters more.
SMALL_DRAFT_GAP, SMALL_SIZE = 6.0, 128
# Freed memory is returned to the system after images of this size. After others, keeping it saves time.
_LARGE_PIXELS, _LARGE_BYTES = 2_000_000, 64 * 2**20
# Estimates of the time, measured on a core of an AMD EPYC; docs/experiments.md compares them with the measured times.
_OVERHEAD_SECONDS = 5e-5
_CONVERT_SECONDS = 2.5e-9  # for each byte of the converted image
_RESIZE_SECONDS = 5e-9  # for each pixel; bicubic


@dataclass(frozen=True)
class Preprocessing:
    """The preparation of images for the network. The graph, not the decoder, applies mean and standard deviation."""

    image_size: int  # pixels, height of the output, and its width unless ``width`` is another
    crop: float = 1.0  # share of the resized shorter side that the center crop keeps (timm's crop_pct)
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # one value for each channel
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    squash: bool = False  # resize both sides to the output's, ignoring the aspect ratio
    # Rounding of a crop offset of half a pixel: down (transformers) or to the even pixel (torchvision).
    floor_crop: bool = False
    width: int | None = None  # pixels; None for a square output
    # The whole image fits into the output, and the border has the color ``mean`` (timm's crop_mode border).
    border: bool = False

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} must have one value for each of 1 or 3 channels")
        if self.border and self.squash:
            raise ValueError("border keeps the aspect ratio and squash does not; choose one of them")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is {self.crop}; it must be above 0 and at most 1")
        if self.interpolation not in _RESAMPLING:
            raise ValueError(f"unknown interpolation {self.interpolation!r}; known: {', '.join(_RESAMPLING)}")

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for gray."""
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the output."""
        return self.image_size, self.image_size if self.width is None else self.width, self.channels

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the upright image after the resize.

        The shorter side becomes floor(image size / crop), as in timm.

        For an output that is not square, the image covers it with the same factor; with a border, it fits into it.
        """
        high, wide = (math.floor(side / self.crop) for side in self.shape[:2])
        if self.squash:
            return wide, high
        if self.border or high != wide:
            ratio = (max if self.border else min)(height / high, width / wide)
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        short = high
        if width <= height:
            return short, int(short * height / width)
        return int(short * width / height), short

    def resized_as_stored(self, size: tuple[int, int], orientation: int) -> tuple[int, int]:
        """resized() for an image of ``size``, width and height as stored; the result is as stored too."""
        upright = self.resized(*_turned(size, orientation))
        return _turned(upright, orientation)

    def cropped(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, width and height of the center crop. With a border, left or top may be negative."""
        half = math.floor if self.floor_crop else round
        high, wide, _ = self.shape
        left, top = ((inner - outer) / 2 for inner, outer in ((width, wide), (height, high)))
        left, top = (math.trunc(offset) if offset < 0 else half(offset) for offset in (left, top))
        return left, top, wide, high


@dataclass(frozen=True)
class Header:
    """The properties of an encoded image, known before decoding."""

    format: str  # Pillow's name
    mode: str  # Pillow's name
    orientation: int  # EXIF; 1 is upright, and also the value where only decoding shows the orientation
    pixels: int  # width × height as stored
    wanted: tuple[int, int]  # width and height after the resize, as stored


@dataclass(frozen=True)
class OpenedImage:
    """An image whose header was read and is within all limits. Nothing of it is decoded yet."""

    wanted: tuple[int, int]  # width and height after the resize, as stored
    _encoded: EncodedImage
    _preprocessing: Preprocessing
    _mode: DecodeMode

    @property
    def header(self) -> Header:
        image = self._encoded
        return Header(image.format, image.mode, image.orientation, math.prod(image.size), self.wanted)

    @property
    def seconds(self) -> float:
        """An estimate of the time that pixels() takes on one core, from the header."""
        image = self._encoded
        footprint = image.footprint
        pixels = math.prod(image.size) / footprint.scale**2
        resizing = (pixels + math.prod(self.wanted)) * _RESIZE_SECONDS
        converting = pixels * footprint.converted * _CONVERT_SECONDS
        return _OVERHEAD_SECONDS + image.seconds + converting + resizing

    @property
    def peak_bytes(self) -> int:
        """An upper bound of the memory that pixels() takes, from the header. Without the encoded image."""
        image = self._encoded
        return peak_bytes(image.footprint, image.size, image.orientation, self._target(image.orientation))

    def pixels(self) -> Pixels:
        """uint8 [height, width, channels]. Raises ImageError."""
        try:
            return self._decoded()
        # Without the traceback, whose frames would keep the pixels as long as the error lives.
        except ImageError as error:
            raise error.with_traceback(None) from None
        except MemoryError:
            raise TooManyPixelsError(f"decoding the image takes more than {self.peak_bytes:,} bytes") from None
        except Exception as error:  # Pillow's decoders may raise any exception for hostile bytes
            raise DamagedImageError("the image's data is truncated or damaged") from error.with_traceback(None)
        finally:
            if self.header.pixels >= _LARGE_PIXELS and self.peak_bytes >= _LARGE_BYTES:
                return_freed_memory()

    def _decoded(self) -> Pixels:
        image, (height, width, channels) = self._encoded, self._preprocessing.shape
        # Nothing is left to do after decoding.
        is_final = isinstance(image, JpegImage) and image.scaled == self.wanted == (width, height) and image.is_plain
        if isinstance(image, JpegImage) and is_final and channels == 3:
            pixels = image.array()
            if pixels is not None:
                return pixels
        decoded = image.decode()
        return np.asarray(resized(decoded, self._target(decoded.orientation))).reshape(height, width, channels)

    def _target(self, orientation: int) -> Target:
        preprocessing = self._preprocessing
        wanted = preprocessing.resized(*_turned(self._encoded.size, orientation))
        border = tuple(round(255 * value) for value in preprocessing.mean) if preprocessing.border else None
        box = preprocessing.cropped(*wanted)
        resampling, whole = _RESAMPLING[preprocessing.interpolation], self._mode == "exact"
        return Target(wanted, *box, preprocessing.channels, resampling, border, whole)


@dataclass(frozen=True)
class Decoder:
    """Decodes images to pixels, uint8 [height, width, channels]. Safe to share between threads."""

    preprocessing: Preprocessing
    max_pixels: int = 50_000_000  # of the encoded image, and of the resized one
    mode: DecodeMode = "fast"
    draft_gap: float = DRAFT_GAP

    def open(self, encoded: bytes | memoryview) -> OpenedImage:
        """Reads the header and checks all limits. Raises ImageError. The data after the header is not checked."""
        image = _read_header(encoded if isinstance(encoded, bytes) else bytes(encoded))
        self._check_size(*image.size)
        wanted = self.preprocessing.resized_as_stored(image.size, image.orientation)
        if self.mode != "exact" and isinstance(image, JpegImage):
            gap = self.least_gap
            image = image.reduced(*(math.ceil(side * gap) for side in wanted))
        return OpenedImage(wanted, image, self.preprocessing, self.mode)

    @property
    def least_gap(self) -> float:
        """The multiple of the resized size that remains if a JPEG is decoded at a reduced scale."""
        small = self.mode == "fast" and min(self.preprocessing.shape[:2]) < SMALL_SIZE
        return SMALL_DRAFT_GAP if small else self.draft_gap

    @property
    def on_cpu(self) -> Decoder:
        return self

    def decode(self, encoded: bytes | memoryview) -> Pixels:
        """Raises ImageError."""
        return self.open(encoded).pixels()

    def header(self, encoded: bytes | memoryview) -> Header:
        """Raises ImageError. Does not check the data after the header."""
        return self.open(encoded).header

    def _check_size(self, width: int, height: int) -> None:
        """Checks the limits of the size as stored, from the header alone."""
        if width < 1 or height < 1:
            raise DamagedImageError(f"the image is {width} × {height} pixels")
        if width * height > self.max_pixels:
            raise TooManyPixelsError(f"the image is {width} × {height} pixels; the limit is {self.max_pixels:,} pixels")
        # For example, 1 × 1,000,000 pixels scaled up to the model's width. Only decoding shows how a WebP is turned.
        for wide, high in (self.preprocessing.resized_as_stored((width, height), turn) for turn in (1, 6)):
            if wide * high > self.max_pixels:
                raise TooManyPixelsError(
                    f"the image is {width} × {height} pixels and {wide} × {high} when resized;"
                    f" the limit is {self.max_pixels:,} pixels"
                )


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height as stored → upright, and back."""
    return size[::-1] if is_transposed(orientation) else size


def _read_header(encoded: bytes) -> EncodedImage:
    try:
        return read_header(encoded)
    except ImageError:
        raise
    except Exception as error:  # a header that no check covers
        raise DamagedImageError("the image's header is damaged") from error
