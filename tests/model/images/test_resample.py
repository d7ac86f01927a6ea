"""Images are converted in strips. The result is that of the whole image, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.support.images import random_image
from vitserve.model.bundle.images import resample
from vitserve.model.bundle.images.decoded import Conversion, Decoded, as_stored, fourth_over_white, opaque, over_white
from vitserve.model.bundle.preprocess import Interpolation, Preprocessing

TRANSPARENT = Image.merge("RGBA", (*random_image(37, 53).split(), random_image(37, 53, seed=1).convert("L")))
IMAGES: dict[str, tuple[Image.Image, Conversion]] = {
    "L": (random_image(37, 53).convert("L"), as_stored),
    "RGB": (random_image(37, 53), as_stored),
    "P": (random_image(37, 53).quantize(32), opaque),
    "CMYK": (random_image(37, 53).convert("CMYK"), opaque),
    "RGBA": (TRANSPARENT, over_white),
    "LA": (TRANSPARENT.convert("LA"), over_white),
    "RGBX": (Image.frombytes("RGBX", TRANSPARENT.size, TRANSPARENT.tobytes()), fourth_over_white),
}
EXIF = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def target(size: tuple[int, int], interpolation: Interpolation, squash: bool) -> resample.Target:
    preprocessing = Preprocessing(24, 0.9, squash=squash)
    wanted = preprocessing.resized(*size)
    return resample.Target(wanted, *preprocessing.cropped(*wanted), 3, Image.Resampling[interpolation.upper()])


@pytest.mark.parametrize("strip_pixels", [1, 37, 100, 400, 10**6])
@pytest.mark.parametrize("orientation", EXIF)
@pytest.mark.parametrize("mode", IMAGES)
def test_strips_equal_the_whole_image(
    mode: str, orientation: int, strip_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resample, "STRIP_PIXELS", strip_pixels)
    stored, convert = IMAGES[mode]
    turn = EXIF[orientation]
    upright = stored if turn is None else stored.transpose(turn)
    expected_from = convert(upright).convert("RGB")
    for interpolation, squash in (("bicubic", False), ("bilinear", True), ("lanczos", True), ("nearest", False)):
        wanted = target(upright.size, interpolation, squash)  # type: ignore[arg-type]
        whole = expected_from.resize(wanted.size, wanted.resampling)
        box = (wanted.left, wanted.top, wanted.left + wanted.width, wanted.top + wanted.height)
        got = resample.resized(Decoded((stored.copy(),), convert, orientation), wanted)
        assert np.array_equal(np.asarray(got), np.asarray(whole.crop(box))), (interpolation, squash)


def test_planes_are_converted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample, "STRIP_PIXELS", 100)
    image = random_image(37, 53)
    wanted = target(image.size, "bicubic", False)
    planes = Decoded(image.split(), lambda *bands: Image.merge("RGB", bands), 6)
    whole = Decoded((image,), as_stored, 6)
    assert np.array_equal(np.asarray(resample.resized(planes, wanted)), np.asarray(resample.resized(whole, wanted)))
