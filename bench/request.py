"""The bytes of a whole HTTP request for an image, in the words of each server."""

from __future__ import annotations

import json
import mimetypes
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

MOST_IMAGES = 64  # of a directory: enough that no cache knows them all, few enough to hold
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_BOUNDARY = "----vitserve-bench"


class Picture(NamedTuple):
    content: bytes
    kind: str  # of media


def read_pictures(source: Path) -> list[Picture]:
    """One file, or a directory's images, searched through, the first 64 by name. Raises ValueError where there are none."""
    if source.is_file():
        return [_picture(source)]
    if not source.is_dir():
        raise ValueError(f"there is no {source}, neither a file nor a directory of images")
    files = sorted(each for each in source.rglob("*") if each.suffix.lower() in _SUFFIXES)
    if not files:
        raise ValueError(f"{source} holds no images ({', '.join(_SUFFIXES)})")
    return [_picture(file) for file in files[:MOST_IMAGES]]


def made_picture(directory: str) -> Path:
    """A JPEG of 500 × 333 pixels and about 40 KB, where no photo was named."""
    noise = np.random.default_rng(0).integers(0, 256, (84, 125, 3), np.uint8)
    path = Path(directory) / "made.jpg"
    Image.fromarray(noise).resize((500, 333), Image.Resampling.BICUBIC).save(path, quality=88)
    return path


def raw(path: str, picture: Picture, headers: str = "") -> bytes:
    """The image is the body. ``headers`` are further whole lines."""
    return _post(path, f"Content-Type: {picture.kind}\r\n{headers}", picture.content)


def multipart(path: str, picture: Picture, field: str) -> bytes:
    """The image is a form's file."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="image"\r\nContent-Type: {picture.kind}\r\n\r\n'
    body = head.encode() + picture.content + f"\r\n--{_BOUNDARY}--\r\n".encode()
    return _post(path, f"Content-Type: multipart/form-data; boundary={_BOUNDARY}\r\n", body)


def open_inference(path: str, picture: Picture, tensor: str, output: str) -> bytes:
    """The image is a BYTES tensor of the Open Inference Protocol's binary extension; the answer is asked for as JSON."""
    size = len(picture.content) + 4
    header = json.dumps(
        {
            "inputs": [
                {"name": tensor, "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": size}}
            ],
            "outputs": [{"name": output, "parameters": {"binary_data": False}}],
        }
    ).encode()
    body = header + len(picture.content).to_bytes(4, "little") + picture.content
    return _post(
        path, f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {len(header)}\r\n", body
    )


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()


def _post(path: str, headers: str, body: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: bench\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _picture(file: Path) -> Picture:
    return Picture(file.read_bytes(), mimetypes.guess_type(file.name)[0] or "application/octet-stream")
