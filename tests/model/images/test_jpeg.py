"""JPEG: an end marker that is missing, bounds from the header, and headers that libjpeg reads in the same way."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.images import encoded, random_image
from vitserve.model.bundle.images.formats import jpeg
from vitserve.model.bundle.preprocess import (
    DamagedImageError,
    Decoder,
    NotAnImageError,
    Preprocessing,
    TooComplexError,
    UnsupportedImageError,
)

EXACT = Decoder(Preprocessing(32), mode="exact")
DRAFT = Decoder(Preprocessing(32), mode="fastest")
KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "full chroma": {"subsampling": 0},
    "restart intervals": {"restart_marker_blocks": 3},
    "optimized": {"optimize": True},
}


def noise(width: int = 320, height: int = 240, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_decoders_give_the_same_pixels(kind: str, mode: str) -> None:
    for width, height in ((320, 240), (33, 17), (8, 8), (1, 3), (250, 251)):
        for quality in (30, 95):
            data = encoded(noise(width, height, mode), "JPEG", quality=quality, **KINDS[kind])
            for scale in (1, 2, 4, 8):
                image = replace(jpeg.read(data), scale=scale)
                pixels = image.array()
                if pixels is None:  # a size that several scales have
                    assert scale > 1
                    assert max(width, height) < 8
                else:
                    assert np.array_equal(pixels.squeeze(), np.asarray(image._pixels(data)).squeeze()), (width, scale)


def test_every_photo_has_the_same_pixels_with_both_decoders(photos: list[Path]) -> None:
    jpegs = [jpeg.read(photo.read_bytes()) for photo in photos]
    for image in jpegs:
        pixels = image.array()
        assert pixels is not None
        assert np.array_equal(pixels.squeeze(), np.asarray(image._pixels(image.encoded)))


@pytest.mark.parametrize("decoder", [EXACT, DRAFT], ids=["exact", "draft"])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_end_marker_that_is_missing_does_not_matter(kind: str, mode: str, decoder: Decoder) -> None:
    for image in (noise(mode=mode), random_image(50, 40).convert(mode)):
        whole = encoded(image, "JPEG", **KINDS[kind])
        for missing in (1, 2):
            assert np.array_equal(decoder.decode(whole[:-missing]), decoder.decode(whole)), missing


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_that_are_missing_are_an_error(kind: str, mode: str) -> None:
    """Wherever the data ends. A few bits at the end may be padding, or a part of a pixel that is not visible."""
    whole = encoded(noise(mode=mode), "JPEG", quality=90, **KINDS[kind])
    expected = EXACT.decode(whole)
    for missing in (*range(3, 12), 50, 500, len(whole) // 3, len(whole) // 2):
        try:
            difference = np.abs(EXACT.decode(whole[:-missing]).astype(int) - expected).max()
        except DamagedImageError:
            continue
        assert missing < 8, f"{missing} missing bytes were not noticed"
        assert difference <= 1
    with pytest.raises(DamagedImageError):
        EXACT.decode(whole[:-12])


def scans(image: bytes) -> list[int]:
    positions = [at for at in range(len(image)) if image.startswith(b"\xff\xda", at)]
    assert len(positions) > 3
    return positions


def test_scans_that_are_missing_are_an_error() -> None:
    whole = encoded(noise(), "JPEG", progressive=True)
    for position in scans(whole)[1:]:
        with pytest.raises(DamagedImageError):
            EXACT.decode(whole[:position])


def with_scans(count: int) -> bytes:
    """The last scan of a progressive JPEG, repeated."""
    whole = encoded(Image.new("RGB", (64, 64), "gray"), "JPEG", progressive=True)
    positions = scans(whole)
    last = whole[positions[-1] : -2]
    return whole[:-2] + last * (count - len(positions)) + whole[-2:]


def test_scans_are_counted_before_decoding() -> None:
    assert EXACT.decode(with_scans(jpeg.MAX_SCANS)).shape == (32, 32, 3)
    with pytest.raises(TooComplexError, match="101 scans; the limit is 100"):
        EXACT.open(with_scans(jpeg.MAX_SCANS + 1))


def test_only_the_scans_of_the_image_count() -> None:
    """Not those of its preview, and not what looks like scans in a video behind it."""
    thumbnail = with_scans(90)
    image = encoded(random_image(), "JPEG", progressive=True, exif=b"Exif\0\0" + thumbnail)
    pixels = EXACT.decode(image)
    assert np.array_equal(EXACT.decode(image + b"\xff\xda" * 5000 + bytes(100)), pixels)
    assert np.array_equal(EXACT.decode(image + image), pixels)


def test_segments_are_counted_before_decoding() -> None:
    image = encoded(random_image(), "JPEG")
    segment = b"\xff\xe5\0\2"
    assert np.array_equal(EXACT.decode(image[:2] + segment * 4000 + image[2:]), EXACT.decode(image))
    with pytest.raises(TooComplexError, match="more than 4,096 segments"):
        EXACT.open(image[:2] + segment * 5000 + image[2:])


@pytest.mark.parametrize(
    "filler", [b"\xff" * 1000, b"\0" * 1000, b"\xff\0" * 500], ids=["fill bytes", "zeros", "stuffing"]
)
def test_bytes_between_segments_are_skipped(filler: bytes) -> None:
    image = encoded(random_image(), "JPEG")
    assert np.array_equal(EXACT.decode(image[:20] + filler + image[20:]), EXACT.decode(image))
    with pytest.raises(DamagedImageError):
        EXACT.open(image[:20] + filler * 70 + image[20:])


def marker(image: bytes | bytearray, code: int) -> int:
    return image.index(bytes((0xFF, code)))


@pytest.mark.parametrize("code", [0xC3, 0xC5, 0xC7, 0xCB, 0xCF])
def test_kinds_that_are_not_read_are_named(code: int) -> None:
    image = bytearray(encoded(random_image(), "JPEG"))
    image[marker(image, 0xC0) + 1] = code
    with pytest.raises(UnsupportedImageError, match=f"SOF{code - 0xC0} is not read"):
        EXACT.open(bytes(image))


def test_headers_of_other_depths_and_components_are_named() -> None:
    image = bytearray(encoded(random_image(), "JPEG"))
    image[marker(image, 0xC0) + 4] = 12
    with pytest.raises(UnsupportedImageError, match="12 bits a sample is not read; store 8"):
        EXACT.open(bytes(image))
    start = marker(image, 0xC0)
    two = b"\xff\xc0\0\x0e\x08\0\x20\0\x20\x02\1\x11\0\2\x11\0"
    with pytest.raises(UnsupportedImageError, match="2 components is not read"):
        EXACT.open(bytes(image[:start]) + two + bytes(image[start + 19 :]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda image, start: image[:start] + image[start : start + 19] * 2 + image[start + 19 :],  # two frames
        lambda image, start: image[: start + 9] + b"\4" + image[start + 10 :],  # 4 components, data of 3
        lambda image, start: image[: start + 11] + b"\0" + image[start + 12 :],  # a sampling factor of 0
        lambda image, start: image[:start] + b"\xff\xf0\0\4ab" + image[start:],  # libjpeg knows no such marker
        lambda image, start: image[:start] + b"\xff\xd8" + image[start:],  # a second start
        lambda image, start: image[:start] + b"\xff\xd9" + image[start:],  # an end before the image
        lambda image, start: image[:start] + b"\xff\xe1\0\1" + image[start:],  # shorter than its length
        lambda image, start: image[: start + 5] + b"\0\0" + image[start + 7 :],  # no rows
        lambda image, start: image[:start],
    ],
)
def test_damaged_headers(damage: Any) -> None:
    image = encoded(random_image(), "JPEG")
    with pytest.raises((DamagedImageError, UnsupportedImageError)):
        EXACT.open(damage(image, marker(image, 0xC0)))


def test_other_data_is_not_a_jpeg() -> None:
    with pytest.raises(NotAnImageError, match="not an image in one of the formats JPEG, PNG"):
        EXACT.open(b"\xff\xd8 and other data")


def test_pixels_equal_those_of_pillows_reader() -> None:
    """Of every mode, and of sizes that blocks do not fit."""
    decoder = Decoder(Preprocessing(16, squash=True), mode="exact")
    for width, height in ((16, 16), (17, 31), (63, 8)):
        for mode in ("L", "RGB", "CMYK"):
            for options in KINDS.values():
                image = encoded(noise(width, height, mode), "JPEG", **options)
                expected = Image.open(io.BytesIO(image)).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
                assert np.array_equal(decoder.decode(image), np.asarray(expected))
