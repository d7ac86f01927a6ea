"""PNG: every color type and depth has the right pixels, and only chunks of pixels can make an image invalid."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.model.images.expected import (
    ALPHA,
    COLORS,
    DECODER,
    GRAY,
    HEIGHT,
    SIDE,
    WIDTH,
    Floats,
    decoded,
    difference,
    levels,
    over_white,
)
from tests.support.encoders import chunk, png
from tests.support.images import encoded, random_image
from vitserve.model.bundle.images.formats import png as format_
from vitserve.model.bundle.preprocess import DamagedImageError, TooComplexError

GRAYS, COLOR, INDEXED, GRAY_ALPHA, COLOR_ALPHA = 0, 2, 3, 4, 6
RGB = encoded(random_image(64, 48), "PNG")
PIXELS = RGB.index(b"IDAT") - 4  # position of the first chunk of pixels


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("transparent", [False, True], ids=["opaque", "transparent color"])
@pytest.mark.parametrize(
    ("bits", "color"), [*((bits, GRAYS) for bits in (1, 2, 4, 8, 16)), *((bits, COLOR) for bits in (8, 16))]
)
def test_gray_and_color(bits: int, color: int, transparent: bool, interlaced: bool) -> None:
    intensity = GRAY if color == GRAYS else COLORS
    samples = levels(intensity, bits)
    before = b""
    if transparent:
        key = samples[HEIGHT // 2, WIDTH // 2]
        before = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
        intensity = np.where((samples == key).all(-1, keepdims=True), 1.0, intensity)
    image = png(samples, bits, color, before, interlaced=interlaced)
    exact = samples / (2**bits - 1) if bits < 8 else intensity
    expected = np.where(intensity == 1, 1.0, exact)
    assert difference(image, expected) <= (1 if bits == 16 else 0)


def test_only_the_exact_color_of_16_bits_is_transparent() -> None:
    """Colors whose upper bytes are equal to those of the transparent one stay."""
    samples = np.full((HEIGHT, WIDTH, 3), 0x1234)
    samples[: HEIGHT // 2] = 0x1235
    pixels = decoded(png(samples, 16, COLOR, chunk(b"tRNS", struct.pack(">3H", *[0x1234] * 3))))
    assert (pixels[:15] == 0x12).all()
    assert (pixels[25:] == 255).all()


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("color", [GRAY_ALPHA, COLOR_ALPHA])
def test_alpha(color: int, bits: int, interlaced: bool) -> None:
    intensity = GRAY if color == GRAY_ALPHA else COLORS
    samples = levels(np.concatenate([intensity, ALPHA], -1), bits)
    image = png(samples, bits, color, interlaced=interlaced)
    assert difference(image, over_white(intensity, ALPHA)) <= (2 if bits == 16 else 1)


@pytest.mark.parametrize("alphas", ["none", "all", "the first", "one"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes(bits: int, alphas: str) -> None:
    count = 2**bits
    palette = np.random.default_rng(bits).integers(0, 256, (count, 3))
    alpha = {
        "none": np.full(count, 255),
        "all": np.linspace(0, 255, count).astype(int),
        "the first": np.array([0] * (count // 2)),
        "one": np.where(np.arange(count) == 1, 0, 255),
    }[alphas]
    before = chunk(b"PLTE", palette.astype(np.uint8).tobytes())
    before += chunk(b"tRNS", alpha.astype(np.uint8).tobytes()) if alphas != "none" else b""
    indices = levels(GRAY, bits)
    opacity = np.pad(alpha, (0, count - len(alpha)), constant_values=255)[indices] / 255
    expected: Floats = over_white(palette[indices[..., 0]] / 255, opacity)
    assert difference(png(indices, bits, INDEXED, before), expected) <= 1


TEXT = b'{"node": 1, "text": "filler"}, ' * 60_000
ANCILLARY = {
    "text of 2 MB": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(TEXT)),
    "international text of 2 MB": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(TEXT)),
    "text of 2 MB, not compressed": chunk(b"tEXt", b"workflow\0" + TEXT),
    "color profile of 2 MB": chunk(b"iCCP", b"profile\0\0" + zlib.compress(TEXT)),
    "color profile of 200 MB": chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(200_000_000))),
    "broken color profile": chunk(b"iCCP", b"profile\0\0garbage"),
    "wrong checksum of gamma": chunk(b"gAMA", struct.pack(">I", 45455), damaged=True),
    "wrong checksum of text": chunk(b"tEXt", b"Comment\0hello", damaged=True),
    "wrong checksum of transparency": chunk(b"tRNS", b"\0\0\0\0\0\0", damaged=True),
    "wrong checksum of EXIF": chunk(b"eXIf", b"II*\0", damaged=True),
    "truncated gamma": chunk(b"gAMA", b"\0"),
    "truncated transparency": chunk(b"tRNS", b"\0"),
    "unknown chunk": chunk(b"prVt", b"content"),
    "frame of an animation": chunk(b"fcTL", bytes(26)),
}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("name", ANCILLARY)
def test_chunks_that_are_not_pixels_do_not_matter(name: str, where: str) -> None:
    position = PIXELS if where == "before" else RGB.index(b"IEND") - 4
    image = RGB[:position] + ANCILLARY[name] + RGB[position:]
    assert np.array_equal(decoded(image), decoded(RGB))


@pytest.mark.parametrize("missing", [1, 4, 8, 12, 13, 16])
def test_an_end_that_is_missing_does_not_matter(missing: int) -> None:
    """The end chunk has 12 bytes. Four bytes before it are the checksum of the pixels."""
    assert np.array_equal(decoded(RGB[:-missing]), decoded(RGB))


@pytest.mark.parametrize("color", [GRAYS, COLOR, COLOR_ALPHA])
@pytest.mark.parametrize("missing", [40, 400, 2000])
def test_missing_pixels_are_an_error(missing: int, color: int) -> None:
    generator = np.random.default_rng(0)
    image = png(generator.integers(0, 256, (48, 64, {GRAYS: 1, COLOR: 3, COLOR_ALPHA: 4}[color])), 8, color)
    with pytest.raises(DamagedImageError):
        decoded(image[:-missing])
    end = image.index(b"IEND") - 4
    with pytest.raises(DamagedImageError):
        decoded(image[: end - missing] + image[end:])


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("shade", [0, 1, 255])
@pytest.mark.parametrize(("color", "bits"), format_._MODES)
def test_compressed_data_that_ends_early_is_an_error(color: int, bits: int, shade: int, interlaced: bool) -> None:
    """Also if the rows that are there have the color that memory begins with."""
    count = {GRAYS: 1, COLOR: 3, INDEXED: 1, GRAY_ALPHA: 2, COLOR_ALPHA: 4}[color]
    samples = np.full((HEIGHT, WIDTH, count), min(shade, 2**bits - 1))
    whole = png(samples, bits, color, chunk(b"PLTE", bytes(768)), interlaced=interlaced)
    decoded(whole)
    start = whole.index(b"IDAT") + 4
    rows = zlib.decompress(whole[start:-16])
    short = chunk(b"IDAT", zlib.compress(rows[: -len(rows) // 8]))
    with pytest.raises(DamagedImageError):
        decoded(whole[: start - 8] + short + whole[-12:])


@pytest.mark.parametrize(
    "image",
    [
        RGB[:16] + b"\xff" + RGB[17:],
        RGB[:29] + b"\0\0\0\0" + RGB[33:],
        RGB[:PIXELS],
        RGB[:PIXELS] + RGB[-12:],
        png(levels(GRAY, 8), 8, INDEXED),
        png(levels(GRAY, 8), 8, INDEXED, chunk(b"PLTE", bytes(768), damaged=True)),
        png(levels(COLORS, 8), 8, 5),
    ],
    ids=["size", "checksum", "no pixels", "no pixels, but an end", "no palette", "palette", "color type"],
)
def test_damaged_headers(image: bytes) -> None:
    with pytest.raises(DamagedImageError):
        DECODER.open(image)


@pytest.mark.parametrize("kind", [b"teXt", b"IDAT"])
def test_chunks_are_counted_before_decoding(kind: bytes) -> None:
    few, many = (
        RGB[:PIXELS] + chunk(kind) * count + RGB[PIXELS:] for count in (format_.MAX_CHUNKS // 2, format_.MAX_CHUNKS)
    )
    assert np.array_equal(decoded(few), decoded(RGB))
    with pytest.raises(TooComplexError, match="more than 10,000 chunks"):
        DECODER.open(many)


def test_the_orientation_may_follow_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    metadata = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    image = random_image(SIDE, SIDE)
    upright, turned = encoded(image), encoded(image.rotate(180))
    for at in (turned.index(b"IDAT") - 4, len(turned) - 12):
        assert np.array_equal(decoded(turned[:at] + metadata + turned[at:]), decoded(upright))
