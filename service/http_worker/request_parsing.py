"""Parses classify requests: a raw image, a multipart form or JSON.

Data from clients is never fetched as a URL, unpickled, written to disk or used as a path.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from vitserve.service import errors
from vitserve.service.settings import Settings

PRIORITY_HEADER = "Vitserve-Priority"
DEFAULT_PRIORITY = 5
_OPTIONS = ("top_k", "timeout_ms")

Images = list[bytes | errors.ServiceError]  # an image that cannot be read is replaced by its error


@dataclass(frozen=True)
class ClassifyRequest:
    images: Images
    top_k: int
    timeout_ms: int
    priority: int  # 9 is the most urgent


class _InMemoryParser(MultiPartParser):
    spool_max_size = 2**62  # the size of the body is limited, so parts are never written to disk


async def read_body(request: Request, limit: int) -> bytes:
    """Raises BodyTooLargeError as soon as the declared or the received length exceeds the limit."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise errors.BodyTooLargeError(f"the body is {int(declared):,} bytes; the limit is {limit:,}")
    chunks, length = [], 0
    async for chunk in request.stream():
        length += len(chunk)
        if length > limit:
            raise errors.BodyTooLargeError(f"the body is {length:,} bytes or more; the limit is {limit:,}")
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def parse(request: Request, body: bytes, settings: Settings, classes: int) -> ClassifyRequest:
    """Raises BadRequestError, UnsupportedMediaTypeError."""
    content_type = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    options: dict[str, Any] = dict(request.query_params)
    _reject_unknown("query parameter", options, _OPTIONS)
    images: Images
    if content_type == "application/json":
        images = _from_json(body, options)
    elif content_type == "multipart/form-data":
        images = await _from_form(request, body, settings, options)
    elif content_type == "application/octet-stream" or content_type.startswith("image/"):
        images = [body]
    else:
        raise errors.UnsupportedMediaTypeError(
            f"the content type is {content_type!r}; "
            "send image/*, application/octet-stream, multipart/form-data or application/json"
        )
    if not 1 <= len(images) <= settings.max_images:
        raise errors.BadRequestError(
            f"the request has {len(images)} images; the allowed number is 1 to {settings.max_images}"
        )
    priority = request.headers.get(PRIORITY_HEADER, DEFAULT_PRIORITY)
    return ClassifyRequest(
        images,
        top_k=_whole_number("top_k", options.get("top_k", min(5, classes)), 1, classes),
        timeout_ms=_whole_number("timeout_ms", options.get("timeout_ms", settings.timeout_ms), 1, 3_600_000),
        priority=_whole_number(PRIORITY_HEADER, priority, 0, 9),
    )


def reject_query(request: Request) -> None:
    """For routes without query parameters. Raises BadRequestError."""
    _reject_unknown("query parameter", request.query_params, ())


def _from_json(body: bytes, options: dict[str, Any]) -> Images:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise errors.BadRequestError("the body is not valid JSON") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise errors.BadRequestError('the body must be {"images": ["<base64>", …]}')
    _reject_unknown("field", content, ("images", *_OPTIONS))
    options.update({name: content[name] for name in _OPTIONS if name in content})
    return [_from_base64(text) for text in content["images"]]


def _from_base64(text: Any) -> bytes | errors.ServiceError:
    if not isinstance(text, str):
        return errors.BadRequestError("an image must be a base64 string")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return errors.BadRequestError("the image is not valid base64")


async def _from_form(request: Request, body: bytes, settings: Settings, options: dict[str, Any]) -> Images:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = _InMemoryParser(request.headers, stream(), max_files=settings.max_images, max_fields=len(_OPTIONS))
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeError, ValueError) as error:
        message = getattr(error, "message", "malformed")
        raise errors.BadRequestError(f"the form could not be read: {message}") from error
    images: Images = []
    for name, part in form.multi_items():
        if isinstance(part, UploadFile):
            images.append(await part.read())
        else:
            _reject_unknown("non-file form field", (name,), _OPTIONS)
            options[name] = part
    await form.close()
    return images


def _reject_unknown(kind: str, names: Iterable[str], allowed: tuple[str, ...]) -> None:
    for name in names:
        if name not in allowed:
            raise errors.BadRequestError(
                f"unknown {kind} {name[:100]!r}; allowed: {', '.join(allowed) if allowed else 'none'}"
            )


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
