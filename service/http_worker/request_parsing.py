"""Reads what a client posts: raw image, multipart form or JSON, into encoded images and options.

Nothing that a client sends is fetched, unpickled, written to disk or used as a path.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Mapping
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


@dataclass(frozen=True)
class Classification:
    """What is asked for. An image that could not be read stands as its error, so that the others are answered."""

    images: list[bytes | errors.ServiceError]
    top_k: int
    timeout_ms: int
    priority: int  # 9 is the most urgent


class _InMemory(MultiPartParser):
    spool_max_size = 2**62  # the body is bounded and in memory already; never spill a client's image to disk


async def read_body(request: Request, limit: int) -> bytes:
    """Raises BodyTooLarge as soon as the declared or the received length passes the limit."""
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


async def parse(request: Request, body: bytes, settings: Settings, classes: int) -> Classification:
    """Raises BadRequest, UnsupportedMediaType."""
    kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    options: dict[str, Any] = {name: request.query_params[name] for name in _OPTIONS if name in request.query_params}
    images: list[bytes | errors.ServiceError]
    if kind == "application/json":
        images = _from_json(body, options)
    elif kind == "multipart/form-data":
        images = await _from_form(request, body, settings, options)
    elif kind == "application/octet-stream" or kind.startswith("image/"):
        images = [body]
    else:
        raise errors.UnsupportedMediaTypeError(
            f"the content type is {kind!r}; send image/*, application/octet-stream, multipart/form-data or application/json"
        )
    if not 1 <= len(images) <= settings.max_images:
        raise errors.BadRequestError(
            f"the request holds {len(images)} images; from 1 to {settings.max_images} are allowed"
        )
    top_k = _whole_number(options, "top_k", min(5, classes), 1, classes)
    timeout_ms = _whole_number(options, "timeout_ms", settings.timeout_ms, 1, 3_600_000)
    priority = _whole_number(
        {PRIORITY_HEADER: request.headers.get(PRIORITY_HEADER, DEFAULT_PRIORITY)},
        PRIORITY_HEADER,
        DEFAULT_PRIORITY,
        0,
        9,
    )
    return Classification(images, top_k, timeout_ms, priority)


def _from_json(body: bytes, options: dict[str, Any]) -> list[bytes | errors.ServiceError]:
    try:
        sent = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise errors.BadRequestError("the body is not valid JSON") from error
    if not isinstance(sent, dict) or not isinstance(sent.get("images"), list):
        raise errors.BadRequestError('the body must be {"images": ["<base64>", …]}')
    unknown = sent.keys() - {"images", *_OPTIONS}
    if unknown:
        raise errors.BadRequestError(f"unknown fields: {', '.join(sorted(unknown))[:200]}")
    options.update({name: sent[name] for name in _OPTIONS if name in sent})
    return [_from_base64(each) for each in sent["images"]]


def _from_base64(text: Any) -> bytes | errors.ServiceError:
    if not isinstance(text, str):
        return errors.BadRequestError("an image must be a string of base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return errors.BadRequestError("the image is not valid base64")


async def _from_form(
    request: Request, body: bytes, settings: Settings, options: dict[str, Any]
) -> list[bytes | errors.ServiceError]:
    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    parser = _InMemory(request.headers, once(), max_files=settings.max_images, max_fields=len(_OPTIONS))
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeError, ValueError) as error:
        raise errors.BadRequestError(f"the form could not be read: {getattr(error, 'message', 'malformed')}") from error
    images: list[bytes | errors.ServiceError] = []
    for name, part in form.multi_items():
        if isinstance(part, UploadFile):
            images.append(await part.read())
        elif name in _OPTIONS:
            options[name] = part
        else:
            raise errors.BadRequestError(f"the field {name[:100]!r} is neither a file nor one of {', '.join(_OPTIONS)}")
    await form.close()
    return images


def _whole_number(options: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    sent = options.get(name, default)
    try:
        if isinstance(sent, (bool, float)):
            raise ValueError
        number = int(sent)
    except (TypeError, ValueError) as error:
        raise errors.BadRequestError(f"{name} must be a whole number from {low} to {high}") from error
    if not low <= number <= high:
        raise errors.BadRequestError(f"{name} is {number}; it must be from {low} to {high}")
    return number
