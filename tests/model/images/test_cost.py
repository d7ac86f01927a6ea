"""The memory that decoding takes is estimated from the header: never too low, and at most half too high."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.encoders import bmp, chunk, png, tiff
from tests.support.images import encoded, random_image
from tests.support.paths import ROOT
from vitserve.model.bundle.preprocess import DecodeMode, Decoder, OpenedImage, Preprocessing
from vitserve.service.http_worker.dispatch.decode_stage import MAX_THREAD_SECONDS

MODES: tuple[DecodeMode, ...] = ("exact", "fastest")
SLACK_BYTES = 6 * 2**20  # of the interpreter and the libraries
DECODER = Decoder(Preprocessing(224, 0.875))


def solid(side: int, count: int) -> Any:
    return np.broadcast_to(np.arange(60, 60 + count), (side, side, count))


def files(side: int) -> dict[str, bytes]:
    """One image of each way in which memory is used."""
    flat = {mode: Image.new(mode, (side, side), color) for mode, color in (("L", 9), ("RGB", "teal"), ("CMYK", "teal"))}
    flat["RGBA"] = Image.new("RGBA", (side, side), (9, 200, 9, 90))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side // 2, side // 2, 3), np.uint8))
    palette = chunk(b"PLTE", bytes(range(256)) * 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "png-l": encoded(flat["L"]),
        "png-1": png(solid(side, 1) % 2, 1, 0),
        "png-i16": png(solid(side, 1), 16, 0, chunk(b"tRNS", b"\0\1")),
        "png-p": png(solid(side, 1), 8, 3, palette),
        "png-la": png(solid(side, 2), 8, 4),
        "png-rgb": encoded(noise),
        "png-rgba": encoded(flat["RGBA"]),
        "png-rgb16-key": png(solid(side, 3), 16, 2, chunk(b"tRNS", bytes(6))),
        "png-oriented": encoded(flat["RGB"], exif=exif),
        "jpeg": encoded(flat["RGB"], "JPEG"),
        "jpeg-l": encoded(flat["L"], "JPEG"),
        "jpeg-progressive": encoded(noise, "JPEG", progressive=True, subsampling=0),
        "jpeg-cmyk-progressive": encoded(flat["CMYK"], "JPEG", progressive=True),
        "jpeg-without-end": encoded(flat["RGB"], "JPEG")[:-2],
        "gif": encoded(flat["L"], "GIF", transparency=3),
        "bmp-rgba": bmp(solid(side // 2, 1)[..., 0], 32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
        "bmp-l": encoded(flat["L"].resize((side // 2, side // 2)), "BMP"),
        "tiff-rgba16": tiff(solid(side, 4), 16, 2, compression=8),
        "tiff-planes": tiff(solid(side, 3), 8, 2, compression=8, in_planes=True),
        "tiff-white-is-zero": tiff(solid(side, 1), 8, 0, compression=8),
        "tiff-lzma": encoded(flat["L"], "TIFF", compression="lzma"),
        "webp": encoded(noise, "WEBP", method=0),
        "webp-rgba": encoded(flat["RGBA"], "WEBP", lossless=True, method=0, quality=0),
        "avif": encoded(noise, "AVIF", speed=10),
        "avif-rgba": encoded(flat["RGBA"], "AVIF", speed=10),
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of the memory is read from /proc")
@pytest.mark.parametrize("side", [2000, pytest.param(7000, marks=pytest.mark.slow)])
def test_the_estimate_is_an_upper_bound_of_the_memory(side: int, tmp_path: Path) -> None:
    images = files(side)
    for name, image in images.items():
        (tmp_path / name).write_bytes(image)
    command = [
        sys.executable,
        "-m",
        "tests.support.peak_memory",
        "50000000",
        *(str(tmp_path / name) for name in images),
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    measured = dict(zip(images, json.loads(ran.stdout), strict=True))
    assert not {name: result for name, result in measured.items() if result["error"]}
    too_low = {n: result for n, result in measured.items() if result["peak"] > result["estimate"] + SLACK_BYTES}
    too_high = {n: r for n, r in measured.items() if r["estimate"] > 1.5 * r["peak"] + SLACK_BYTES}
    assert not too_low
    assert not too_high


def cost(image: bytes) -> OpenedImage:
    return DECODER.open(image)


def test_small_images_cost_little() -> None:
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        assert cost(encoded(random_image(32, 32), kind)).peak_bytes < 2**20, kind
        assert cost(encoded(random_image(32, 32), kind)).seconds < 1e-3, kind


def test_the_cost_grows_with_the_work() -> None:
    small, large = (encoded(random_image(side, side)) for side in (100, 1000))
    assert cost(large).seconds > 25 * cost(small).seconds
    image = random_image(1000, 1000)
    baseline, progressive = (encoded(image, "JPEG", progressive=value) for value in (False, True))
    assert cost(progressive).seconds > cost(baseline).seconds
    assert cost(progressive).peak_bytes > cost(baseline).peak_bytes


def test_a_reduced_scale_costs_less() -> None:
    image = encoded(random_image(3000, 3000), "JPEG")
    exact = Decoder(Preprocessing(224), mode="exact").open(image)
    assert cost(image).peak_bytes * 2 < exact.peak_bytes
    assert cost(image).seconds < exact.seconds


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_a_reduced_scale_does_not_hide_the_work_of_a_huge_jpeg(progressive: bool) -> None:
    """libjpeg reads all of the data at every scale, so large images are decoded in a process of their own at each."""
    image = encoded(Image.new("RGB", (7000, 7000)), "JPEG", progressive=progressive)
    exact, draft = (Decoder(Preprocessing(32), mode=mode).open(image) for mode in MODES)
    assert exact.seconds >= draft.seconds > MAX_THREAD_SECONDS


def test_opening_does_not_decode() -> None:
    """A damaged image is opened, and has a cost."""
    image = encoded(random_image(300, 200))
    opened = DECODER.open(image[: len(image) // 2])
    assert opened.header.pixels == 60_000
    assert opened.peak_bytes > 4 * 60_000
