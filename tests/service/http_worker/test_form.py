"""The reader of multipart forms takes few steps of Python and little memory, whatever the body is.

The steps call bytes.find(), whose time is linear in CPython.
"""

from __future__ import annotations

import contextlib

import pytest

from tests.support.effort import effort_of
from vitserve.service import errors
from vitserve.service.http_worker.inference.form import read_form

MEGABYTE = 2**20
PART = b'--B\r\nContent-Disposition: form-data; name="image"; filename="a"'
LONG = "a" * 190 + "b"

# Boundary and body.
HOSTILE: dict[str, tuple[str, bytes]] = {
    "similar boundaries": ("B", PART + b"\r\n\r\n" + b"\r\n--B-" * MEGABYTE),
    "other boundaries": ("B", PART + b"\r\n\r\n" + b"\r\n--A-" * MEGABYTE),
    "beginnings of a long boundary": (LONG, b"\r\n--" + LONG.encode() + (b"\r\n--" + b"a" * 190) * 20_000),
    "line breaks": ("B", PART + b"\r\n\r\n" + b"\r\n" * MEGABYTE + b"\r\n--B--"),
    "many parts": ("B", (PART + b"\r\n\r\nx\r\n") * 20_000 + b"--B--"),
    "many headers": ("B", (PART + b"\r\na:" * 2600 + b"\r\n\r\nx\r\n") * 66 + b"--B--"),
    "a long header": ("B", PART + b'; a="' * MEGABYTE + b"\r\n\r\nx\r\n--B--"),
    "many parameters": ("B", (PART + b';a="' * 2000 + b"\r\n\r\nx\r\n") * 66 + b"--B--"),
    "many backslashes": ("B", (PART + b';a="' + b"\\" * 8000 + b"\r\n\r\nx\r\n") * 66 + b"--B--"),
    "a padded boundary": ("B", b"--B" + b" " * 4 * MEGABYTE + b"\r\n--B--"),
    "a preamble": ("B", b"\r\n--" * MEGABYTE),
}


@pytest.mark.parametrize(("boundary", "body"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_forms_take_few_steps_and_little_memory(boundary: str, body: bytes) -> None:
    def read() -> None:
        with contextlib.suppress(errors.BadRequestError):
            read_form(f"multipart/form-data; boundary={boundary}", body, max_parts=66)

    effort = effort_of(read)
    assert effort.lines < 20_000
    assert effort.peak_bytes < 2 * len(body) + MEGABYTE
