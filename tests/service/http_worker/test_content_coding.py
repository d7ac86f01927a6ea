"""Compressed bodies are decoded in steps, up to a limit."""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Callable

import pytest

from tests.support.effort import effort_of
from vitserve.service import errors
from vitserve.service.http_worker.inference.content_coding import decoded

STEP = 2**20
ENCODERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "stored": ("gzip", lambda data: gzip.compress(data, 0)),
    "deflate": ("deflate", zlib.compress),
}


@pytest.mark.parametrize("size", [0, 1, 65_536, STEP - 1, STEP, STEP + 1, 2 * STEP + 12_345])
@pytest.mark.parametrize("similar", [True, False])
@pytest.mark.parametrize(("coding", "encode"), ENCODERS.values(), ids=ENCODERS.keys())
def test_any_size_is_decoded_up_to_the_limit(
    coding: str, encode: Callable[[bytes], bytes], size: int, similar: bool
) -> None:
    data = bytes(size) if similar else random.Random(size).randbytes(size)
    encoded = encode(data)
    assert decoded(encoded, coding, limit=size) == data
    if size:
        with pytest.raises(errors.BodyTooLargeError, match=f"more than {size - 1:,} bytes"):
            decoded(encoded, coding, limit=size - 1)
        with pytest.raises(errors.BadRequestError):
            decoded(encoded[:-1], coding, limit=size)


def test_a_small_body_that_expands_to_gigabytes_takes_the_memory_of_the_limit() -> None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    body = b"".join(compressor.compress(bytes(STEP)) for _ in range(256)) + compressor.flush()

    def decode() -> None:
        with pytest.raises(errors.BodyTooLargeError):
            decoded(body, "gzip", limit=4 * STEP)

    assert len(body) < STEP
    assert effort_of(decode).peak_bytes < 8 * STEP
