"""Resizing only the part that the crop keeps: nearly the same pixels as resizing all of the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.images import encoded, random_image
from vitserve.model.bundle.preprocess import Decoder, Interpolation, Preprocessing

LARGEST, SHARE = 8, 0.25  # levels of 255, and share of the values that differ: of noise, the worst case
PHOTO_LARGEST, PHOTO_SHARE = 7, 0.004  # docs/experiments.md
INTERPOLATIONS: tuple[Interpolation, ...] = ("bilinear", "bicubic", "lanczos")


def differences(image: bytes, preprocessing: Preprocessing) -> tuple[int, float]:
    """The largest difference, and the share of the values that differ."""
    exact = Decoder(preprocessing, mode="exact").decode(image).astype(int)
    fast = Decoder(preprocessing, mode="fast", draft_gap=1e9).decode(image)  # at full scale
    distance = np.abs(exact - fast)
    return int(distance.max()), float((distance > 0).mean())


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(20, 300),
    height=st.integers(20, 300),
    crop=st.sampled_from([0.5, 0.875, 0.9, 1.0]),
    interpolation=st.sampled_from(INTERPOLATIONS),
    floor=st.booleans(),
    seed=st.integers(0, 9),
)
def test_values_differ_slightly_and_seldom(
    width: int, height: int, crop: float, interpolation: Interpolation, floor: bool, seed: int
) -> None:
    """Of noise as a PNG, in which neighbors differ as much as they can."""
    image = encoded(random_image(width, height, seed=seed))
    largest, share = differences(image, Preprocessing(48, crop, interpolation, floor_crop=floor))
    assert largest <= LARGEST
    assert share <= SHARE


@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_photos_differ_as_documented(crop: float, photos: list[Path]) -> None:
    found = [differences(photo.read_bytes(), Preprocessing(224, crop)) for photo in photos]
    assert max(largest for largest, _ in found) <= PHOTO_LARGEST
    assert np.mean([share for _, share in found]) <= PHOTO_SHARE


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(48, 0.875, "nearest"),
        Preprocessing(48, squash=True),
        Preprocessing(48, border=True),
        Preprocessing(48, width=64),
    ],
    ids=["nearest", "squash", "border", "not square"],
)
def test_other_ways_to_resize_are_exact_or_close(preprocessing: Preprocessing) -> None:
    largest, _ = differences(encoded(random_image(200, 120)), preprocessing)
    assert largest <= (LARGEST if preprocessing.width else 0)
