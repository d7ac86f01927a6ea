"""The scanner of JSON bodies: the same result as json.loads(), without an object for every value."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.effort import effort_of
from vitserve.service import errors
from vitserve.service.http_worker.inference.json_body import JsonBody, read_json

MEGABYTE = 2**20
MAX_IMAGES = 8
OPTIONS = ("top_k", "timeout_ms")


def described(body: JsonBody) -> tuple[list[bytes | str], dict[str, Any]]:
    images = [image if isinstance(image, bytes) else image.code for image in body.images]
    return images, body.options


def reference(body: bytes) -> tuple[list[bytes | str], dict[str, Any]] | None:
    """None for a body that has to be rejected."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        content = json.loads(body.decode("utf-8-sig"), object_pairs_hook=unique, strict=False)
    except ValueError:
        return None
    images = content.pop("images", None) if isinstance(content, dict) else None
    if not isinstance(images, list) or len(images) > MAX_IMAGES or not content.keys() <= set(OPTIONS):
        return None
    if any(isinstance(value, (list, dict)) for value in [*images, *content.values()]):
        return None
    return [base64_or_error(image) for image in images], content


def base64_or_error(text: Any) -> bytes | str:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (AttributeError, ValueError):
        return "bad_request"


base64_text = st.binary(max_size=40).map(lambda data: base64.b64encode(data).decode())
scalars = (
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text('a$é\n"\\/\ud800😀', max_size=6)
)
values = base64_text | scalars | st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=2), scalars)
documents = st.fixed_dictionaries(
    {"images": st.lists(base64_text | scalars, max_size=MAX_IMAGES + 1)},
    optional={"top_k": scalars, "timeout_ms": values, "other": scalars},
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Most are valid. In some, a few bytes are replaced by characters that have a meaning in JSON."""
    body = bytearray(
        json.dumps(
            draw(documents),
            ensure_ascii=draw(st.booleans()),
            indent=draw(st.none() | st.just(3)),
            separators=draw(st.sampled_from([None, (",", ":"), (" , ", "\t:\r\n")])),
        ).encode("utf-8", "surrogatepass")
    )
    for _ in range(draw(st.integers(0, 2))):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.sampled_from(b'"\\{}[],:0 x\n\xff'))
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + bytes(body)


@hypothesis.settings(max_examples=60)
@given(bodies())
def test_the_scanner_agrees_with_a_general_parser(body: bytes) -> None:
    """Except that it accepts more kinds of base64, and does not decode other texts in the list of images."""
    expected = reference(body)
    try:
        images, options = described(read_json(body, MAX_IMAGES, OPTIONS))
    except errors.BadRequestError:
        assert expected is None
        return
    if expected is None:
        with pytest.raises(UnicodeDecodeError):
            body.decode()
        return
    assert repr(options) == repr(expected[1])
    for image, wanted in zip(images, expected[0], strict=True):
        assert wanted in (image, "bad_request")


HOSTILE = {
    "numbers": b'{"images": [' + b"1," * MEGABYTE + b"1]}",
    "unknown fields": b"{" + b",".join(b'"k%d":1' % number for number in range(100_000)) + b"}",
    "the same field": b"{" + b'"top_k":1,' * 100_000 + b'"images":[]}',
    "nested lists": b'{"images":' + b"[" * MEGABYTE,
    "nested objects": b'{"images":[' + b'{"a":' * MEGABYTE,
    "spaces": b" " * 2 * MEGABYTE,
    "a long name": b'{"' + b"a" * 2 * MEGABYTE + b'":1}',
    "a long number": b'{"images":[],"top_k":' + b"1" * 2 * MEGABYTE + b"}",
    "a text without an end": b'{"images":["' + b"A" * 2 * MEGABYTE,
    "escaped quotes": b'{"images":["' + b'\\"' * MEGABYTE + b'"]}',
    "backslashes": b'{"images":["' + b"\\\\" * MEGABYTE + b'"]}',
    "escapes": b'{"images":["' + b"\\u0000" * 300_000 + b'"]}',
    "line breaks": b'{"images":["' + b"A\n" * MEGABYTE + b'"]}',
    "other characters": b'{"images":["' + b"%" * 2 * MEGABYTE + b'"]}',
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_json_takes_few_steps_and_little_memory(body: bytes) -> None:
    def read() -> None:
        with contextlib.suppress(errors.BadRequestError):
            read_json(body, MAX_IMAGES, OPTIONS)

    effort = effort_of(read)
    assert effort.lines < 2000
    assert effort.peak_bytes < 4 * len(body) + MEGABYTE
