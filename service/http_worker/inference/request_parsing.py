"""Parses requests with images: a raw image, a multipart form or JSON.

Data from clients is never fetched as a URL, unpickled, written to disk or used as a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from vitserve.service import errors
from vitserve.service.http_worker.dispatch.decoding import PixelImage
from vitserve.service.http_worker.inference.content_coding import coding_of, decoded
from vitserve.service.http_worker.inference.form import read_form
from vitserve.service.http_worker.inference.json_body import Images, read_json, too_many_images
from vitserve.service.http_worker.inference.options import reject_unknown, timeout_ms, whole_number
from vitserve.service.http_worker.inference.response import Outcome, Response, ResponseEncoder
from vitserve.service.settings import Settings

PRIORITY_HEADER = "Vitserve-Priority"
DEFAULT_PRIORITY = 5
_JSON, _FORM = "application/json", "multipart/form-data"
_RAW = ("application/octet-stream", "binary/octet-stream")  # the second is the default of object stores
_URL_ENCODED = "application/x-www-form-urlencoded"  # the default of curl --data-binary
# The first bytes of the formats that are decoded. AVIF's are at offset 4.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
# Larger bodies are parsed on a thread. Escaped characters in JSON take longer than all others.
_MAX_PARSED_ON_LOOP, _MAX_ESCAPED_ON_LOOP = 1_048_576, 65_536

Headers = Iterable[tuple[bytes, bytes]]  # names in lower case
ImageInput = bytes | PixelImage | errors.ServiceError  # an image that cannot be read is replaced by its error


class RequestHead(NamedTuple):
    """The part of a request that is known before its body."""

    content_type: str  # as sent, with parameters
    media_type: str  # without parameters, in lower case
    coding: str  # of the body: gzip, deflate, or empty
    content_length: int | None
    options: dict[str, Any]  # of the query
    timeout_ms: int  # of the query, or the default. The body may have another
    priority: int  # 9 is the most urgent


class ImageRequest(NamedTuple):
    images: Sequence[ImageInput]
    timeout_ms: int
    embedding: bool  # whether the results need embeddings
    encode: Callable[[ResponseEncoder, Sequence[Outcome], float], Response]  # the last argument: seconds of reading
    priority: int  # 9 is the most urgent


class ImageBytes:
    """The average size of an encoded image, to estimate the number of images in a body that is not read."""

    def __init__(self) -> None:
        self._average = 0.0

    def record(self, images: Iterable[ImageInput]) -> None:
        for image in images:
            if isinstance(image, bytes):
                self._average += (len(image) - self._average) * (0.1 if self._average else 1.0)

    def expected_images(self, head: RequestHead, max_images: int) -> int:
        """At most ``max_images``. 1 for a raw image, and where nothing is known."""
        if head.media_type not in (_JSON, _FORM) or not self._average or head.content_length is None:
            return 1
        length = head.content_length * (0.75 if head.media_type == _JSON else 1.0)  # base64 is a third longer
        return max(1, min(max_images, round(length / self._average)))


def parse_head(query: bytes, headers: Headers, settings: Settings, option_names: Sequence[str]) -> RequestHead:
    """``option_names``: those that the query may have.

    Raises BadRequestError, BodyTooLargeError, UnsupportedMediaTypeError, UnsupportedCodingError.
    """
    content_type, coding, content_length = "application/octet-stream", "", None
    priority: int = DEFAULT_PRIORITY
    for name, value in headers:
        if name == b"content-type":
            content_type = value.decode("latin-1")
        elif name == b"content-length":
            content_length = int(value)
        elif name == b"vitserve-priority":
            priority = whole_number(PRIORITY_HEADER, value.decode("latin-1"), 0, 9)
        elif name == b"content-encoding":
            coding = ",".join(filter(None, [coding, value.decode("latin-1")]))
    options: dict[str, Any] = {}
    milliseconds = settings.timeout_ms
    if query:
        options = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
        reject_unknown("query parameter", options, option_names)
        milliseconds = timeout_ms(options, settings)
    media_type = content_type.partition(";")[0].strip().lower()
    _check_media_type(media_type)
    coding = coding_of(coding) if coding else ""
    head = RequestHead(content_type, media_type, coding, content_length, options, milliseconds, priority)
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


def parse_body(
    head: RequestHead, chunks: list[bytes], settings: Settings, option_names: Sequence[str]
) -> tuple[Images, Mapping[str, Any]]:
    """The images, and the options of the query and of the body. ``chunks`` are the body; their memory is freed.

    Raises BadRequestError, BodyTooLargeError, UnsupportedMediaTypeError.
    """
    options = dict(head.options)
    body = joined(chunks, in_steps=head.media_type in (_JSON, _FORM))
    if head.coding:
        body = decoded(body, head.coding, settings.max_body_bytes)
    if head.media_type == _JSON:
        images, more_options = read_json(body, settings.max_images, option_names)
        options |= more_options
    elif head.media_type == _FORM:
        images = _from_form(head, body, settings, options, option_names)
    elif head.media_type == _URL_ENCODED and not _is_image(body):
        raise errors.UnsupportedMediaTypeError(_wrong_media_type(_URL_ENCODED))
    else:
        images = [bytes(body)]
    if not 1 <= len(images) <= settings.max_images:
        raise too_many_images(str(len(images)), settings.max_images)
    return images, options


def _check_media_type(media_type: str) -> None:
    if not media_type.startswith("image/") and media_type not in (_JSON, _FORM, *_RAW, _URL_ENCODED):
        raise errors.UnsupportedMediaTypeError(_wrong_media_type(media_type))


def _wrong_media_type(media_type: str) -> str:
    return (
        f"the content type is {media_type[:100]!r}; "
        "send image/*, application/octet-stream, multipart/form-data or application/json"
    )


def joined(chunks: list[bytes], in_steps: bool) -> bytes | bytearray:
    """Large bodies that are parsed are joined in steps: joining 32 MB at once blocks the event loop for 20 ms."""
    if not in_steps:
        return b"".join(chunks) if len(chunks) != 1 else chunks[0]
    body = bytearray()
    for number, chunk in enumerate(chunks):
        body += chunk
        chunks[number] = b""
    return body


def _is_image(body: bytes | bytearray) -> bool:
    return body.startswith(_SIGNATURES) or body[4:8] == b"ftyp"


def _from_form(
    head: RequestHead,
    body: bytes | bytearray,
    settings: Settings,
    options: dict[str, Any],
    option_names: Sequence[str],
) -> Images:
    """A part without a file name is an image if it has a media type other than text (RFC 7578, 4.2 and 4.4)."""
    images: Images = []
    for part in read_form(head.content_type, body, max_parts=settings.max_images + len(option_names)):
        if part.has_file_name or (part.name not in option_names and not _is_text(part.media_type)):
            images.append(part.content)
        elif part.name in option_names:
            options[part.name] = part.content.decode("latin-1")
        else:
            raise errors.BadRequestError(
                f"unknown form field {part.name[:100]!r}; allowed: {', '.join(option_names)}, and images, "
                "which need a file name or a Content-Type such as image/jpeg"
            )
    return images


def _is_text(media_type: str) -> bool:
    return not media_type or media_type.startswith("text/")
