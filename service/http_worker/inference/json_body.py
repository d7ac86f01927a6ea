"""Reads a JSON body (RFC 8259) of a classify request: {"images": ["<base64>", …], "top_k": 5, "timeout_ms": 1000}.

A general JSON parser would build an object for every value before anything could be checked: a million numbers take
seconds and hundreds of megabytes. This scanner knows the structure. It stops at the first value that does not fit,
counts images as it reads them, and decodes each image from its place in the body without a copy. Work on long texts is
done in pieces: each call holds the interpreter lock, and the event loop waits for it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vitserve.service import errors
from vitserve.service.http_worker.inference import base64_image

Images = list[bytes | errors.ServiceError]  # an image that cannot be read is replaced by its error

_STRUCTURE = 'the body must be {"images": ["<base64>", …]}'
_KINDS = {b"[": "a list", b"{": "an object"}
_SPACE = re.compile(rb"[ \t\r\n]{0,65536}+")
_NAME = re.compile(rb'"((?:[^"\\]|\\.){0,200}+)"', re.DOTALL)
_SCALAR = re.compile(rb"[\w.+-]{1,100}+(?![\w.+-])")
_PIECE_BYTES = 262_144  # of a string with escape sequences
_MAX_ESCAPED_QUOTES, _MAX_BACKSLASHES = 16, 64  # in the text of an image; a data: URL may have some


class JsonBody(NamedTuple):
    images: Images
    options: dict[str, Any]


def read_json(body: bytes | bytearray, max_images: int, option_names: Sequence[str]) -> JsonBody:
    """Raises BadRequestError."""
    if b"\0" in body[:4]:
        raise errors.BadRequestError("JSON must be encoded in UTF-8")
    scanner = _Scanner(body, len(codecs.BOM_UTF8) if body.startswith(codecs.BOM_UTF8) else 0)
    images: Images | None = None
    options: dict[str, Any] = {}
    if scanner.next_byte() != b"{":
        raise scanner.unexpected() if scanner.ended() else errors.BadRequestError(_STRUCTURE)
    names = ("images", *option_names)
    for _ in scanner.items(b"}"):
        name = scanner.name()
        if name not in names:
            raise errors.BadRequestError(f"unknown field {name[:100]!r}; allowed: {', '.join(names)}")
        if name in options or (name == "images" and images is not None):
            raise errors.BadRequestError(f"the field {name!r} occurs twice")
        if name == "images":
            images = _images(scanner, max_images)
        else:
            options[name] = scanner.scalar(f"{name} must be a single value")
    scanner.end()
    if images is None:
        raise errors.BadRequestError(f"{_STRUCTURE}; the field 'images' is missing")
    return JsonBody(images, options)


def _images(scanner: _Scanner, max_images: int) -> Images:
    images: Images = []
    if scanner.next_byte() != b"[":
        reason = errors.BadRequestError("the field 'images' must be a list of base64 strings")
        raise scanner.unexpected() if scanner.ended() else reason
    for _ in scanner.items(b"]"):
        if len(images) == max_images:
            raise too_many_images(f"more than {max_images}", max_images)
        images.append(_image(scanner, f"images[{len(images)}]"))
    return images


def _image(scanner: _Scanner, name: str) -> bytes | errors.BadRequestError:
    if scanner.next_byte() != b'"':
        value = scanner.scalar(f"{name} must be a base64 string")
        return errors.BadRequestError(f"{name} is {json.dumps(value)[:100]}; an image must be a base64 string")
    try:
        return base64_image.decode(scanner.text(name))
    except base64_image.Base64Error as error:
        return errors.BadRequestError(f"{name} {error}")


def too_many_images(count: str, max_images: int) -> errors.BadRequestError:
    return errors.BadRequestError(f"the request has {count} images; the allowed number is 1 to {max_images}")


class _Scanner:
    """Reads values from left to right. All methods raise BadRequestError for invalid JSON."""

    def __init__(self, body: bytes | bytearray, position: int) -> None:
        self._body, self._position = body, position

    def next_byte(self) -> bytes:
        """The next byte after white space, which is not consumed. Empty at the end of the body."""
        while True:
            match = _SPACE.match(self._body, self._position)
            self._position = match.end() if match else self._position  # it matches an empty text too
            next_byte = bytes(self._body[self._position : self._position + 1])
            if next_byte not in (b" ", b"\t", b"\r", b"\n"):
                return next_byte

    def ended(self) -> bool:
        return not self.next_byte()

    def items(self, closing: bytes) -> Iterator[None]:
        """One iteration per item of a list or an object, which begins here. The loop's body must read the item."""
        self._position += 1
        if self.take(closing):
            return
        while True:
            yield
            if self.take(closing):
                return
            if not self.take(b","):
                raise self.unexpected()

    def take(self, expected: bytes) -> bool:
        if self.next_byte() != expected:
            return False
        self._position += 1
        return True

    def name(self) -> str:
        """The name of a field, and the colon after it."""
        if self.next_byte() != b'"':
            raise self.unexpected()
        match = _NAME.match(self._body, self._position)
        if match is None:
            raise errors.BadRequestError("the name of a field has more than 200 characters, or does not end")
        name = str(self._loads(match[0]))
        self._position = match.end()
        if not self.take(b":"):
            raise self.unexpected()
        return name

    def scalar(self, expectation: str) -> Any:
        """A value that is neither a list nor an object."""
        byte = self.next_byte()
        if byte in _KINDS:
            raise errors.BadRequestError(f"{expectation}, not {_KINDS[byte]}")
        match = (_NAME if byte == b'"' else _SCALAR).match(self._body, self._position)
        if match is None:
            raise self.unexpected()
        value = self._loads(match[0])
        self._position = match.end()
        return value

    def text(self, name: str) -> bytes | memoryview:
        """The content of a string that should be base64.

        Line breaks are accepted, although JSON does not allow them: shells insert the output of base64 as it is.
        """
        start = self._position + 1
        end = self._end_of_text(start, name)
        self._position = end + 1
        if self._body.find(b"\\", start, end) < 0:
            return memoryview(self._body)[start:end]
        return b"".join(self._unescaped(start, end))

    def _end_of_text(self, start: int, name: str) -> int:
        """The position of the closing quote. Base64 has neither quotes nor backslashes, so only few are skipped."""
        end = start - 1
        for _ in range(_MAX_ESCAPED_QUOTES + 1):
            end = self._body.find(b'"', end + 1)
            if end < 0:
                raise self.unexpected(len(self._body))
            before = bytes(self._body[max(start, end - _MAX_BACKSLASHES) : end])
            backslashes = len(before) - len(before.rstrip(b"\\"))
            if backslashes == _MAX_BACKSLASHES:
                break
            if backslashes % 2 == 0:
                return end
        raise errors.BadRequestError(f"{name} is not valid base64: it contains quotes or backslashes")

    def _unescaped(self, start: int, end: int) -> Iterator[bytes]:
        while start < end:
            stop = min(end, start + _PIECE_BYTES)
            if stop < end:  # not within an escape sequence, such as \u002b
                escape = self._body.rfind(b"\\", stop - 6, stop)
                stop = stop if escape < 0 else escape
            piece = bytes(self._body[start:stop]).decode("latin-1")
            yield str(self._loads(f'"{piece}"')).encode("utf-8", "surrogatepass")
            start = stop

    def end(self) -> None:
        if not self.ended():
            raise self.unexpected()

    def unexpected(self, position: int | None = None) -> errors.BadRequestError:
        position = self._position if position is None else position
        next_byte = self._body[position : position + 1]
        if not next_byte:
            return errors.BadRequestError("the body is not valid JSON: it ends too early")
        return errors.BadRequestError(
            f"the body is not valid JSON: unexpected {next_byte.decode('latin-1')!r} at byte {position}"
        )

    def _loads(self, token: bytes | str) -> Any:
        try:
            return json.loads(token, strict=False)
        except ValueError as error:
            raise self.unexpected() from error
