"""Content-Encoding of request bodies (RFC 9110, 8.4): gzip and deflate, decoded within the limit of the body's size."""

from __future__ import annotations

import zlib

from vitserve.service import errors

_NAMES = {"": "", "identity": "", "gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}
_INPUT_BYTES, _OUTPUT_BYTES = 65_536, 1_048_576  # of one step; zlib copies the input that a step leaves
_GZIP, _ZLIB, _RAW = 31, 15, -15  # values of zlib's wbits


def coding_of(header: str) -> str:
    """``gzip``, ``deflate``, or empty for a body that is not encoded. Raises UnsupportedCodingError."""
    codings = [_NAMES.get(name.strip().lower()) for name in header.split(",")]
    applied = [coding for coding in codings if coding != ""]
    if len(applied) > 1 or None in applied:
        raise errors.UnsupportedCodingError(
            f"the Content-Encoding is {header[:100]!r}; send gzip, deflate or no encoding, and only one"
        )
    return applied[0] or "" if applied else ""


def decoded(body: bytes | bytearray, coding: str, limit: int) -> bytes:
    """``limit``: of the decoded bytes. Raises BadRequestError for damaged data, BodyTooLargeError beyond the limit."""
    inflater = zlib.decompressobj(_GZIP if coding == "gzip" else _deflate_format(body))
    pieces: list[bytes] = []
    size, consumed = 0, 0
    try:
        while consumed < len(body) and not inflater.eof:
            tail: bytes | memoryview = memoryview(body)[consumed : consumed + _INPUT_BYTES]
            consumed += len(tail)
            while tail and not inflater.eof:
                pieces.append(inflater.decompress(tail, _OUTPUT_BYTES))
                tail = inflater.unconsumed_tail
                size += len(pieces[-1])
                _check_size(size, limit)
        pieces.append(inflater.flush())
    except zlib.error as error:
        raise errors.BadRequestError(f"the body is not valid {coding}, although its Content-Encoding is") from error
    _check_size(size + len(pieces[-1]), limit)
    if not inflater.eof:
        raise errors.BadRequestError(f"the body is truncated: its {coding} data does not end")
    if inflater.unused_data or consumed < len(body):
        raise errors.BadRequestError(f"the body has data after the end of its {coding} data")
    return b"".join(pieces)


def _deflate_format(body: bytes | bytearray) -> int:
    """RFC 9110 means the zlib format (RFC 1950). Some clients send raw deflate data (RFC 1951) instead."""
    has_zlib_header = len(body) > 1 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
    return _ZLIB if has_zlib_header else _RAW


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise errors.BodyTooLargeError(f"the decoded body has more than {limit:,} bytes, which is the limit")
