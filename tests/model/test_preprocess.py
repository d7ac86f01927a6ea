"""Image bytes → pixels: identical to the source libraries' transforms; invalid images are rejected early."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.images import encoded, png_header, random_image
from vitserve.export.checkpoint.configuration import Configuration
from vitserve.export.checkpoint.formats import image_processor
from vitserve.model.arrays import Pixels
from vitserve.model.bundle.preprocess import (
    DamagedImageError,
    Decoder,
    Interpolation,
    NotAnImageError,
    Preprocessing,
    TooManyPixelsError,
)

EXACT = Decoder(Preprocessing(32), mode="exact")


@pytest.mark.parametrize("size", [32, 224, 384])
@pytest.mark.parametrize("crop", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_identical_to_timms_transform(
    size: int, crop: float, interpolation: Interpolation, timm: ModuleType
) -> None:
    decoder = Decoder(Preprocessing(size, crop, interpolation), mode="exact")
    transform = timm.data.create_transform(
        (3, size, size), crop_pct=crop, interpolation=interpolation, mean=(0, 0, 0), std=(1, 1, 1)
    )
    for seed, shape in enumerate([(500, 333), (333, 500), (224, 224), (225, 448), (640, 427), (31, 77)]):
        image = encoded(random_image(*shape, seed=seed), "JPEG")
        assert np.array_equal(decoder.decode(image), timm_pixels(transform, image))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 48), (64, 64), (96, 40)])
def test_every_crop_mode_is_identical_to_timms(mode: str, size: tuple[int, int], timm: ModuleType) -> None:
    height, width = size
    preprocessing = Preprocessing(
        height,
        0.9,
        "bicubic",
        (0.4, 0.5, 0.6),
        (1, 1, 1),
        squash=mode == "squash",
        width=width,
        border=mode == "border",
    )
    transform = timm.data.create_transform(
        (3, *size), crop_pct=0.9, crop_mode=mode, interpolation="bicubic", mean=preprocessing.mean, std=(1, 1, 1)
    )
    for seed, shape in enumerate([(500, 333), (333, 500), (64, 64), (31, 77), (80, 25)]):
        image = encoded(random_image(*shape, seed=seed), "JPEG")
        pixels = Decoder(preprocessing, mode="exact").decode(image)
        normalized = timm_pixels(transform, image, preprocessing.mean)
        assert np.array_equal(pixels, normalized), shape


# Two of the combinations run by default; all of them take a minute.
COMBINATIONS = [
    (size, crop, interpolation)
    for size in (224, 384)
    for crop in (0.875, 0.9, 0.95, 1.0)
    for interpolation in ("bicubic", "bilinear")
]
FAST_COMBINATIONS = ((224, 0.9, "bicubic"), (384, 1.0, "bilinear"))
MARKED_COMBINATIONS = [
    pytest.param(*combination, marks=() if combination in FAST_COMBINATIONS else pytest.mark.slow)
    for combination in COMBINATIONS
]


@pytest.mark.parametrize(("size", "crop", "interpolation"), MARKED_COMBINATIONS)
def test_photos_are_identical_to_timms_transform(
    size: int, crop: float, interpolation: Interpolation, photos: list[Path], timm: ModuleType
) -> None:
    decoder = Decoder(Preprocessing(size, crop, interpolation), mode="exact")
    transform = timm.data.create_transform(
        (3, size, size), crop_pct=crop, interpolation=interpolation, mean=(0, 0, 0), std=(1, 1, 1)
    )
    for photo in photos:
        image = photo.read_bytes()
        assert np.array_equal(decoder.decode(image), timm_pixels(transform, image)), photo.name


PROCESSORS = {
    "ViT": ("ViTImageProcessorPil", {"size": {"height": 224, "width": 224}, "resample": 2}),
    "ViT, bicubic, 384": ("ViTImageProcessorPil", {"size": {"height": 384, "width": 384}, "resample": 3}),
    "DeiT": (
        "DeiTImageProcessorPil",
        {
            "size": {"height": 256, "width": 256},
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "resample": 3,
        },
    ),
    "DINOv2": (
        "BitImageProcessorPil",
        {
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "resample": 3,
        },
    ),
    "odd": (
        "BitImageProcessorPil",
        {
            "size": {"shortest_edge": 403},
            "crop_size": {"height": 384, "width": 384},
            "do_center_crop": True,
            "resample": 2,
        },
    ),
}


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(("processor", "settings"), PROCESSORS.values(), ids=PROCESSORS.keys())
def test_photos_are_identical_to_transformers_processors(
    processor: str, settings: dict[str, Any], photos: list[Path], transformers: ModuleType
) -> None:
    """The processors that use Pillow; those that use torch round differently."""
    theirs = getattr(transformers, processor)(do_rescale=False, do_normalize=False, **settings)
    full = settings | {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    preprocessing, _ = image_processor.preprocessing(Configuration("the test's", full))
    decoder = Decoder(preprocessing, mode="exact")
    for photo in photos:
        expected = theirs(Image.open(photo).convert("RGB"), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert np.array_equal(decoder.decode(photo.read_bytes()), expected), photo.name


def timm_pixels(
    transform: Callable[[Image.Image], torch.Tensor], image: bytes, mean: tuple[float, ...] = (0, 0, 0)
) -> Pixels:
    """``mean`` is what the transform subtracts."""
    tensor = transform(Image.open(io.BytesIO(image)).convert("RGB"))
    pixels: Pixels = ((tensor.numpy().transpose(1, 2, 0) + np.array(mean, np.float32)) * 255).round().astype(np.uint8)
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(32),
        Preprocessing(24, width=40),
        Preprocessing(24, width=40, squash=True),
        Preprocessing(24, width=40, border=True),
    ],
    ids=["square", "not square", "squash", "border"],
)
def test_exif_orientation_is_undone(preprocessing: Preprocessing, orientation: int) -> None:
    decoder = Decoder(preprocessing, mode="exact")
    upright = random_image(48, 32, seed=3)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.rotate(180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        decoded = decoder.decode(encoded(stored, kind, exif=exif, **options))
        assert np.array_equal(decoded, decoder.decode(encoded(upright))), kind


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_ignored() -> None:
    assert EXACT.decode(encoded(random_image(), "JPEG", exif=b"Exif\0\0II*\0garbage")).shape == (32, 32, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "I;16"])
def test_every_opaque_mode_is_converted_to_rgb(mode: str) -> None:
    gray = random_image(64, 64, seed=1).convert("L")
    stored = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257) if mode == "I;16" else gray.convert(mode)
    expected = EXACT.decode(encoded(stored.convert("L") if mode == "1" else gray))
    decoded = EXACT.decode(encoded(stored, "TIFF"))
    assert np.abs(decoded.astype(int) - expected).max() <= 2, mode  # YCbCr and CMYK are rounded twice


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "L with a transparent gray"])
def test_transparency_is_composed_over_white(kind: str) -> None:
    image = Image.new("RGBA", (40, 40), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 40))
    options = {}
    if kind in ("RGBA", "LA"):
        image = image.convert(kind)
    elif kind == "P":
        image = image.quantize(4)
    else:
        image, options = Image.new("L", (40, 40), 7), {"transparency": 7}
    pixels = EXACT.decode(encoded(image, "PNG", **options))
    assert pixels[16, 4].tolist() == [255, 255, 255]
    if kind in ("RGBA", "P"):
        assert pixels[16, 28].tolist() == [200, 0, 0]


def test_the_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        animated = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(EXACT.decode(animated)[16, 16].astype(int) - [255, 0, 0]).max() <= 3, kind


def test_an_image_of_one_pixel_is_decoded() -> None:
    assert np.array_equal(EXACT.decode(encoded(Image.new("RGB", (1, 1), (9, 8, 7)))), np.full((32, 32, 3), (9, 8, 7)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"GIF89a",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)
def test_bytes_that_are_no_image_are_rejected(data: bytes) -> None:
    with pytest.raises((NotAnImageError, DamagedImageError)):
        EXACT.decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_image_is_rejected(kind: str) -> None:
    whole = encoded(random_image(200, 150), kind)
    with pytest.raises((DamagedImageError, NotAnImageError)):
        EXACT.decode(whole[: len(whole) * 2 // 3])


def test_too_many_pixels_are_rejected_from_the_header() -> None:
    with pytest.raises(
        TooManyPixelsError,
        match=r"400000000 pixels.*limit is 50,000,000|20000 × 20000 pixels; the limit is 50,000,000",
    ):
        EXACT.decode(png_header(20000, 20000))
    with pytest.raises(TooManyPixelsError, match="8000 × 8000 pixels; the limit is 50,000,000"):
        EXACT.decode(png_header(8000, 8000))


def test_a_resize_to_too_many_pixels_is_rejected() -> None:
    with pytest.raises(TooManyPixelsError, match="1 × 2000000 pixels and 32 × 64000000 when resized"):
        EXACT.decode(png_header(1, 2_000_000))


def test_invalid_preprocessing_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"crop is 1\.5"):
        Preprocessing(32, crop=1.5)
    with pytest.raises(ValueError, match="unknown interpolation 'box'"):
        Preprocessing(32, interpolation="box")  # type: ignore[arg-type]
