"""Encoded image → pixels, identical to the evaluation transform of the source library. Uses Pillow and numpy only.

Steps: header → size check → decode (JPEGs at a reduced scale if allowed) → EXIF orientation → RGB → resize → crop.

    ImageError
    ├── NotAnImageError       the bytes are in none of the allowed formats
    ├── DamagedImageError     the header is valid, the data is truncated or broken
    └── TooManyPixelsError    decoding or resizing would exceed the limit; decided from the header alone
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, features

from vitserve.model.arrays import Pixels

Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_ORIENTATION_TAG = 0x0112
# EXIF 2.32, 4.6.4: orientation → the transposition that undoes it. 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# JPEGs are decoded at a reduced scale only if at least this multiple of the resized size remains.
# docs/experiments.md has the measured differences.
_DRAFT_GAP = 3.0


class ImageError(ValueError):
    """The image cannot be decoded. The message is for the client."""


class NotAnImageError(ImageError):
    pass


class DamagedImageError(ImageError):
    pass


class TooManyPixelsError(ImageError):
    pass


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for the network. The graph, not the decoder, applies mean and standard deviation."""

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
        """Width and height after the resize. The shorter side becomes floor(image size / crop), as in timm.

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
    orientation: int  # EXIF; 1 is upright
    pixels: int  # width × height as stored
    wanted: tuple[int, int]  # width and height after the resize, as stored


@dataclass(frozen=True)
class Decoder:
    """Decodes images to pixels, uint8 [height, width, channels]. Safe to share between threads."""

    preprocessing: Preprocessing
    max_pixels: int = 50_000_000  # of the encoded image, and of the resized one
    jpeg_draft: bool = True  # let libjpeg decode at 1/2, 1/4 or 1/8 if three times the needed size remains

    def open(self, encoded: bytes | memoryview) -> OpenedImage:
        """Reads the header and checks the size limits. Raises ImageError."""
        image = self._open(encoded)
        return OpenedImage(self, image, self._size_to_resize_to(image))

    def decode(self, encoded: bytes | memoryview) -> Pixels:
        """Raises ImageError."""
        return self.open(encoded).decode()

    def decode_opened(self, image: Image.Image, wanted: tuple[int, int]) -> Pixels:
        """``wanted``: width and height after the resize, as stored. Raises DamagedImageError."""
        try:
            stored = image.size
            self._load(image, wanted)
            upright = _upright(image)
            # Transposed, or decoded at a reduced scale: the size was computed from the sides as stored.
            if upright.size != stored and (upright.width < upright.height) != (wanted[0] < wanted[1]):
                wanted = wanted[::-1]
            return self._resize_and_crop(self._converted(upright), wanted)
        except Exception as error:  # Pillow's decoders may raise any exception for hostile bytes
            raise DamagedImageError("the image's data is truncated or damaged") from error
        finally:
            image.close()

    def header(self, encoded: bytes | memoryview) -> Header:
        """Raises NotAnImageError, TooManyPixelsError or DamagedImageError. Does not check the data after the header."""
        with self._open(encoded) as image:
            return Header(
                image.format or "",
                image.mode,
                _orientation(image),
                image.width * image.height,
                self._size_to_resize_to(image),
            )

    def _open(self, encoded: bytes | memoryview) -> Image.Image:
        try:
            return Image.open(io.BytesIO(encoded), formats=allowed_formats())
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise TooManyPixelsError(f"{error}; the limit is {self.max_pixels:,} pixels") from error
        except Exception as error:
            raise NotAnImageError(f"not an image in one of the formats {', '.join(allowed_formats())}") from error

    def _size_to_resize_to(self, image: Image.Image) -> tuple[int, int]:
        """Checks the size limits, from the header alone."""
        width, height = image.size
        if width < 1 or height < 1:
            raise DamagedImageError(f"the image is {width} × {height} pixels")
        if width * height > self.max_pixels:
            raise TooManyPixelsError(f"the image is {width} × {height} pixels; the limit is {self.max_pixels:,} pixels")
        wide, high = self.preprocessing.resized(width, height)
        if wide * high > self.max_pixels:  # for example, 1 × 1,000,000 pixels scaled up to the model's width
            raise TooManyPixelsError(
                f"the image is {width} × {height} pixels and {wide} × {high} when resized;"
                f" the limit is {self.max_pixels:,} pixels"
            )
        return wide, high

    def _load(self, image: Image.Image, wanted: tuple[int, int]) -> None:
        if self.jpeg_draft and image.format in ("JPEG", "MPO"):
            image.draft(None, (math.ceil(wanted[0] * _DRAFT_GAP), math.ceil(wanted[1] * _DRAFT_GAP)))
        image.load()

    def _resize_and_crop(self, image: Image.Image, wanted: tuple[int, int]) -> Pixels:
        if image.size != wanted:
            image = image.resize(wanted, _RESAMPLING[self.preprocessing.interpolation])
        left, top, wide, high = self.preprocessing.cropped(image.width, image.height)
        if min(left, top) < 0:
            color = tuple(round(255 * value) for value in self.preprocessing.mean)
            framed = Image.new(image.mode, (max(wide, image.width), max(high, image.height)), color)
            framed.paste(image, (max(0, -left), max(0, -top)))
            image, left, top = framed, max(0, left), max(0, top)
        if image.size != (wide, high):
            image = image.crop((left, top, left + wide, top + high))
        return np.asarray(image) if self.preprocessing.channels == 3 else np.asarray(image)[:, :, None]

    def _converted(self, image: Image.Image) -> Image.Image:
        return _rgb(image) if self.preprocessing.channels == 3 else _rgb(image).convert("L")


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An image whose header was read. decode() may be called once, on any thread."""

    decoder: Decoder
    image: Image.Image
    wanted: tuple[int, int]  # width and height after the resize, as stored

    @property
    def work(self) -> int:
        """Pixels to decode plus pixels to produce, which the time of decode() roughly follows."""
        return self.image.width * self.image.height + self.wanted[0] * self.wanted[1]

    def decode(self) -> Pixels:
        """uint8 [height, width, channels]. Raises DamagedImageError."""
        return self.decoder.decode_opened(self.image, self.wanted)


def allowed_formats() -> tuple[str, ...]:
    return ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))


def prepare_pillow() -> None:
    """Configures Pillow for a process that decodes untrusted images with Decoder only. Applies to the whole process.

    Decoder replaces Pillow's own size limit. Pillow's warnings about broken metadata are suppressed, because they would
    let any client write to the log.
    """
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module="PIL")


def _orientation(image: Image.Image) -> int:
    try:
        orientation: int = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata is ignored, as in browsers
        return 1
    return orientation


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow mode to RGB: transparency is composed over white, 16 bits are scaled to 8."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((deep // 257).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
