"""GIF (89a): the first frame. Later frames are not read."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from PIL import Image

from vitserve.model.bundle.images.decoded import Decoded, Footprint, opaque, palette_over_white
from vitserve.model.bundle.images.errors import DamagedImageError, TooComplexError

MAX_BLOCKS = 65_536  # of up to 255 bytes each, before the first frame

_GRAYS = bytes(value for gray in range(256) for value in (gray, gray, gray))
_EXTENSION, _FRAME, _CONTROL = 0x21, 0x2C, 0xF9


@dataclass(frozen=True)
class GifImage:
    encoded: bytes
    size: tuple[int, int]
    box: tuple[int, int, int, int]  # left, top, right, bottom of the frame
    palette: bytes
    transparent: int | None  # index
    interlaced: bool
    bits: int  # of the first code
    start: int  # of the compressed data

    format, mode, orientation = "GIF", "P", 1

    @property
    def footprint(self) -> Footprint:
        left, top, right, bottom = self.box
        width, height = self.size
        decoded = width * height + 8 * height
        frame = 0 if self._fills_the_screen() else (right - left) * (bottom - top) + 8 * (bottom - top)
        return Footprint(decoded + frame, decoded, 4)

    @property
    def seconds(self) -> float:
        return self.size[0] * self.size[1] * 3e-9 + len(self.encoded) * 5e-9

    def decode(self) -> Decoded:
        left, top, right, bottom = self.box
        data = memoryview(self.encoded)[self.start :]
        image = Image.frombytes("P", (right - left, bottom - top), data, "gif", self.bits, int(self.interlaced))
        if not self._fills_the_screen():
            frame, image = image, Image.new("P", self.size, self.transparent or 0)
            image.paste(frame, (left, top))
        image.putpalette(self._opaque_palette())
        return Decoded((image,), opaque)

    def _fills_the_screen(self) -> bool:
        return self.box == (0, 0, *self.size)

    def _opaque_palette(self) -> bytes:
        palette = _GRAYS if _GRAYS.startswith(self.palette) else self.palette
        if self.transparent is None:
            return palette
        palette = palette.ljust(3 * self.transparent + 3, b"\0")
        return palette_over_white(palette, b"\xff" * self.transparent + b"\0")


def read(encoded: bytes) -> GifImage:
    """Raises ImageError."""
    try:
        return _read(encoded)
    except (struct.error, IndexError) as error:
        raise DamagedImageError("the GIF ends before its first frame") from error


def _read(encoded: bytes) -> GifImage:
    width, height, flags = struct.unpack_from("<HHB", encoded, 6)
    position = 13
    palette, position = _palette(encoded, position, flags)
    transparent, position = _extensions(encoded, position)
    left, top, columns, rows, flags = struct.unpack_from("<HHHHB", encoded, position)
    if not columns or not rows:
        raise DamagedImageError(f"the GIF's first frame is {columns} × {rows} pixels")
    local, position = _palette(encoded, position + 9, flags)
    box = left, top, left + columns, top + rows
    # A frame larger than the screen enlarges it, as in Pillow.
    size = max(width, box[2]), max(height, box[3])
    bits = encoded[position]
    return GifImage(encoded, size, box, local or palette, transparent, bool(flags & 64), bits, position + 1)


def _palette(encoded: bytes, position: int, flags: int) -> tuple[bytes, int]:
    """The colors, none if the flags say so, and the position behind them."""
    end = position + ((3 << (flags & 7) + 1) if flags & 128 else 0)
    return encoded[position:end], end


def _extensions(encoded: bytes, position: int) -> tuple[int | None, int]:
    """The transparent index of the first frame, and the position of its description."""
    transparent, blocks = None, 0
    while (kind := encoded[position]) != _FRAME:
        if kind != _EXTENSION:
            raise DamagedImageError(f"the GIF has no frame where it should, at byte {position:,}")
        blocks += 1
        if encoded[position + 1] == _CONTROL and encoded[position + 3] & 1:
            transparent = encoded[position + 6]
        position += 2
        while length := encoded[position]:
            position += length + 1
            blocks += 1
            if blocks > MAX_BLOCKS:
                break
        if blocks > MAX_BLOCKS:
            raise TooComplexError(f"the GIF has more than {MAX_BLOCKS:,} blocks before its first frame")
        position += 1
    return transparent, position + 1
