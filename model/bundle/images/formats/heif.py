"""The container of AVIF (ISO/IEC 14496-12 and 23008-12): where the data of its images and of its first frames are.

libavif compares each item with all others, and makes a list of all frames. So the tables are bounded here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vitserve.model.bundle.images.errors import DamagedImageError, TooComplexError

MAX_BOXES = 4096  # side by side
MAX_ITEMS = 1024
MAX_FRAMES = 100_000
MAX_TABLE_BYTES = 2**16

_TABLES = (b"iinf", b"iloc", b"iref", b"grpl", b"ipma", b"stsc")
_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
_AV1 = int.from_bytes(b"av01")


class _Box(NamedTuple):
    kind: bytes
    start: int  # of the content
    end: int


class _Reader:
    """Big-endian integers of a part of the file. read() raises IndexError behind its end."""

    def __init__(self, encoded: bytes, start: int, end: int) -> None:
        self._encoded, self.position, self._end = encoded, start, end

    def read(self, size: int) -> int:
        if self.position + size > self._end:
            raise IndexError(self.position)
        value = int.from_bytes(self._encoded[self.position : self.position + size])
        self.position += size
        return value


def av1_data(encoded: bytes) -> list[memoryview]:
    """Of each AV1 item and of the first sample of each track. Raises DamagedImageError or TooComplexError."""
    data: list[memoryview] = []
    try:
        for box in _boxes(encoded, 0, len(encoded)):
            if box.kind == b"meta":
                data += _items(encoded, box)
            elif box.kind == b"moov":
                data += _first_samples(encoded, box)
    except IndexError as error:
        raise DamagedImageError("the AVIF's header is damaged") from error
    return data


def _boxes(encoded: bytes, start: int, end: int) -> Iterator[_Box]:
    for _ in range(MAX_BOXES):
        if start + 8 > end:
            return
        size, content = int.from_bytes(encoded[start : start + 4]), start + 8
        kind = encoded[start + 4 : start + 8]
        if size == 1:
            size, content = int.from_bytes(encoded[start + 8 : start + 16]), start + 16
        last = min(end, start + size) if size else end
        if last < content:
            raise DamagedImageError(f"the AVIF's box at byte {start:,} is damaged")
        if kind in _TABLES and last - content > MAX_TABLE_BYTES:
            raise TooComplexError(
                f"the AVIF has a table {kind.decode()} of {last - content:,} bytes; the limit is {MAX_TABLE_BYTES:,}"
            )
        yield _Box(kind, content, last)
        start = last
    raise TooComplexError(f"the AVIF has more than {MAX_BOXES:,} boxes in one place")


def _children(encoded: bytes, start: int, end: int) -> dict[bytes, _Box]:
    """Raises DamagedImageError if two are of the same kind, because libavif may read another one."""
    boxes: dict[bytes, _Box] = {}
    for box in _boxes(encoded, start, end):
        if boxes.setdefault(box.kind, box) != box and box.kind != b"free":
            raise DamagedImageError(f"the AVIF has two boxes {box.kind!r} in one place")
    return boxes


def _items(encoded: bytes, meta: _Box) -> Iterator[memoryview]:
    boxes = _children(encoded, meta.start + 4, meta.end)
    if b"iprp" in boxes:
        _check_properties(encoded, boxes[b"iprp"])
    if b"iinf" not in boxes or b"iloc" not in boxes:
        return
    coded, view = _items_of_av1(encoded, boxes[b"iinf"]), memoryview(encoded)
    for item, is_inside, extents in _locations(encoded, boxes[b"iloc"]):
        if item in coded:
            shift = boxes[b"idat"].start if is_inside and b"idat" in boxes else 0
            parts = [view[shift + at : shift + at + length if length else None] for at, length in extents]
            if sum(map(len, parts)) > len(encoded):
                raise DamagedImageError("the AVIF has an item larger than the file")
            yield parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


def _check_properties(encoded: bytes, properties: _Box) -> None:
    tables = 0
    for box in _boxes(encoded, properties.start, properties.end):
        if box.kind == b"ipco":
            for _ in _boxes(encoded, box.start, box.end):
                pass
        tables += box.end - box.start if box.kind == b"ipma" else 0
    if tables > MAX_TABLE_BYTES // 4:  # an entry takes 3 bytes, and makes an item
        raise TooComplexError(f"the AVIF has {tables:,} bytes of properties; the limit is {MAX_TABLE_BYTES // 4:,}")


def _items_of_av1(encoded: bytes, iinf: _Box) -> set[int]:
    reader = _Reader(encoded, iinf.start, iinf.end)
    _count(reader, large=reader.read(4) >> 24 > 0)
    items = set()
    for box in _boxes(encoded, reader.position, iinf.end):
        entry = _Reader(encoded, box.start, box.end)
        item = entry.read(4 if entry.read(4) >> 24 > 2 else 2)
        entry.read(2)
        if entry.read(4) == _AV1:
            items.add(item)
    return items


def _count(reader: _Reader, large: bool) -> int:
    count = reader.read(4 if large else 2)
    if count > MAX_ITEMS:
        raise TooComplexError(f"the AVIF has {count:,} items; the limit is {MAX_ITEMS:,}")
    return count


def _locations(encoded: bytes, iloc: _Box) -> Iterator[tuple[int, bool, list[tuple[int, int]]]]:
    """Item, whether it is in the metadata itself, and its parts: position and length, 0 for all the rest."""
    reader = _Reader(encoded, iloc.start, iloc.end)
    version = reader.read(4) >> 24
    sizes = reader.read(2)
    offset, length, base, index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    for _ in range(_count(reader, large=version > 1)):
        item = reader.read(4 if version > 1 else 2)
        method = reader.read(2) & 15 if version > 0 else 0
        reader.read(2)
        start = reader.read(base)
        extents = []
        for _ in range(_count(reader, large=False)):
            reader.read(index if version > 0 else 0)
            extents.append((start + reader.read(offset), reader.read(length)))
        yield item, method == 1, extents


def _first_samples(encoded: bytes, box: _Box) -> Iterator[memoryview]:
    """Of each track."""
    for child in _boxes(encoded, box.start, box.end):
        if child.kind == b"stbl":
            yield _first_sample(encoded, _children(encoded, child.start, child.end))
        elif child.kind in _CONTAINERS:
            yield from _first_samples(encoded, child)


def _first_sample(encoded: bytes, tables: dict[bytes, _Box]) -> memoryview:
    wide = b"co64" in tables
    chunks = _table(encoded, tables, b"co64" if wide else b"stco")
    count = chunks.read(4)
    start = chunks.read(8 if wide else 4) if count else 0
    samples = _table(encoded, tables, b"stsz")
    size = samples.read(4) or (samples.read(4) and samples.read(4))
    runs = _table(encoded, tables, b"stsc")
    most = max((runs.read(12) >> 32 & 0xFFFFFFFF for _ in range(runs.read(4))), default=0)
    if most * count > MAX_FRAMES:
        raise TooComplexError(f"the AVIF has {most * count:,} frames; the limit is {MAX_FRAMES:,}")
    return memoryview(encoded)[start : start + size]


def _table(encoded: bytes, tables: dict[bytes, _Box], kind: bytes) -> _Reader:
    """Behind the version and the flags."""
    if kind not in tables:
        raise DamagedImageError(f"the AVIF's frames have no table {kind.decode()}")
    return _Reader(encoded, tables[kind].start + 4, tables[kind].end)
