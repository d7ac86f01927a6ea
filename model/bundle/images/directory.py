"""The first directory of a TIFF file, which is also the form of EXIF metadata (TIFF 6.0, section 2; BigTIFF)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from vitserve.model.bundle.images.errors import DamagedImageError, TooComplexError

MAX_TAGS = 512
ORIENTATION = 274
SHORT, LONG = 3, 4
# Type of a tag → struct's letter. Others hold no integers that are needed here.
_LETTERS = {1: "B", SHORT: "H", LONG: "I", 7: "B", 16: "Q"}
# Type of a tag → bytes of a value.
VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_CLASSIC, _BIG = (42, "HHI4s", 4), (43, "HHQ8s", 8)


class Tag(NamedTuple):
    kind: int  # the type of its values
    length: int  # number of values
    at: int  # position of the first value


@dataclass(frozen=True)
class Directory:
    encoded: bytes
    order: str  # struct's letter for the byte order: < or >
    tags: dict[int, Tag]

    def values(self, tag: int, most: int = 16) -> tuple[int, ...]:
        """Empty if the tag is missing. Raises DamagedImageError for more values than ``most``, or for other types."""
        entry = self.tags.get(tag)
        if entry is None:
            return ()
        letter = _LETTERS.get(entry.kind)
        if letter is None or entry.length > most:
            raise DamagedImageError(f"the TIFF tag {tag} has {entry.length:,} values of type {entry.kind}")
        try:
            return struct.unpack_from(f"{self.order}{entry.length}{letter}", self.encoded, entry.at)
        except (struct.error, OverflowError) as error:
            raise DamagedImageError(f"the TIFF tag {tag} is outside of the file") from error

    def value(self, tag: int, default: int) -> int:
        return next(iter(self.values(tag)), default)

    @property
    def orientation(self) -> int:
        """1, upright, if it is missing or broken. Browsers do the same."""
        try:
            orientation = self.value(ORIENTATION, 1)
        except DamagedImageError:
            return 1
        return orientation if 1 <= orientation <= 8 else 1


def read_directory(encoded: bytes) -> Directory:
    """Raises DamagedImageError or TooComplexError."""
    order = "<" if encoded[:2] in (b"II", b"") else ">"
    try:
        return Directory(encoded, order, _tags(encoded, order))
    except (struct.error, OverflowError) as error:
        raise DamagedImageError("the TIFF directory is outside of the file") from error


def _tags(encoded: bytes, order: str) -> dict[int, Tag]:
    # A header whose magic number is in the other byte order is accepted, as by Pillow.
    big = 43 in encoded[2:4]
    _, entry, inline = _BIG if big else _CLASSIC
    (start,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", encoded, 8 if big else 4)
    counter = f"{order}{'Q' if big else 'H'}"
    (count,) = struct.unpack_from(counter, encoded, start)
    if count > MAX_TAGS:
        raise TooComplexError(f"the TIFF directory has {count:,} tags; the limit is {MAX_TAGS}")
    entries, size = start + struct.calcsize(counter), struct.calcsize(f"={entry}")
    tags: dict[int, Tag] = {}
    for number in range(count):
        at = entries + number * size
        tag, kind, values, _ = struct.unpack_from(order + entry, encoded, at)
        at += size - inline
        if values * VALUE_BYTES.get(kind, 1) > inline:
            (at,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", encoded, at)
        tags.setdefault(tag, Tag(kind, values, at))
    return tags


def orientation_of(exif: bytes) -> int:
    """1, upright, if the metadata is broken or does not say."""
    try:
        return read_directory(exif.removeprefix(b"Exif\0\0")).orientation
    except (DamagedImageError, TooComplexError):
        return 1
