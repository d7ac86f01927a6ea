"""Requests contain the complete image, in the format of each server."""

from __future__ import annotations

import json

from tests.support.images import encoded, random_image
from vitserve.bench.request import EncodedImage, multipart, open_inference

JPEG = EncodedImage(encoded(random_image(60, 45), "JPEG"), "image/jpeg")


def test_a_form_contains_the_image() -> None:
    head, _, body = multipart("/x", JPEG, "request").partition(b"\r\n\r\n")
    assert int(head.rpartition(b"Content-Length: ")[2]) == len(body)
    assert body.count(JPEG.content) == 1


def test_a_tensor_contains_the_image() -> None:
    head, _, body = open_inference("/x", JPEG, "image", "logits").partition(b"\r\n\r\n")
    length = int(head.partition(b"Inference-Header-Content-Length: ")[2].partition(b"\r")[0])
    header = json.loads(body[:length])
    assert header["inputs"][0]["parameters"]["binary_data_size"] == len(body) - length
    assert body[length:] == len(JPEG.content).to_bytes(4, "little") + JPEG.content
