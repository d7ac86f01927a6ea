"""Parses classify requests: a raw image, a multipart form or JSON.

Data from clients is never fetched as a URL, unpickled, written to disk or used as a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from vitserve.service import errors
from vitserve.service.http_worker.classify.content_coding import coding_of, decoded
from vitserve.service.http_worker.classify.form import read_form
from vitserve.service.http_worker.classify.json_body import Images, read_json, too_many_images
from vitserve.service.settings import Settings

PRIORITY_HEADER = "Vitserve-Priority"
DEFAULT_PRIORITY = 5
_OPTIONS = ("top_k", "timeout_ms")
_JSON, _FORM = "application/json", "multipart/form-data"
_RAW = ("application/octet-stream", "binary/octet-stream")  # the second is the default of object stores
_URL_ENCODED = "application/x-www-form-urlencoded"  # the default of curl --data-binary
# The first bytes of the formats that are decoded. AVIF's are at offset 4.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
# Larger bodies are parsed on a thread. Escaped characters in JSON take longer than all others.
_MAX_PARSED_ON_LOOP, _MAX_ESCAPED_ON_LOOP = 1_048_576, 65_536
_NUMBER = re.compile(r"\s*[+-]?[0-9]{1,100}\s*", re.ASCII)  # int() accepts more, such as 1_0

Headers = Iterable[tuple[bytes, bytes]]  # names in lower case


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The part of a classify request that is known before its body."""

    content_type: str  # as sent, with parameters
    media_type: str  # without parameters, in lower case
    coding: str  # of the body: gzip, deflate, or empty
    content_length: int | None
    options: dict[str, Any]  # of the query
    timeout_ms: int  # of the query, or the default. The body may have another
    priority: int  # 9 is the most urgent


@dataclass(frozen=True, slots=True)
class ClassifyRequest:
    images: Images
    top_k: int
    timeout_ms: int


class ImageBytes:
    """The average size of an encoded image, to estimate the number of images in a body that is not read."""

    def __init__(self) -> None:
        self._average = 0.0

    def record(self, request: ClassifyRequest) -> None:
        for image in request.images:
            if isinstance(image, bytes):
                self._average += (len(image) - self._average) * (0.1 if self._average else 1.0)

    def expected_images(self, head: RequestHead, max_images: int) -> int:
        """At most ``max_images``. 1 for a raw image, and where nothing is known."""
        if head.media_type not in (_JSON, _FORM) or not self._average or head.content_length is None:
            return 1
        length = head.content_length * (0.75 if head.media_type == _JSON else 1.0)  # base64 is a third longer
        return max(1, min(max_images, round(length / self._average)))


def parse_head(query: bytes, headers: Headers, settings: Settings) -> RequestHead:
    """Raises BadRequestError, BodyTooLargeError, UnsupportedMediaTypeError, UnsupportedCodingError."""
    content_type, coding, content_length = "application/octet-stream", "", None
    priority: int = DEFAULT_PRIORITY
    for name, value in headers:
        if name == b"content-type":
            content_type = value.decode("latin-1")
        elif name == b"content-length":
            content_length = int(value)
        elif name == b"vitserve-priority":
            priority = _whole_number(PRIORITY_HEADER, value.decode("latin-1"), 0, 9)
        elif name == b"content-encoding":
            coding = ",".join(filter(None, [coding, value.decode("latin-1")]))
    options: dict[str, Any] = {}
    timeout_ms = settings.timeout_ms
    if query:
        options = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
        reject_unknown("query parameter", options, _OPTIONS)
        timeout_ms = _timeout_ms(options, settings)
    media_type = content_type.partition(";")[0].strip().lower()
    _check_media_type(media_type)
    coding = coding_of(coding) if coding else ""
    head = RequestHead(content_type, media_type, coding, content_length, options, timeout_ms, priority)
    if content_length is not None:
        check_length(content_length, settings, exact=True)
    return head


def check_length(length: int, settings: Settings, exact: bool = False) -> None:
    """Raises BodyTooLargeError. ``exact``: the whole body has this length, not only the part received so far."""
    if length > settings.max_body_bytes:
        more = "" if exact else " or more"
        raise errors.BodyTooLargeError(f"the body is {length:,} bytes{more}; the limit is {settings.max_body_bytes:,}")


