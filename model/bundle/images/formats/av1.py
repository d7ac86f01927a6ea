"""AV1: the frames in a part of a file, and their sizes (AV1 Bitstream & Decoding Process Specification).

A still image has one frame, or one for each of at most four layers. AV1 can also hide frames, at the same cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vitserve.model.bundle.images.errors import DamagedImageError, TooComplexError

MAX_FRAMES = 4
MAX_UNITS = 4096

_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME = 1, 3, 6  # 6.2.2: types of units
_SELECTED = 2  # 3: SELECT_SCREEN_CONTENT_TOOLS


class Frame(NamedTuple):
    """The largest frame that a sequence header allows."""

    width: int
    height: int
    bytes_per_pixel: float  # of all planes


def frames(data: memoryview) -> list[Frame]:
    """One for each sequence header. Raises DamagedImageError or TooComplexError."""
    try:
        return list(_frames(data))
    except IndexError as error:
        raise DamagedImageError("the AVIF's frames are damaged") from error


def _frames(data: memoryview) -> Iterator[Frame]:
    """5.3: open bitstream units."""
    position = count = 0
    for _ in range(MAX_UNITS):
        if position >= len(data):
            return
        header = data[position]
        kind = header >> 3 & 15
        position += 2 if header & 4 else 1
        size = len(data) - position
        if header & 2:
            size, position = _leb128(data, position)
        if kind == _SEQUENCE_HEADER:
            yield _largest_frame(bytes(data[position : position + min(size, 256)]))
        elif kind in (_FRAME_HEADER, _FRAME):
            count += 1
        if count > MAX_FRAMES:
            raise TooComplexError(f"the AVIF has more than {MAX_FRAMES} frames in one image")
        position += size
    raise TooComplexError(f"the AVIF has more than {MAX_UNITS:,} units in one image")


def _leb128(data: memoryview, position: int) -> tuple[int, int]:
    """The value and the position behind it (4.10.5)."""
    value = 0
    for byte in range(8):
        value |= (data[position] & 127) << 7 * byte
        position += 1
        if data[position - 1] < 128:
            break
    return value, position


@dataclass
class _Bits:
    data: bytes
    position: int = 0

    def read(self, count: int) -> int:
        end = self.position + count
        if end > 8 * len(self.data):
            raise IndexError(end)
        first, last = self.position // 8, -(-end // 8)
        self.position = end
        return int.from_bytes(self.data[first:last]) >> (8 * last - end) & ((1 << count) - 1)


def _largest_frame(data: bytes) -> Frame:
    """5.5: sequence_header_obu."""
    bits = _Bits(data)
    profile = bits.read(3)
    bits.read(1)
    reduced = bits.read(1)
    if reduced:
        bits.read(5)
    else:
        _skip_operating_points(bits)
    sizes = bits.read(4) + 1, bits.read(4) + 1
    width, height = (bits.read(size) + 1 for size in sizes)
    if not reduced and bits.read(1):
        bits.read(7)
    bits.read(3)
    if not reduced:
        _skip_tools(bits)
    bits.read(3)
    deep = bits.read(1)
    if profile == 2 and deep:
        bits.read(1)
    is_gray = profile != 1 and bits.read(1)
    samples = 1.0 if is_gray else 1.5 if profile == 0 else 3.0
    return Frame(width, height, samples * (2 if deep else 1))


def _skip_operating_points(bits: _Bits) -> None:
    delays = 0
    has_model = 0
    if bits.read(1):  # timing
        bits.read(64)
        if bits.read(1):
            _skip_uvlc(bits)
        has_model = bits.read(1)
        if has_model:
            delays = bits.read(5) + 1
            bits.read(42)
    has_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.read(12)
        if bits.read(5) > 7:
            bits.read(1)
        if has_model and bits.read(1):
            bits.read(2 * delays + 1)
        if has_delay and bits.read(1):
            bits.read(4)


def _skip_uvlc(bits: _Bits) -> None:
    zeros = 0
    while not bits.read(1):
        zeros += 1
    if zeros < 32:
        bits.read(zeros)


def _skip_tools(bits: _Bits) -> None:
    bits.read(4)
    has_order = bits.read(1)
    if has_order:
        bits.read(2)
    forced = _SELECTED if bits.read(1) else bits.read(1)
    if forced and not bits.read(1):
        bits.read(1)
    if has_order:
        bits.read(3)
