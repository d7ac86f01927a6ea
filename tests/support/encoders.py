"""Image files of kinds that Pillow does not write, from samples whose meaning is known."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[Any]  # [height, width, samples of a pixel]

# PNG, 8.2: first column and row, and steps, of the passes of an interlaced image.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def packed(rows: Samples, bits: int, order: str = ">") -> list[bytes]:
    """Each row of samples as bytes. Samples of less than 8 bits, or of 12, begin at the most significant bit."""
    flat = rows.reshape(len(rows), -1)
    if bits in (8, 16, 32):
        kind = rows.dtype.kind if rows.dtype.kind == "f" else "u"
        return [row.astype(f"{order}{kind}{bits // 8}").tobytes() for row in flat]
    shifts = np.arange(bits - 1, -1, -1)
    return [np.packbits((row[:, None] >> shifts & 1).astype(np.uint8)).tobytes() for row in flat]


def chunk(kind: bytes, content: bytes = b"", damaged: bool = False) -> bytes:
    """Of a PNG. ``damaged``: with a wrong checksum."""
    checksum = zlib.crc32(kind + content) ^ damaged
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(
    samples: Samples, bits: int, color: int, before: bytes = b"", after: bytes = b"", interlaced: bool = False
) -> bytes:
    """``before`` and ``after``: chunks around the pixels."""
    height, width, _ = samples.shape
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    parts = (samples[top::down, left::right] for left, top, right, down in passes)
    rows = b"".join(b"\0" + row for part in parts if part.size for row in packed(part, bits))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND")


def tiff(
    samples: Samples,
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    big: bool = False,
    in_planes: bool = False,
    rows: int | None = None,
    tile: int | None = None,
    compression: int = 1,
    differences: bool = False,
    tags: Mapping[int, Sequence[int]] | None = None,
) -> bytes:
    """``rows`` of a strip, or the side of a ``tile``. ``differences``: of neighbors (predictor 2)."""
    height, width, count = samples.shape
    planes = [samples[..., plane : plane + 1] for plane in range(count)] if in_planes else [samples]
    rows = rows or height
    blocks = [
        _tiff_block(block, bits, order, compression, differences)
        for plane in planes
        for block in (_tiles(plane, tile) if tile else (plane[top : top + rows] for top in range(0, height, rows)))
    ]
    start = 16 if big else 8
    offsets = [start + sum(map(len, blocks[:number])) for number in range(len(blocks))]
    sizes = [len(block) for block in blocks]
    entries: dict[int, Sequence[int]] = {
        256: [width],
        257: [height],
        258: [bits] * count,
        259: [compression],
        262: [photometric],
        277: [count],
        284: [1 + in_planes],
        317: [1 + differences],
    }
    if tile:
        entries |= {322: [tile], 323: [tile], 324: offsets, 325: sizes}
    else:
        entries |= {273: offsets, 278: [rows], 279: sizes}
    return _tiff_file(b"".join(blocks), entries | dict(tags or {}), order, big)


def _tiles(plane: Samples, side: int) -> Iterable[Samples]:
    height, width, _ = plane.shape
    whole = np.pad(plane, ((0, -height % side), (0, -width % side), (0, 0)))
    for top in range(0, height, side):
        for left in range(0, width, side):
            yield whole[top : top + side, left : left + side]


def _tiff_block(block: Samples, bits: int, order: str, compression: int, differences: bool) -> bytes:
    if differences:
        block = np.concatenate([block[:, :1], np.diff(block, axis=1) % 2**bits], axis=1)
    data = b"".join(packed(block, bits, order))
    if compression == 8:
        return zlib.compress(data)
    if compression == 32773:  # PackBits, as runs of up to 128 literal bytes
        return b"".join(
            bytes([len(part) - 1]) + part for part in (data[at : at + 128] for at in range(0, len(data), 128))
        )
    return data


def _tiff_file(data: bytes, entries: dict[int, Sequence[int]], order: str, big: bool) -> bytes:
    """All values as LONG, except those that have to be SHORT."""
    word, inline, counter = ("Q", 8, "Q") if big else ("I", 4, "H")
    start = (16 if big else 8) + len(data)
    values_at = start + struct.calcsize(f"={counter}") + len(entries) * (12 if not big else 20) + inline
    directory, values = struct.pack(f"{order}{counter}", len(entries)), b""
    for tag, content in sorted(entries.items()):
        long = tag in (256, 257, 273, 278, 279, 322, 323, 324, 325)
        packed_values = struct.pack(f"{order}{len(content)}{'I' if long else 'H'}", *content)
        directory += struct.pack(f"{order}HH{word}", tag, 4 if long else 3, len(content))
        if len(packed_values) <= inline:
            directory += packed_values.ljust(inline, b"\0")
        else:
            directory += struct.pack(f"{order}{word}", values_at + len(values))
            values += packed_values
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42)
    header += struct.pack(f"{order}HH", 8, 0) if big else b""
    return header + struct.pack(f"{order}{word}", start) + data + directory + bytes(inline) + values


def bmp(
    pixels: Samples,
    bits: int,
    masks: Sequence[int] = (),
    header: int = 124,
    top_down: bool = False,
    compression: int = 3,
) -> bytes:
    """``pixels``: [height, width] integers of ``bits``. ``masks``: bits of red, green, blue and alpha."""
    height, width = pixels.shape
    row_bytes = -(-width * bits // 32) * 4
    stored = pixels if top_down else pixels[::-1]
    body = b"".join(row.astype(f"<u{bits // 8}").tobytes().ljust(row_bytes, b"\0") for row in stored)
    fields = struct.pack(
        "<IiiHHIIiiII", header, width, -height if top_down else height, 1, bits, compression, len(body), 0, 0, 0, 0
    )
    fields = (fields + struct.pack(f"<{len(masks)}I", *masks)).ljust(header, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + header + len(body), 0, 0, 14 + header) + fields + body
