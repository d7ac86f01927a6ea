"""The images that the HTTP benchmark sends, and requests with several of them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vitserve.bench.request import EncodedImage

_BOUNDARY = b"----vitserve-bench"


def thumbnail() -> EncodedImage:
    """A JPEG of 32 × 32 pixels and about 1 KB, like an image of CIFAR-10."""
    return _noise(32, 32, cell=2, quality=75)


def small_photo() -> EncodedImage:
    """A JPEG of 500 × 333 pixels and about 36 KB."""
    return _noise(500, 333, cell=8, quality=77)


def large_photo() -> EncodedImage:
    """A JPEG of 500 × 333 pixels and about 77 KB."""
    return _noise(500, 333, cell=4, quality=88)


def _noise(width: int, height: int, cell: int, quality: int) -> EncodedImage:
    """Random colors, one for each ``cell`` × ``cell`` pixels, with smooth transitions."""
    colors = np.random.default_rng(0).integers(0, 256, (height // cell + 1, width // cell, 3), np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)
    image.save(out, "JPEG", quality=quality)
    return EncodedImage(out.getvalue(), "image/jpeg")


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
