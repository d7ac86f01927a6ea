"""The files that an ONNX file keeps weights in. Needs no package, because a cached bundle is served without onnx.

onnx.proto: TensorProto.external_data is a list of StringStringEntryProto, whose fields 1 and 2 are key and value. The
value of the key "location" is a path, relative to the directory of the ONNX file.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

_LOCATION = re.compile(rb"\x0a\x08location\x12")  # field 1 has 8 bytes; the length of field 2 follows
_FEWEST_BYTES = 12  # an empty file cannot be mapped


def external_files(path: Path) -> list[Path]:
    """The existing files that the ONNX file names, sorted.

    It is not parsed: bytes of a weight that look like an entry count too, if a file of that name exists.
    """
    if path.stat().st_size < _FEWEST_BYTES:
        return []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        locations = set(_locations(data))
    files = {path.parent / location for location in locations if "\0" not in location}
    return sorted(file for file in files if file.is_file())


def _locations(data: mmap.mmap) -> Iterator[str]:
    for match in _LOCATION.finditer(data):
        start, length = _length(data, match.end())
        try:
            yield data[start : start + length].decode()
        except UnicodeDecodeError:
            continue


def _length(data: mmap.mmap, position: int) -> tuple[int, int]:
    """The start of the text, and its length: a varint of at most two bytes, as no path is longer than 4,096 bytes."""
    first, second = data[position : position + 1] or b"\0", data[position + 1 : position + 2] or b"\0"
    if first[0] < 128:
        return position + 1, first[0]
    return position + 2, first[0] - 128 + (second[0] << 7)
