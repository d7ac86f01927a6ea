"""Complete HTTP requests for an image, as bytes, in the format of each server."""

from __future__ import annotations

import json
import mimetypes
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitserve.model.bundle.evaluation import SUFFIXES, image_files

MAX_IMAGES = 64  # of a directory: too many for a CPU cache, few enough for memory
_BOUNDARY = "----vitserve-bench"


class EncodedImage(NamedTuple):
    content: bytes
    media_type: str


def read_encoded_images(source: Path) -> list[EncodedImage]:
    """Reads one file, or the first 64 images by name in a directory and its subdirectories, without hidden files.

    Raises ValueError.
    """
    if source.is_file():
        return [_read(source)]
    if not source.is_dir():
        raise ValueError(f"{source} is neither a file nor a directory of images")
    files = image_files(source)
    if not files:
        raise ValueError(f"{source} contains no images ({', '.join(SUFFIXES)})")
    return [_read(file) for file in files[:MAX_IMAGES]]


def write_sample_image(directory: str) -> Path:
    """Writes a JPEG of 500 × 333 pixels and about 40 KB, the default image of the benchmarks."""
    noise = np.random.default_rng(0).integers(0, 256, (84, 125, 3), np.uint8)
    path = Path(directory) / "sample.jpg"
    Image.fromarray(noise).resize((500, 333), Image.Resampling.BICUBIC).save(path, quality=88)
    return path


def raw(path: str, image: EncodedImage, headers: str = "") -> bytes:
    """The image is the body. ``headers`` are additional complete lines."""
    return _post(path, f"Content-Type: {image.media_type}\r\n{headers}", image.content)


def multipart(path: str, image: EncodedImage, field: str) -> bytes:
    """The image is a file in a form."""
    disposition = f'Content-Disposition: form-data; name="{field}"; filename="image"\r\n'
    head = f"--{_BOUNDARY}\r\n{disposition}Content-Type: {image.media_type}\r\n\r\n"
    body = head.encode() + image.content + f"\r\n--{_BOUNDARY}--\r\n".encode()
    return _post(path, f"Content-Type: multipart/form-data; boundary={_BOUNDARY}\r\n", body)


def open_inference(path: str, image: EncodedImage, tensor: str, output: str) -> bytes:
    """The image is a BYTES tensor in the binary extension of the Open Inference Protocol. The response is JSON."""
    size = len(image.content) + 4
    shape = {"name": tensor, "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": size}}
    outputs = [{"name": output, "parameters": {"binary_data": False}}]
    header = json.dumps({"inputs": [shape], "outputs": outputs}).encode()
    length = f"Inference-Header-Content-Length: {len(header)}\r\n"
    body = header + len(image.content).to_bytes(4, "little") + image.content
    return _post(path, f"Content-Type: application/octet-stream\r\n{length}", body)


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()


def _post(path: str, headers: str, body: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: bench\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _read(file: Path) -> EncodedImage:
    return EncodedImage(file.read_bytes(), mimetypes.guess_type(file.name)[0] or "application/octet-stream")
