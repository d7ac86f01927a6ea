"""Requests with one or several images, and the files in which the load generators read them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from vitserve.bench.request import EncodedImage

_BOUNDARY = b"----vitserve-bench"


class ToolMissingError(RuntimeError):
    """A program is not installed. The message names it and the package that has it."""


def multipart_request(path: str, images: Sequence[EncodedImage]) -> bytes:
    """A form with one file for each image."""
    parts = [
        b'--%s\r\nContent-Disposition: form-data; name="image"; filename="image"\r\nContent-Type: %s\r\n\r\n%s\r\n'
        % (_BOUNDARY, image.media_type.encode(), image.content)
        for image in images
    ]
    body = b"".join(parts) + b"--%s--\r\n" % _BOUNDARY
    return _post(path, f"multipart/form-data; boundary={_BOUNDARY.decode()}", body)


def json_request(path: str, images: Sequence[EncodedImage]) -> bytes:
    """All images in base64."""
    content = {"images": [base64.b64encode(image.content).decode() for image in images]}
    return _post(path, "application/json", json.dumps(content).encode())


def _post(path: str, content_type: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def write_requests(requests: Sequence[bytes], directory: Path) -> list[Path]:
    """Writes each request, head and body, to a file of its own."""
    files = [directory / f"{number}.http" for number in range(len(requests))]
    for file, request in zip(files, requests, strict=True):
        file.write_bytes(request)
    return files
