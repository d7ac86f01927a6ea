"""PNG (W3C recommendation, third edition): only the chunks that make up the pixels are read.

Text, color profiles and animations are skipped unread, whatever their size or checksum. libpng and browsers do so too.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

from PIL import Image, ImageChops

from vitserve.model.bundle.images.decoded import (
    Conversion,
    Decoded,
    DeepGray,
    Footprint,
    as_stored,
    fourth_over_white,
    gray,
    gray_over_white,
    mapped,
    opaque,
    over_white,
    palette_over_white,
)
from vitserve.model.bundle.images.directory import orientation_of
from vitserve.model.bundle.images.errors import DamagedImageError, TooComplexError

MAX_CHUNKS = 10_000  # encoders write 4 KiB or more a chunk

_GRAY, _COLOR, _INDEXED, _GRAY_ALPHA, _COLOR_ALPHA = 0, 2, 3, 4, 6
# Color type and bits → Pillow's mode and raw mode. Pillow keeps the upper 8 of 16 bits, except for gray.
_MODES = {
    (_GRAY, 1): ("1", "1"),
    (_GRAY, 2): ("L", "L;2"),
    (_GRAY, 4): ("L", "L;4"),
    (_GRAY, 8): ("L", "L"),
    (_GRAY, 16): ("I;16", "I;16B"),
    (_COLOR, 8): ("RGB", "RGB"),
    (_COLOR, 16): ("RGB", "RGB;16B"),
    (_INDEXED, 1): ("P", "P;1"),
    (_INDEXED, 2): ("P", "P;2"),
    (_INDEXED, 4): ("P", "P;4"),
    (_INDEXED, 8): ("P", "P"),
    (_GRAY_ALPHA, 8): ("LA", "LA"),
    (_GRAY_ALPHA, 16): ("RGBA", "LA;16B"),
    (_COLOR_ALPHA, 8): ("RGBX", "RGBX"),
    (_COLOR_ALPHA, 16): ("RGBX", "RGBX;16B"),
}
_SAMPLES = {_GRAY: 1, _COLOR: 3, _INDEXED: 1, _GRAY_ALPHA: 2, _COLOR_ALPHA: 4}
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "LA": 4, "RGB": 4, "RGBA": 4, "RGBX": 4}  # of a pixel in Pillow's memory
_LOWER_BYTES = "RGB;16L"  # swaps the bytes of a sample, so that Pillow keeps the lower 8 bits


@dataclass
class _Chunks:
    palette: bytes = b""
    transparency: bytes = b""
    orientation: int = 1
    pixels: list[tuple[int, int]] = field(default_factory=list)  # start and end of the compressed data


@dataclass(frozen=True)
class PngImage:
    encoded: bytes
    size: tuple[int, int]
    color: int
    bits: int
    interlaced: bool
    palette: bytes
    transparency: bytes  # the content of tRNS
    pixels: tuple[tuple[int, int], ...]  # start and end of the compressed data
    orientation: int

    format = "PNG"

    @property
    def mode(self) -> str:
        return "RGBA" if self.color == _COLOR_ALPHA else _MODES[self.color, self.bits][0]

    @property
    def footprint(self) -> Footprint:
        width, height = self.size
        planes = 2 if self._is_deep_color_with_key() else 1
        decoded = planes * (width * height * _BYTES[self.mode] + 8 * height)
        joined = sum(end - start for start, end in self.pixels) if len(self.pixels) > 1 else 0
        decoding = decoded + joined + 2 * self._row_bytes() + 160 * len(self.pixels)
        if self.color in (_COLOR, _COLOR_ALPHA):
            return Footprint(decoding, decoded, 4 if self.transparency or self.color == _COLOR_ALPHA else 0, True)
        if self.color == _INDEXED:
            return Footprint(decoding, decoded, 4)
        plain = self.mode == "L" and not self.transparency
        return Footprint(decoding, decoded, 0 if plain else 1, self.mode == "L")

    @property
    def seconds(self) -> float:
        planes = 2 if self._is_deep_color_with_key() else 1
        return planes * self._row_bytes() * self.size[1] * 6e-9

    def decode(self) -> Decoded:
        data = memoryview(self.encoded)
        parts = [data[start:end] for start, end in self.pixels]
        joined = parts[0] if len(parts) == 1 else b"".join(parts)
        raw_modes = [_MODES[self.color, self.bits][1]]
        if self._is_deep_color_with_key():
            raw_modes.append(_LOWER_BYTES)
        planes = tuple(self._plane(joined, raw) for raw in raw_modes)
        return Decoded(planes, self._conversion(planes[0]), self.orientation)

    def _plane(self, data: bytes | memoryview, raw_mode: str) -> Image.Image:
        """Raises DamagedImageError if the compressed data ends before the last row, which Pillow accepts."""
        image, untouched = self._decoded_over(1, data, raw_mode)
        if untouched:  # hardly ever because the row has that color
            del image  # before the memory for the next one is taken
            image, untouched = self._decoded_over(0, data, raw_mode)
            if untouched:
                raise DamagedImageError("the PNG ends before its last row")
        return image

    def _decoded_over(self, color: int, data: bytes | memoryview, raw_mode: str) -> tuple[Image.Image, bool]:
        """Decoded into an image whose last row has this color, and whether the row still has it."""
        image = Image.new(_MODES[self.color, self.bits][0], self.size)
        image.paste(color, self._last_row)
        row = image.crop(self._last_row).tobytes()
        image.frombytes(data, "zip", raw_mode, int(self.interlaced))
        return image, image.crop(self._last_row).tobytes() == row

    @property
    def _last_row(self) -> tuple[int, int, int, int]:
        """The box of the row that is decoded last: the last pass of an interlaced image has the odd rows."""
        width, height = self.size
        row = height - 1 - (self.interlaced and height > 1 and height % 2)
        return 0, row, width, row + 1

    def _conversion(self, image: Image.Image) -> Conversion:
        """Sets the palette of an indexed ``image``."""
        if self.color == _INDEXED:
            image.putpalette(palette_over_white(self.palette, self.transparency))
            return opaque
        if self.color in (_GRAY_ALPHA, _COLOR_ALPHA):
            return gray_over_white if self.color == _GRAY_ALPHA else fourth_over_white
        key = struct.unpack(f">{_SAMPLES[self.color]}H", self.transparency) if self.transparency else ()
        if self.color == _COLOR:
            return _color_conversion(image, key, self.bits)
        maximum = 2**self.bits - 1
        if self.bits == 16:
            return DeepGray(maximum, transparent=key[0] if key else None)
        if not key or key[0] > maximum:
            return gray if self.mode == "1" else as_stored
        table = list(range(256))
        table[key[0] * 255 // maximum] = 255
        return mapped(table)

    def _is_deep_color_with_key(self) -> bool:
        return self.color == _COLOR and self.bits == 16 and bool(self.transparency)

    def _row_bytes(self) -> int:
        """Of the decompressed data."""
        return 1 - -self.size[0] * self.bits * _SAMPLES[self.color] // 8


def _color_conversion(image: Image.Image, key: tuple[int, ...], bits: int) -> Conversion:
    if not key:
        return as_stored
    if bits == 16:
        return _DeepColorKey(key)
    image.info["transparency"] = key
    return over_white if max(key) < 256 else as_stored


@dataclass(frozen=True)
class _DeepColorKey:
    """Of two planes, the upper and the lower bytes of the samples: white where a pixel has the transparent color."""

    key: tuple[int, ...]

    def __call__(self, upper: Image.Image, lower: Image.Image) -> Image.Image:
        high, low = (
            part.point([255 * (value == sample >> shift & 255) for sample in self.key for value in range(256)])
            for part, shift in ((upper, 8), (lower, 0))
        )
        red, green, blue = ImageChops.darker(high, low).split()
        opaque_part = upper.copy()
        opaque_part.paste((255, 255, 255), mask=ImageChops.darker(ImageChops.darker(red, green), blue))
        return opaque_part


def read(encoded: bytes) -> PngImage:
    """Raises ImageError."""
    if len(encoded) < 33 or encoded[12:16] != b"IHDR" or not _is_intact(encoded, 16, 29):
        raise DamagedImageError("the PNG's header is damaged")
    width, height, bits, color, compression, filters, interlaced = struct.unpack_from(">IIBBBBB", encoded, 16)
    if (color, bits) not in _MODES or compression or filters or interlaced > 1:
        raise DamagedImageError("the PNG's header is damaged: no such combination of color type, bits and methods")
    chunks = _chunks(encoded)
    if not chunks.pixels:
        raise DamagedImageError("the PNG has no pixels")
    if color == _INDEXED and len(chunks.palette) < 3:
        raise DamagedImageError("the PNG has no palette")
    transparency = chunks.transparency
    if color != _INDEXED and len(transparency) != 2 * _SAMPLES[color]:
        transparency = b""
    return PngImage(
        encoded,
        (width, height),
        color,
        bits,
        bool(interlaced),
        chunks.palette,
        transparency,
        tuple(chunks.pixels),
        chunks.orientation,
    )


def _chunks(encoded: bytes) -> _Chunks:
    """The end marker, and all that follows the pixels, may be missing."""
    chunks, position = _Chunks(), 33
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(encoded):
            return chunks
        length, kind = struct.unpack_from(">I4s", encoded, position)
        start, end = position + 8, position + 8 + length
        position = end + 4
        if kind == b"IDAT":
            chunks.pixels.append((start, end))
        elif kind == b"IEND":
            return chunks
        elif kind in _READ and end <= len(encoded):
            _read_chunk(chunks, kind, encoded, start, end)
    raise TooComplexError(f"the PNG has more than {MAX_CHUNKS:,} chunks")


_READ = (b"PLTE", b"tRNS", b"eXIf")


def _read_chunk(chunks: _Chunks, kind: bytes, encoded: bytes, start: int, end: int) -> None:
    if not _is_intact(encoded, start, end):
        if kind == b"PLTE":
            raise DamagedImageError("the PNG's palette is damaged")
        return  # chunks that are not needed for the pixels may be damaged
    content = encoded[start:end]
    if kind == b"PLTE":
        chunks.palette = content[:768]
    elif kind == b"tRNS":
        chunks.transparency = content
    else:
        chunks.orientation = orientation_of(content)


def _is_intact(encoded: bytes, start: int, end: int) -> bool:
    """Whether the checksum of the chunk's type and content fits."""
    return zlib.crc32(memoryview(encoded)[start - 4 : end]) == int.from_bytes(encoded[end : end + 4])