def takes_long(head: RequestHead, chunks: list[bytes], length: int) -> bool:
    """Whether parse_body() may take more than about a millisecond, so that it must not run on the event loop."""
    if head.coding:
        return True
    if head.media_type == _JSON and _MAX_ESCAPED_ON_LOOP < length <= _MAX_PARSED_ON_LOOP:
        return any(b"\\" in chunk for chunk in chunks)
    return head.media_type in (_JSON, _FORM) and length > _MAX_PARSED_ON_LOOP


def parse_body(head: RequestHead, chunks: list[bytes], settings: Settings, classes: int) -> ClassifyRequest:
    """``chunks`` are the body. Their memory is freed as they are joined.

    Raises BadRequestError, BodyTooLargeError, UnsupportedMediaTypeError.
    """
    options = dict(head.options)
    body = _joined(chunks, head)
    if head.coding:
        body = decoded(body, head.coding, settings.max_body_bytes)
    if head.media_type == _JSON:
        images, more_options = read_json(body, settings.max_images, _OPTIONS)
        options |= more_options
    elif head.media_type == _FORM:
        images = _from_form(head, body, settings, options)
    elif head.media_type == _URL_ENCODED and not _is_image(body):
        raise errors.UnsupportedMediaTypeError(_wrong_media_type(_URL_ENCODED))
    else:
        images = [bytes(body)]
    if not 1 <= len(images) <= settings.max_images:
        raise too_many_images(str(len(images)), settings.max_images)
    return ClassifyRequest(
        images,
        top_k=_whole_number("top_k", options.get("top_k", min(5, classes)), 1, classes),
        timeout_ms=_timeout_ms(options, settings),
    )


def reject_unknown(kind: str, names: Iterable[str], allowed: tuple[str, ...] = ()) -> None:
    """Raises BadRequestError for the first name that is not allowed."""
    for name in names:
        if name not in allowed:
            raise errors.BadRequestError(
                f"unknown {kind} {name[:100]!r}; allowed: {', '.join(allowed) if allowed else 'none'}"
            )


def _check_media_type(media_type: str) -> None:
    if not media_type.startswith("image/") and media_type not in (_JSON, _FORM, *_RAW, _URL_ENCODED):
        raise errors.UnsupportedMediaTypeError(_wrong_media_type(media_type))


def _wrong_media_type(media_type: str) -> str:
    return (
        f"the content type is {media_type[:100]!r}; "
        "send image/*, application/octet-stream, multipart/form-data or application/json"
    )


def _joined(chunks: list[bytes], head: RequestHead) -> bytes | bytearray:
    """Large bodies that are parsed are joined in steps: joining 32 MB at once blocks the event loop for 20 ms."""
    if head.media_type not in (_JSON, _FORM):
        return b"".join(chunks) if len(chunks) != 1 else chunks[0]
    body = bytearray()
    for number, chunk in enumerate(chunks):
        body += chunk
        chunks[number] = b""
    return body


def _is_image(body: bytes | bytearray) -> bool:
    return body.startswith(_SIGNATURES) or body[4:8] == b"ftyp"


def _from_form(head: RequestHead, body: bytes | bytearray, settings: Settings, options: dict[str, Any]) -> Images:
    """A part without a file name is an image if it has a media type other than text (RFC 7578, 4.2 and 4.4)."""
    images: Images = []
    for part in read_form(head.content_type, body, max_parts=settings.max_images + len(_OPTIONS)):
        if part.has_file_name or (part.name not in _OPTIONS and not _is_text(part.media_type)):
            images.append(part.content)
        elif part.name in _OPTIONS:
            options[part.name] = part.content.decode("latin-1")
        else:
            raise errors.BadRequestError(
                f"unknown form field {part.name[:100]!r}; allowed: {', '.join(_OPTIONS)}, and images, "
                "which need a file name or a Content-Type such as image/jpeg"
            )
    return images


def _is_text(media_type: str) -> bool:
    return not media_type or media_type.startswith("text/")


def _timeout_ms(options: dict[str, Any], settings: Settings) -> int:
    return _whole_number("timeout_ms", options.get("timeout_ms", settings.timeout_ms), 1, 3_600_000)


def _whole_number(name: str, value: Any, low: int, high: int) -> int:
    try:
        if isinstance(value, (bool, float)) or (isinstance(value, str) and not _NUMBER.fullmatch(value)):
            raise ValueError
        number = int(value)
    except (TypeError, ValueError) as error:
        raise errors.BadRequestError(f"{name} must be an integer from {low} to {high}") from error
    if not low <= number <= high:
        raise errors.BadRequestError(f"{name} is {str(number)[:100]}; it must be from {low} to {high}")
    return number
