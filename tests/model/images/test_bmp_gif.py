"""BMP and GIF: transparency that is meant, and bounds from the header."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.model.images.expected import ALPHA, COLORS, DECODER, GRAY, Floats, decoded, difference, levels, over_white
from tests.support.encoders import bmp
from tests.support.images import encoded, random_image
from vitserve.model.bundle.images.formats import gif
from vitserve.model.bundle.preprocess import (
    DamagedImageError,
    NotAnImageError,
    TooComplexError,
    TooManyPixelsError,
    UnsupportedImageError,
)

MASKS = {
    "BGRA": (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
    "RGBA": (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
    "ABGR": (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
}
SHORT_MASKS = (0x7C00, 0x3E0, 0x1F, 0x8000)


def long_pixels(masks: tuple[int, ...], alpha: Floats) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    samples = levels(np.concatenate([COLORS, alpha], -1), 8)
    shifts = [(mask & -mask).bit_length() - 1 for mask in masks]
    return sum(samples[..., channel] << shift for channel, shift in enumerate(shifts))  # type: ignore[return-value]


@pytest.mark.parametrize("top_down", [False, True])
@pytest.mark.parametrize("header", [56, 108, 124])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_alpha_of_32_bits(masks: tuple[int, ...], header: int, top_down: bool) -> None:
    """Zero everywhere means that the program that wrote the file does not know of alpha."""
    for alpha, expected in (
        (ALPHA, over_white(COLORS, ALPHA)),
        (np.ones_like(ALPHA), COLORS),
        (np.zeros_like(ALPHA), COLORS),
    ):
        image = bmp(long_pixels(masks, alpha), 32, masks, header, top_down)
        assert difference(image, expected) <= 1


@pytest.mark.parametrize("top_down", [False, True])
def test_alpha_of_16_bits(top_down: bool) -> None:
    colors = levels(COLORS, 5)
    pixels = colors[..., 0] << 10 | colors[..., 1] << 5 | colors[..., 2]
    shown = colors / 31
    half = (np.arange(pixels.shape[1]) < 24)[None, :]
    for alpha, expected in (
        (np.zeros_like(pixels), shown),
        (np.ones_like(pixels), shown),
        (np.where(half, 1, 0) + 0 * pixels, np.where(half[..., None], shown, 1.0)),
    ):
        image = bmp(pixels | alpha << 15, 16, SHORT_MASKS, top_down=top_down)
        assert difference(image, expected) <= 4  # Pillow scales 5 bits by shifting


def test_the_fourth_byte_without_a_mask_is_not_alpha() -> None:
    pixels = long_pixels(MASKS["BGRA"], ALPHA)
    assert difference(bmp(pixels, 32, header=40, compression=0), COLORS) == 0


def test_an_image_that_is_all_transparent_is_white_in_other_formats() -> None:
    """Alpha is always meant there."""
    image = Image.fromarray(levels(np.concatenate([COLORS, np.zeros_like(GRAY)], -1), 8).astype(np.uint8))
    for kind in ("PNG", "WEBP", "TIFF"):
        assert (decoded(encoded(image, kind, **({"exact": True} if kind == "WEBP" else {}))) == 255).all(), kind


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_pillows_own_bitmaps_are_read(mode: str) -> None:
    image = random_image(48, 40).convert(mode)
    assert difference(encoded(image, "BMP"), np.asarray(image.convert("RGB")) / 255) == 0


def test_other_bitmaps_are_named() -> None:
    with pytest.raises(UnsupportedImageError, match=r"16 bits a pixel and compression 3 is not read: .*layout"):
        decoded(bmp(np.zeros((4, 4), int), 16, (0xF00, 0xF0, 0xF, 0xF000)))
    with pytest.raises(NotAnImageError, match="compression 4"):
        decoded(bmp(np.zeros((4, 4), int), 32, compression=4))


def run_lengths(width: int, height: int, runs: bytes) -> bytes:
    """An image of 8 bits a pixel, compressed."""
    image = bytearray(bmp(np.zeros((1, 4), int), 8, compression=1))
    image[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    image[46:50] = (1).to_bytes(4, "little")
    return bytes(image[:138]) + bytes(4) + runs


def test_run_lengths_are_bounded_because_pillow_decodes_them_slowly() -> None:
    assert decoded(run_lengths(40, 40, b"\x28\0\0\0" * 40 + b"\0\1")).shape == (40, 40, 3)
    with pytest.raises(TooManyPixelsError, match="the limits for a BMP of run lengths are 4,000,000 pixels"):
        DECODER.open(run_lengths(2001, 2000, b""))
    with pytest.raises(TooManyPixelsError, match="1,048,576 bytes"):
        DECODER.open(run_lengths(40, 40, bytes(2**20)))


FRAME = encoded(random_image(40, 40).quantize(16), "GIF")
FIRST_BLOCK = 13 + 3 * 2 ** ((FRAME[10] & 7) + 1)  # behind the palette


def test_blocks_before_the_first_frame_are_counted() -> None:
    for block in (b"!\xfe\1a\0", b"!\xfe\0", b"!\xf9\4\0\0\0\0\0"):
        few, many = (FRAME[:FIRST_BLOCK] + block * count + FRAME[FIRST_BLOCK:] for count in (1000, gif.MAX_BLOCKS + 1))
        assert np.array_equal(decoded(few), decoded(FRAME))
        with pytest.raises(TooComplexError, match="more than 65,536 blocks before its first frame"):
            DECODER.open(many)


def test_frames_after_the_first_are_not_read() -> None:
    frame = FRAME[FIRST_BLOCK:-1]
    assert np.array_equal(decoded(FRAME[:-1] + frame * 100 + b";"), decoded(FRAME))
    assert np.array_equal(decoded(FRAME[:-1] + b"garbage"), decoded(FRAME))
    assert np.array_equal(decoded(FRAME[:-1]), decoded(FRAME))


@pytest.mark.parametrize("transparent", [None, 0, 3, 200])
def test_transparent_gifs_are_shown_on_white(transparent: int | None) -> None:
    image = random_image(48, 40).quantize(16)
    options = {} if transparent is None else {"transparency": transparent}
    indices = np.asarray(image)
    expected = np.asarray(image.convert("RGB")) / 255
    if transparent is not None:
        expected = np.where((indices == transparent)[..., None], 1.0, expected)
    assert difference(encoded(image, "GIF", optimize=False, **options), expected) == 0


def test_a_frame_may_cover_a_part_of_the_screen() -> None:
    data = bytearray(FRAME)
    data[6:10] = (60).to_bytes(2, "little") * 2
    pixels = decoded(bytes(data))
    image = Image.new("P", (60, 60))
    image.putpalette(random_image(40, 40).quantize(16).getpalette() or [])
    image.paste(random_image(40, 40).quantize(16), (0, 0))
    assert np.array_equal(pixels, decoded(encoded(image.convert("RGB"))))


@pytest.mark.parametrize("length", [6, 10, 13, FIRST_BLOCK, FIRST_BLOCK + 5, FIRST_BLOCK + 12, len(FRAME) * 2 // 3])
def test_gifs_that_end_early_are_damaged(length: int) -> None:
    with pytest.raises(DamagedImageError):
        decoded(FRAME[:length])
