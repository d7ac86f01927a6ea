"""Bounds the work of parsing a ModelInferRequest before it is parsed.

Protobuf reads elements of bytes with one copy each, but every number, name and parameter takes time, and up to twenty
times its bytes in memory. So everything but the content of images is counted first, in few steps of Python.

https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from vitserve.service import errors

MOST_BYTES = 1_000_000  # of everything but images. A pixel in a typed field takes one or two
_FIELD_BYTES = 64  # that each field counts in addition: a step of the loop below takes as long as parsing so many
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
# For the message, an input in it, and its contents: numbers of the fields that hold images, and of those to look into.
_IMAGES = (7,), (), (8,)
_NESTED = (5,), (5,), ()


def check_size(message: bytes) -> None:
    """Raises BadRequestError if parsing would take too long, or if the message is malformed."""
    try:
        _count(message, 0, len(message), 0, 0)
    except IndexError:
        raise malformed() from None


def malformed() -> errors.BadRequestError:
    return errors.BadRequestError("the message is not a ModelInferRequest")


def _count(message: bytes, position: int, end: int, level: int, counted: int) -> int:
    """Adds the bytes in between to ``counted``. ``level``: 0 for the message, 1 for an input, 2 for its contents."""
    while position < end:
        tag, start = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, after = _varint(message, start)
        elif kind == _LENGTH:
            length, start = _varint(message, start)
            after = start + length
        elif kind in (_FIXED32, _FIXED64):
            after = start + (4 if kind == _FIXED32 else 8)
        else:
            raise malformed()
        if after > end:
            raise malformed()
        counted += _FIELD_BYTES
        if kind == _LENGTH and number in _NESTED[level]:
            counted = _count(message, start, after, level + 1, counted)
        elif kind != _LENGTH or number not in _IMAGES[level]:
            counted += after - position
        if counted > MOST_BYTES:
            raise errors.BadRequestError(
                f"the message has more than {MOST_BYTES:,} bytes beside its images; send tensors in raw_input_contents"
            )
        position = after
    return counted


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """The number, and the position after it. Raises IndexError at the end of the message."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise malformed()
