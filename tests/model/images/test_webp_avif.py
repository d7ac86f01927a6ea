"""WebP and AVIF: the first frame, its orientation, and bounds on frames before they are decoded."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from tests.model.images.expected import ALPHA, COLORS, DECODER, decoded, difference, levels, over_white
from tests.support.images import encoded, random_image
from vitserve.model.bundle.images.formats import av1, heif
from vitserve.model.bundle.preprocess import (
    DamagedImageError,
    Decoder,
    Preprocessing,
    TooComplexError,
    TooManyPixelsError,
    UnsupportedImageError,
)

has_avif = pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
TRANSPARENT = Image.fromarray(levels(np.concatenate([COLORS, ALPHA], -1), 8).astype(np.uint8))


@pytest.mark.parametrize("kind", ["WEBP", pytest.param("AVIF", marks=has_avif)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_pixels(mode: str, kind: str) -> None:
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"}
    image = TRANSPARENT.convert(mode) if mode != "RGB" else Image.fromarray(levels(COLORS, 8).astype(np.uint8))
    samples = np.asarray(image if mode == "RGBA" else image.convert("RGB")) / 255
    expected = over_white(samples[..., :3], samples[..., 3:]) if mode == "RGBA" else samples
    assert difference(encoded(image, kind, **options), expected) <= (1 if kind == "WEBP" else 4)


@pytest.mark.parametrize("kind", ["WEBP", pytest.param("AVIF", marks=has_avif)])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_orientation_is_undone(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = random_image(40, 40)
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"}
    turned = image.rotate({1: 0, 3: 180, 6: 90, 8: 270}[orientation])
    expected = decoded(encoded(image))
    got = decoded(encoded(turned, kind, exif=exif, **options))
    assert np.abs(got.astype(int) - expected).max() <= (0 if kind == "WEBP" else 6)


@pytest.mark.parametrize("kind", ["WEBP", pytest.param("AVIF", marks=has_avif)])
def test_the_first_frame_of_an_animation_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "green", "blue")]
    animated = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decoded(animated)[16, 16].astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["VP8 ", "VP8L", "VP8X"])
def test_a_small_webp_of_many_pixels_is_rejected_from_its_header(kind: str) -> None:
    image = Image.new("RGBA" if kind == "VP8X" else "RGB", (1200, 900))
    webp = encoded(image, "WEBP", lossless=kind == "VP8L", method=0)
    assert webp[12:16].decode() == kind
    with pytest.raises(TooManyPixelsError, match="1200 × 900 pixels; the limit is 1,000,000"):
        Decoder(Preprocessing(32), max_pixels=1_000_000).open(webp)
    for end in (15, 20, 24):
        with pytest.raises(DamagedImageError, match="WebP's header"):
            DECODER.open(webp[:end])


# AVIF: a file of a header, metadata, and the data of the image at its end.
def avif(**options: Any) -> bytes:
    return encoded(random_image(64, 48), "AVIF", **options)


def with_data(image: bytes, data: bytes) -> bytes:
    """The AVIF with other data of its image."""
    start = image.index(b"mdat") + 4
    at = image.index(b"iloc") + 4 + 4 + 2 + 2  # version, sizes, count; then the item, its base, and one extent
    position = at + 2 + 2 + 2
    assert struct.unpack_from(">II", image, position) == (start, len(image) - start)
    header = image[: position + 4] + struct.pack(">I", len(data)) + image[position + 8 : start - 8]
    return header + struct.pack(">I", 8 + len(data)) + b"mdat" + data


def units(data: bytes) -> list[bytes]:
    """AV1's units, all of which state their size."""
    starts = [0]
    while starts[-1] < len(data):
        size, behind = av1._leb128(memoryview(data), starts[-1] + 1)
        starts.append(behind + size)
    return [data[start:end] for start, end in pairwise(starts)]


@has_avif
def test_hidden_frames_are_counted_before_decoding() -> None:
    image = avif()
    data = image[image.index(b"mdat") + 4 :]
    assert np.array_equal(decoded(with_data(image, data)), decoded(image))
    *header, frame = units(data)
    assert frame[0] >> 3 & 15 == 6
    with pytest.raises(TooComplexError, match="more than 4 frames in one image"):
        DECODER.open(with_data(image, b"".join(header) + frame * 5))
    with pytest.raises(TooComplexError, match="more than 4,096 units"):
        DECODER.open(with_data(image, data + b"\x12\0" * 5000))


@has_avif
@pytest.mark.parametrize("depth", ["gray", "4:2:0", "4:4:4", "alpha"])
def test_frames_larger_than_the_image_are_rejected(depth: str) -> None:
    """libavif would decode them, and then scale them to the stated size."""
    mode = {"gray": "L", "alpha": "RGBA"}.get(depth, "RGB")
    options = {"subsampling": depth} if depth.startswith("4") else {}
    image = encoded(random_image(600, 500).convert(mode), "AVIF", **options)
    (frame, *_) = av1.frames(heif.av1_data(image)[0])
    assert frame == (600, 500, {"gray": 1.0, "4:4:4": 3.0}.get(depth, 1.5))
    small = image.replace(b"ispe" + struct.pack(">III", 0, 600, 500), b"ispe" + struct.pack(">III", 0, 60, 50))
    with pytest.raises(DamagedImageError, match="frame of 600 × 500 pixels for an image of 60 × 50"):
        DECODER.open(small)


@has_avif
def test_tables_that_libavif_reads_slowly_are_bounded() -> None:
    image = avif()
    for kind in (b"iinf", b"iloc", b"iref", b"ipma"):
        table = struct.pack(">I", 8 + 2**16 + 1) + kind + bytes(2**16 + 1)
        at = image.index(b"hdlr") - 4
        large = image[: at - 12] + struct.pack(">I4sI", 0, b"meta", 0) + table + image[at:]
        with pytest.raises(TooComplexError, match=f"table {kind.decode()} of 65,537 bytes; the limit is 65,536"):
            DECODER.open(large)
    with pytest.raises(TooComplexError, match="more than 4,096 boxes"):
        DECODER.open(image + b"\0\0\0\x08free" * 5000)


@has_avif
def test_the_frames_of_a_sequence_are_bounded() -> None:
    image = encoded(random_image(), "AVIF", save_all=True, append_images=[random_image(seed=1)])
    at = image.index(b"stsc") + 8 + 4  # behind the version and the count: first chunk, samples of a chunk
    many = image[: at + 4] + struct.pack(">I", 10**6) + image[at + 8 :]
    with pytest.raises(TooComplexError, match="1,000,000 frames; the limit is 100,000"):
        DECODER.open(many)


@has_avif
def test_other_files_of_its_container_are_named() -> None:
    image = avif()
    with pytest.raises(UnsupportedImageError, match="no AV1 image; other HEIF files, such as HEIC, are not read"):
        DECODER.open(image.replace(b"av01", b"hvc1").replace(b"ftypavif", b"ftypmif1"))


@has_avif
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.7, 0.95])
def test_truncated_files_are_damaged(share: float) -> None:
    image = avif(quality=90)
    with pytest.raises((DamagedImageError, UnsupportedImageError)):
        decoded(image[: max(16, int(len(image) * share))])
