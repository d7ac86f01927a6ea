"""BMP (Windows bitmaps, BITMAPCOREHEADER to BITMAPV5HEADER)."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vitserve.model.bundle.images.decoded import Decoded, Footprint, as_stored, gray, opaque, over_white
from vitserve.model.bundle.images.errors import DamagedImageError, TooManyPixelsError, UnsupportedImageError

# Pillow decodes run lengths in Python, at about 10 million pixels or 2 million runs a second.
MAX_RUN_LENGTH_PIXELS = 4_000_000
MAX_RUN_LENGTH_BYTES = 2**20

_RUN_LENGTHS = (1, 2)
_OPAQUE = {"RGB": as_stored, "L": as_stored, "1": gray}  # Pillow's modes; opaque() for others
_MASKS = 3  # the header says which bits are red, green, blue and alpha


@dataclass(frozen=True)
class BmpImage:
    encoded: bytes
    size: tuple[int, int]
    bits: int
    compression: int
    alpha_mask: int
    bottom_up: bool

    format, orientation = "BMP", 1

    @property
    def mode(self) -> str:
        if self.bits > 8:
            return "RGBA" if self.alpha_mask else "RGB"
        return {b"\0\xff": "1", bytes(range(2**self.bits)): "L"}.get(self._grays(), "P")

    @property
    def footprint(self) -> Footprint:
        width, height = self.size
        decoded = width * height * (1 if self.bits <= 8 else 4) + 8 * height
        if self._has_short_alpha():  # while alpha is made, two bytes for each pixel
            return Footprint(decoded + 3 * width * height, decoded + width * height + 8 * height, 4, True)
        decoding = decoded + (3 * width * height if self.compression in _RUN_LENGTHS else 4 * width)
        return Footprint(decoding, decoded, {"RGB": 0, "L": 0, "1": 1}.get(self.mode, 4))

    @property
    def seconds(self) -> float:
        return self.size[0] * self.size[1] * (2e-7 if self.compression in _RUN_LENGTHS else 3e-9)

    def decode(self) -> Decoded:
        try:
            image = Image.open(io.BytesIO(self.encoded), formats=("BMP",))
        except Exception as error:  # Pillow raises errors of several types here
            raise UnsupportedImageError(
                f"a BMP of {self.bits} bits a pixel and compression {self.compression} is not read: {error}"
            ) from error
        if image.size != self.size:
            raise DamagedImageError("the BMP's header is damaged")
        image.load()
        if self._has_short_alpha():
            return self._with_short_alpha(image)
        # Programs that do not know of alpha leave it at zero: such an image is opaque, in browsers too.
        transparent = image.mode == "RGBA" and image.getbbox(alpha_only=True) is not None
        return Decoded((image,), over_white if transparent else _OPAQUE.get(image.mode, opaque))

    def _grays(self) -> bytes:
        """The levels of the palette if all its colors are gray."""
        header = int.from_bytes(self.encoded[14:18], "little")
        entry = 3 if header == 12 else 4
        colors = int.from_bytes(self.encoded[46:50], "little") if entry == 4 else 0
        palette = self.encoded[14 + header : 14 + header + entry * (colors or 2**self.bits)]
        blue, green, red = (palette[color::entry] for color in range(3))
        return red if red == green == blue and colors <= 256 else b""

    def _has_short_alpha(self) -> bool:
        return self.bits == 16 and bool(self.alpha_mask)

    def _with_short_alpha(self, image: Image.Image) -> Decoded:
        """Adds the alpha of pixels of 16 bits, which Pillow does not read."""
        width, height = self.size
        columns = (width + 1) // 2 * 2  # rows are padded to 4 bytes
        (start,) = struct.unpack_from("<I", self.encoded, 10)
        stored = np.frombuffer(self.encoded, "<u2", columns * height, start).reshape(height, columns)[:, :width]
        alpha = np.where(stored & self.alpha_mask, np.uint8(255), np.uint8(0))
        if not alpha.any():
            return Decoded((image,), as_stored)
        if self.bottom_up:
            alpha = alpha[::-1]
        return Decoded((image, Image.fromarray(alpha)), _with_alpha)


def _with_alpha(colors: Image.Image, alpha: Image.Image) -> Image.Image:
    return over_white(Image.merge("RGBA", (*colors.split(), alpha)))


def read(encoded: bytes) -> BmpImage:
    """Raises ImageError."""
    try:
        image = _read(encoded)
    except struct.error as error:
        raise DamagedImageError("the BMP's header is damaged") from error
    width, height = image.size
    if image.compression in _RUN_LENGTHS and (
        width * height > MAX_RUN_LENGTH_PIXELS or len(encoded) > MAX_RUN_LENGTH_BYTES
    ):
        raise TooManyPixelsError(
            f"the image is {width} × {height} pixels in {len(encoded):,} bytes; the limits for a BMP of run lengths are"
            f" {MAX_RUN_LENGTH_PIXELS:,} pixels and {MAX_RUN_LENGTH_BYTES:,} bytes"
        )
    return image


def _read(encoded: bytes) -> BmpImage:
    (header,) = struct.unpack_from("<I", encoded, 14)
    if header == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", encoded, 18)
        return BmpImage(encoded, (width, height), bits, 0, 0, True)
    width, height, _, bits, compression = struct.unpack_from("<IiHHI", encoded, 18)
    (alpha,) = struct.unpack_from("<I", encoded, 66) if compression == _MASKS and header >= 56 else (0,)
    return BmpImage(encoded, (width, abs(height)), bits, compression, alpha, height > 0)
