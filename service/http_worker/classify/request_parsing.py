"""Parses classify requests: a raw image, a multipart form or JSON.

Data from clients is never fetched as a URL, unpickled, written to disk or used as a path.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from vitserve.service import errors
from vitserve.service.http_worker.classify.form import read_form
from vitserve.service.settings import Settings

PRIORITY_HEADER = "Vitserve-Priority"
DEFAULT_PRIORITY = 5
_OPTIONS = ("top_k", "timeout_ms")
_JSON, _FORM = "application/json", "multipart/form-data"

Headers = Iterable[tuple[bytes, bytes]]  # names in lower case
Images = list[bytes | errors.ServiceError]  # an image that cannot be read is replaced by its error


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The part of a classify request that is known before its body."""

    content_type: str  # as sent, with parameters
    content_length: int | None
    options: dict[str, Any]  # of the query
    timeout_ms: int  # of the query, or the default. The body may have another
    priority: int  # 9 is the most urgent

    @property
    def media_type(self) -> str:
        return self.content_type.partition(";")[0].strip().lower()


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

    def expected_images(self, head: RequestHead) -> int:
        """1 for a raw image, and where nothing is known."""
        if head.media_type not in (_JSON, _FORM) or not self._average or head.content_length is None:
            return 1
        length = head.content_length * (0.75 if head.media_type == _JSON else 1.0)  # base64 is a third longer
        return max(1, round(length / self._average))


def parse_head(query: bytes, headers: Headers, settings: Settings) -> RequestHead:
    """Raises BadRequestError, BodyTooLargeError, UnsupportedMediaTypeError."""
    content_type, content_length = "application/octet-stream", None
    priority: int = DEFAULT_PRIORITY
    for name, value in headers:
        if name == b"content-type":
            content_type = value.decode("latin-1")
        elif name == b"content-length":
            content_length = int(value)
        elif name == b"vitserve-priority":
            priority = _whole_number(PRIORITY_HEADER, value.decode("latin-1"), 0, 9)
    options: dict[str, Any] = {}
    timeout_ms = settings.timeout_ms
    if query:
        options = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
        reject_unknown("query parameter", options, _OPTIONS)
        timeout_ms = _timeout_ms(options, settings)
    head = RequestHead(content_type, content_length, options, timeout_ms, priority)
    _check_media_type(head.media_type)
    if content_length is not None:
        check_length(content_length, settings, exact=True)
    return head


def check_length(length: int, settings: Settings, exact: bool = False) -> None:
    """Raises BodyTooLargeError. ``exact``: the whole body has this length, not only the part received so far."""
    if length > settings.max_body_bytes:
        more = "" if exact else " or more"
        raise errors.BodyTooLargeError(f"the body is {length:,} bytes{more}; the limit is {settings.max_body_bytes:,}")


def parse_body(head: RequestHead, body: bytes, settings: Settings, classes: int) -> ClassifyRequest:
    """Raises BadRequestError."""
    options = dict(head.options)
    if head.media_type == _JSON:
        images = _from_json(body, options)
    elif head.media_type == _FORM:
        images = _from_form(head, body, settings, options)
    else:
        images = [body]
    if not 1 <= len(images) <= settings.max_images:
        raise errors.BadRequestError(
            f"the request has {len(images)} images; the allowed number is 1 to {settings.max_images}"
        )
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
    if media_type not in (_JSON, _FORM, "application/octet-stream") and not media_type.startswith("image/"):
        raise errors.UnsupportedMediaTypeError(
            f"the content type is {media_type!r}; "
            "send image/*, application/octet-stream, multipart/form-data or application/json"
        )


def _from_json(body: bytes, options: dict[str, Any]) -> Images:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise errors.BadRequestError("the body is not valid JSON") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise errors.BadRequestError('the body must be {"images": ["<base64>", …]}')
    reject_unknown("field", content, ("images", *_OPTIONS))
    options.update({name: content[name] for name in _OPTIONS if name in content})
    return [_from_base64(text) for text in content["images"]]


def _from_base64(text: Any) -> bytes | errors.ServiceError:
    if not isinstance(text, str):
        return errors.BadRequestError("an image must be a base64 string")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return errors.BadRequestError("the image is not valid base64")


def _from_form(head: RequestHead, body: bytes, settings: Settings, options: dict[str, Any]) -> Images:
    images: Images = []
    for part in read_form(head.content_type, body, max_parts=settings.max_images + len(_OPTIONS)):
        if part.is_file:
            images.append(part.content)
        else:
            reject_unknown("non-file form field", (part.name,), _OPTIONS)
            options[part.name] = part.content.decode("latin-1")
    return images


def _timeout_ms(options: dict[str, Any], settings: Settings) -> int:
    return _whole_number("timeout_ms", options.get("timeout_ms", settings.timeout_ms), 1, 3_600_000)


def _whole_number(name: str, value: Any, low: int, high: int) -> int:
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        number = int(value)
    except (TypeError, ValueError) as error:
        raise errors.BadRequestError(f"{name} must be an integer from {low} to {high}") from error
    if not low <= number <= high:
        raise errors.BadRequestError(f"{name} is {number}; it must be from {low} to {high}")
    return number
