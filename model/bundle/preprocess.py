"""Encoded image → pixels, exactly as the source library's evaluation transform would make them. Pillow and numpy only.
 The order of work:
header → size check → decode (JPEGs at a reduced scale where allowed) → EXIF orientation → RGB → resize → center crop.

    ImageError
    ├── NotAnImage       no allowed format recognizes the bytes
    ├── DamagedImage     the header is fine, the data is truncated or broken
    └── TooManyPixels    decoding or resizing would exceed the limit; found from the header alone
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
# EXIF 2.32, 4.6.4: what undoes each orientation. 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DRAFT_GAP = 3.0  # a JPEG is never decoded smaller than this many times what the resize wants; docs/log.md has the differences measured


class ImageError(ValueError):
    """The image cannot be classified, and whoever sent it can be told why."""


class NotAnImageError(ImageError):
    pass


class DamagedImageError(ImageError):
    pass


class TooManyPixelsError(ImageError):
    pass


@dataclass(frozen=True)
class Preprocessing:
    """What the network was trained to see. Mean and standard deviation are applied inside the graph, not here."""

    image_size: int  # pixels, side of the square that comes out
    crop: float = 1.0  # share of the resized shorter side that the center crop keeps (timm: crop_pct)
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    squash: bool = False  # both sides become what otherwise the shorter one does, whatever the image's shape
    floor_crop: bool = False  # where the crop cannot be centered to the pixel: further left and up (transformers), or to the even pixel (torchvision)

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is {self.crop}; it must be above 0 and at most 1")
        if self.interpolation not in _RESAMPLING:
            raise ValueError(f"there is no interpolation {self.interpolation!r}; known: {', '.join(_RESAMPLING)}")

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize: the shorter side becomes floor(image size / crop), as in timm's evaluation transform."""
        short = math.floor(self.image_size / self.crop)
        if self.squash:
            return short, short
        if width <= height:
            return short, int(short * height / width)
        return int(short * width / height), short

    def cropped(self, width: int, height: int) -> tuple[int, int, int]:
        """Left, top and side of what the center crop keeps of the resized image."""
        half = math.floor if self.floor_crop else round
        return half((width - self.image_size) / 2), half((height - self.image_size) / 2), self.image_size


@dataclass(frozen=True)
class Header:
    """What an image says of itself before it is decoded."""

    format: str  # Pillow's name
    mode: str  # likewise
    orientation: int  # EXIF's; 1 is upright
    pixels: int  # of the image as it is stored
    wanted: tuple[int, int]  # width and height to resize that to


@dataclass(frozen=True)
class Decoder:
    """Turns encoded images into pixels uint8 [image size, image size, 3]. Safe to share between threads."""

    preprocessing: Preprocessing
    max_pixels: int = 50_000_000  # of the encoded image, and of what the resize makes of it
    jpeg_draft: bool = True  # let libjpeg decode at 1/2, 1/4 or 1/8 where twice the needed size remains

    def decode(self, encoded: bytes | memoryview) -> Pixels:
        """Raises ImageError."""
        image = self._open(encoded)
        wanted = self._size_to_resize_to(image)
        try:
            stored = image.size
            self._load(image, wanted)
            upright = _upright(image)
            if (
                upright.size != stored
            ):  # turned by a quarter, or decoded at a reduced scale: then still by the whole image's sides
                wanted = wanted if (upright.width < upright.height) == (wanted[0] < wanted[1]) else wanted[::-1]
            return self._resize_and_crop(_rgb(upright), wanted)
        except Exception as error:  # a decoder given hostile bytes may raise anything at all
            raise DamagedImageError("the image's data is truncated or damaged") from error
        finally:
            image.close()

    def header(self, encoded: bytes | memoryview) -> Header:
        """Raises NotAnImage or TooManyPixels; whether the data behind it is whole is not known yet."""
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
            raise TooManyPixelsError(f"{error}; the limit here is {self.max_pixels:,} pixels") from error
        except Exception as error:
            raise NotAnImageError(f"not an image in one of the formats {', '.join(allowed_formats())}") from error

    def _size_to_resize_to(self, image: Image.Image) -> tuple[int, int]:
        """From the header alone, and rejected from it: nothing has been decoded yet."""
        width, height = image.size
        if width < 1 or height < 1:
            raise DamagedImageError(f"the image is {width} × {height} pixels")
        if width * height > self.max_pixels:
            raise TooManyPixelsError(f"the image is {width} × {height} pixels; the limit is {self.max_pixels:,} pixels")
        wide, high = self.preprocessing.resized(width, height)
        if wide * high > self.max_pixels:  # a sliver of 1 × 1,000,000 would be blown up to the model's width
            raise TooManyPixelsError(
                f"the image of {width} × {height} pixels becomes {wide} × {high} when resized; the limit is {self.max_pixels:,} pixels"
            )
        return wide, high

    def _load(self, image: Image.Image, wanted: tuple[int, int]) -> None:
        if self.jpeg_draft and image.format in ("JPEG", "MPO"):
            image.draft(None, (math.ceil(wanted[0] * _DRAFT_GAP), math.ceil(wanted[1] * _DRAFT_GAP)))
        image.load()

    def _resize_and_crop(self, image: Image.Image, wanted: tuple[int, int]) -> Pixels:
        if image.size != wanted:
            image = image.resize(wanted, _RESAMPLING[self.preprocessing.interpolation])
        left, top, side = self.preprocessing.cropped(image.width, image.height)
        return np.asarray(image.crop((left, top, left + side, top + side)))


def allowed_formats() -> tuple[str, ...]:
    return ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))


def prepare_pillow() -> None:
    """For a process that decodes hostile images through Decoder alone; what it sets in Pillow is process-wide.

    Pillow's own guard against large images warns where ours rejects, and knows one limit only. Its warnings about broken
    metadata would let any client write to our log.
    """
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module="PIL")


def _orientation(image: Image.Image) -> int:
    try:
        orientation: int = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata is ignored, as browsers do; the image itself is fine
        return 1
    return orientation


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
    """Every mode that Pillow can decode → RGB; transparency is laid over white, 16 bits are scaled and not clipped."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((deep // 257).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
