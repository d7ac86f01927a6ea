"""The decoder that the settings choose."""

from __future__ import annotations

import pytest

from vitserve.model.bundle.preprocess import Decoder, Preprocessing
from vitserve.service.http_worker.dispatch.decoding import decoder_for
from vitserve.service.settings import Settings


@pytest.mark.parametrize(
    ("setting", "image_size", "allowed", "gap"),
    [("auto", 32, None, 6), ("auto", 224, None, 3), ("on", 32, True, 3), ("off", 224, False, 3)],
)
def test_jpegs_are_reduced_as_the_setting_says(setting: str, image_size: int, allowed: bool | None, gap: float) -> None:
    decoder = decoder_for(Preprocessing(image_size), Settings(jpeg_draft=setting))
    assert isinstance(decoder, Decoder)
    assert (decoder.jpeg_draft, decoder.least_gap) == (allowed, gap)
