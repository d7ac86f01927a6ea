"""TIFF: each layout of samples has the right pixels, or is rejected by name. No broken file writes to stderr."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.model.images.expected import (
    ALPHA,
    COLORS,
    DECODER,
    GRAY,
    HEIGHT,
    WIDTH,
    Floats,
    decoded,
    difference,
    levels,
    over_white,
)
from tests.support.encoders import tiff
from tests.support.images import encoded, random_image
from tests.support.paths import ROOT
from vitserve.model.bundle.images.directory import MAX_TAGS
from vitserve.model.bundle.images.formats.tiff_layout import MAX_BLOCKS
from vitserve.model.bundle.preprocess import (
    DamagedImageError,
    NotAnImageError,
    TooComplexError,
    UnsupportedImageError,
)

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK = 0, 1, 2, 3, 5
UNSPECIFIED, PREMULTIPLIED, STRAIGHT = 0, 1, 2
EXTRA_SAMPLES, SAMPLE_FORMAT, COLOR_MAP = 338, 339, 320

BLOCKS: dict[str, dict[str, Any]] = {"one strip": {}, "strips": {"rows": 7}, "tiles": {"tile": 16}}
CODINGS: dict[str, dict[str, Any]] = {
    "raw": {},
    "deflate": {"compression": 8},
    "PackBits": {"compression": 32773},
    "differences": {"compression": 8, "differences": True},
}
STORAGE = [
    pytest.param(
        {"order": order, "big": big} | BLOCKS[blocks] | CODINGS[coding], id=f"{order}{big:d}-{blocks}-{coding}"
    )
    for order, big, blocks, coding in itertools.product("<>", (False, True), BLOCKS, CODINGS)
    if not big or blocks == "strips"
]
storage = pytest.mark.parametrize("storage", STORAGE)


def is_possible(bits: int, storage: dict[str, Any]) -> bool:
    """Differences are defined for whole bytes."""
    return bits in (8, 16) or not storage.get("differences")


def inverted(samples: Any, bits: int, photometric: int) -> Any:
    return 2**bits - 1 - samples if photometric == WHITE_IS_ZERO else samples


@storage
def test_gray(storage: dict[str, Any]) -> None:
    for bits, photometric in itertools.product((1, 2, 4, 8, 12, 16), (WHITE_IS_ZERO, BLACK_IS_ZERO)):
        if is_possible(bits, storage):
            samples = levels(GRAY, bits)
            image = tiff(inverted(samples, bits, photometric), bits, photometric, **storage)
            assert difference(image, samples / (2**bits - 1)) <= 1, (bits, photometric)


@storage
def test_gray_with_alpha(storage: dict[str, Any]) -> None:
    """Premultiplied samples that are inverted, and 16 bits side by side, are rejected."""
    for bits, photometric, extra, planes in itertools.product(
        (8, 16), (WHITE_IS_ZERO, BLACK_IS_ZERO), (UNSPECIFIED, PREMULTIPLIED, STRAIGHT), (False, True)
    ):
        gray = GRAY * ALPHA if extra == PREMULTIPLIED else GRAY
        samples = np.concatenate([inverted(levels(gray, bits), bits, photometric), levels(ALPHA, bits)], -1)
        image = tiff(samples, bits, photometric, in_planes=planes, tags={EXTRA_SAMPLES: [extra]}, **storage)
        if (bits == 16 and not planes) or (photometric == WHITE_IS_ZERO and extra == PREMULTIPLIED):
            with pytest.raises(UnsupportedImageError, match="IS_ZERO with 2 samples"):
                decoded(image)
        else:
            expected = GRAY if extra == UNSPECIFIED else over_white(GRAY, ALPHA)
            assert difference(image, expected) <= 3, (bits, photometric, extra, planes)


@storage
def test_color(storage: dict[str, Any]) -> None:
    for bits, planes in itertools.product((8, 16), (False, True)):
        assert difference(tiff(levels(COLORS, bits), bits, RGB, in_planes=planes, **storage), COLORS) <= 1
        cmyk = levels(np.concatenate([1 - COLORS, np.zeros_like(GRAY)], -1), bits)
        assert difference(tiff(cmyk, bits, CMYK, in_planes=planes, **storage), COLORS) <= 2


@storage
def test_color_with_alpha(storage: dict[str, Any]) -> None:
    for bits, extra, planes in itertools.product((8, 16), (None, UNSPECIFIED, PREMULTIPLIED, STRAIGHT), (False, True)):
        colors = COLORS * ALPHA if extra == PREMULTIPLIED else COLORS
        samples = np.concatenate([levels(colors, bits), levels(ALPHA, bits)], -1)
        tags = {} if extra is None else {EXTRA_SAMPLES: [extra]}
        image = tiff(samples, bits, RGB, in_planes=planes, tags=tags, **storage)
        expected = COLORS if extra == UNSPECIFIED else over_white(COLORS, ALPHA)
        assert difference(image, expected) <= 3, (bits, extra, planes)


@storage
def test_palettes(storage: dict[str, Any]) -> None:
    """The colors have 16 bits. Some programs write 8."""
    for bits, bits_of_colors in itertools.product((1, 2, 4, 8), (16, 8)):
        if is_possible(bits, storage):
            ramp = np.linspace(0, 1, 2**bits)
            colors = np.stack([ramp, 1 - ramp, np.full_like(ramp, 0.5)])
            indices = levels(GRAY, bits)
            entries = levels(colors, bits_of_colors).ravel().tolist()
            image = tiff(indices, bits, PALETTE, tags={COLOR_MAP: entries}, **storage)
            expected: Floats = np.moveaxis(colors, 0, -1)[indices[..., 0]]
            assert difference(image, expected) <= 1, (bits, bits_of_colors)


@storage
@pytest.mark.parametrize(
    ("kind", "name"), [(2, "signed integers"), (3, "floating-point numbers"), (4, "undefined type"), (6, "complex")]
)
def test_samples_of_unknown_range_are_rejected(kind: int, name: str, storage: dict[str, Any]) -> None:
    for bits, photometric, count in itertools.product((8, 16, 32), (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB), (1, 3)):
        if (photometric == RGB) == (count == 3) and is_possible(bits, storage):
            samples = levels(COLORS[..., :count], 8)
            image = tiff(samples, bits, photometric, tags={SAMPLE_FORMAT: [kind] * count}, **storage)
            with pytest.raises(UnsupportedImageError, match=f"samples are {name}.* of {bits} bits .*; store unsigned"):
                DECODER.open(image)


@pytest.mark.parametrize(
    ("bits", "count", "photometric"), [(32, 1, BLACK_IS_ZERO), (32, 3, RGB), (4, 3, RGB), (16, 3, 8), (8, 1, 4)]
)
def test_other_kinds_are_rejected(bits: int, count: int, photometric: int) -> None:
    with pytest.raises(UnsupportedImageError, match="is not read; store gray"):
        DECODER.open(tiff(levels(COLORS[..., :count], 4), bits, photometric))
    with pytest.raises(NotAnImageError, match="compression 99 is not read"):
        DECODER.open(tiff(levels(GRAY, 8), 8, BLACK_IS_ZERO, compression=99))


def test_subsampled_chroma_that_pillow_would_read_wrongly_is_rejected() -> None:
    with pytest.raises(UnsupportedImageError, match="YCBCR"):
        DECODER.open(tiff(levels(COLORS, 8), 8, 6))


@pytest.mark.parametrize("kind", ["tiff_lzw", "jpeg", "group4", "zstd", "tiff_adobe_deflate", "packbits"])
def test_pillows_own_files_are_read(kind: str) -> None:
    image = random_image(WIDTH, HEIGHT).convert("1" if kind == "group4" else "RGB")
    options = {"quality": 95} if kind == "jpeg" else {}
    expected = np.asarray(image.convert("RGB")) / 255
    assert difference(encoded(image, "TIFF", compression=kind, **options), expected) <= (16 if kind == "jpeg" else 0)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_undone(orientation: int, order: str) -> None:
    turns = [None, None, 0, 3, 1, 5, 2, 6, 4]  # Pillow's transpositions that give the stored image
    square = random_image(40, 40)
    turn = turns[orientation]
    stored = square if turn is None else square.transpose(Image.Transpose(turn))
    image = tiff(np.asarray(stored), 8, RGB, order=order, tags={274: [orientation]})
    assert np.array_equal(decoded(image), decoded(encoded(square)))


def test_tags_that_do_not_describe_pixels_do_not_matter() -> None:
    samples = levels(COLORS, 8)
    others = {40_000 + number: [1, 2, 3] for number in range(400)}
    assert np.array_equal(decoded(tiff(samples, 8, RGB, tags=others)), decoded(tiff(samples, 8, RGB)))
    with pytest.raises(TooComplexError, match=f"[0-9]+ tags; the limit is {MAX_TAGS}"):
        DECODER.open(tiff(samples, 8, RGB, tags={40_000 + number: [1] for number in range(MAX_TAGS)}))


def test_strips_are_counted_before_decoding() -> None:
    samples = levels(GRAY, 8)
    with pytest.raises(TooComplexError, match="strips or tiles; the limit is 32,768"):
        DECODER.open(tiff(samples, 8, BLACK_IS_ZERO, tags={273: [8] * (MAX_BLOCKS + 1)}))
    with pytest.raises(DamagedImageError, match="has 1 blocks and needs 40"):
        DECODER.open(tiff(samples, 8, BLACK_IS_ZERO, tags={278: [1]}))


@pytest.mark.parametrize("side", [0, 16_384, 1_000_000])
def test_tiles_have_to_fit_the_image(side: int) -> None:
    image = tiff(levels(GRAY, 8), 8, BLACK_IS_ZERO, tile=16, tags={322: [side], 323: [side]})
    with pytest.raises(DamagedImageError, match=f"{side} × {side} pixels"):
        DECODER.open(image)


@pytest.mark.parametrize("start", [0, 5, 60_000, 2**32 - 1])
def test_directories_outside_of_the_file_are_damaged(start: int) -> None:
    image = bytearray(tiff(levels(GRAY, 8), 8, BLACK_IS_ZERO))
    image[4:8] = start.to_bytes(4, "little")
    with pytest.raises((DamagedImageError, TooComplexError)):
        DECODER.open(bytes(image))


def test_broken_images_write_nothing_to_stderr() -> None:
    """libtiff would write a line for each row of a fax image, and for each broken strip."""
    code = """
import numpy as np
from tests.support.encoders import tiff
from vitserve.model.bundle.preprocess import Decoder, ImageError, Preprocessing, prepare_pillow

prepare_pillow()
decoder = Decoder(Preprocessing(32))
noise = np.random.default_rng(0).integers(0, 256, (64, 64, 1))
for compression in (2, 3, 4, 5, 6, 7, 34925, 50000):
    for bits in (1, 8):
        for tags in ({}, {259: [compression], 347: [1, 2, 3]}):
            try:
                decoder.decode(tiff(noise, bits, 0, tags={259: [compression]} | tags))
            except ImageError:
                pass
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stderr == ""
