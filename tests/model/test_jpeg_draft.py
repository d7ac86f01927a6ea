"""JPEGs that are decoded at a reduced scale: when, and by how much their pixels differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.images import encoded
from vitserve.model.bundle.preprocess import DecodeMode, Decoder, Preprocessing

MODES: tuple[DecodeMode, ...] = ("exact", "fastest")
# Image size → largest mean difference of a photo decoded at a reduced scale, in levels of 255.
DRAFT_MEAN_DIFFERENCE = {32: 3.0, 224: 0.3}


@pytest.mark.parametrize("size", [32, 224])
def test_reduced_decoding_stays_within_its_stated_difference(size: int, photos: list[Path]) -> None:
    exact, draft = (Decoder(Preprocessing(size), mode=mode) for mode in MODES)
    differences = []
    for photo in photos:
        image = photo.read_bytes()
        differences.append(np.abs(exact.decode(image).astype(int) - draft.decode(image)).mean())
    assert max(differences) <= DRAFT_MEAN_DIFFERENCE[size]
    assert max(differences) > 0, "no photo is large enough to be decoded at a reduced scale"


@pytest.mark.parametrize(("side", "reduced"), [(190, False), (192, True)])
def test_a_jpeg_is_reduced_if_three_times_the_size_remains(side: int, reduced: bool) -> None:
    """At half the scale, 192 pixels are three times the image size of 32."""
    exact, draft = (Decoder(Preprocessing(32), mode=mode) for mode in MODES)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    image = encoded(Image.fromarray(noise), "JPEG")
    assert np.array_equal(exact.decode(image), draft.decode(image)) is not reduced


@pytest.mark.parametrize(
    ("preprocessing", "gap"),
    [
        (Preprocessing(32), 6),
        (Preprocessing(127), 6),
        (Preprocessing(128), 3),
        (Preprocessing(384, squash=True), 3),
        (Preprocessing(224, width=96, squash=True), 6),
    ],
    ids=lambda value: str(value.shape) if isinstance(value, Preprocessing) else "",
)
def test_by_default_more_remains_for_outputs_below_128_pixels(preprocessing: Preprocessing, gap: float) -> None:
    """Half of eight times the size is more than three times the size, and less than six times."""
    size = max(preprocessing.shape[:2])
    coarse = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    image = encoded(Image.fromarray(coarse).resize((8 * size, 8 * size)), "JPEG")
    pixels = Decoder(preprocessing).decode(image)
    for possible in (3, 6):
        same = np.array_equal(pixels, Decoder(preprocessing, mode="fastest", draft_gap=possible).decode(image))
        assert same is (possible == gap)
