"""The decoder that the settings choose."""

from __future__ import annotations

import pytest

from vitserve.model.bundle.preprocess import Decoder, Preprocessing
from vitserve.service.http_worker.dispatch.decoding import decoder_for
from vitserve.service.settings import Settings


@pytest.mark.parametrize(
    ("mode", "image_size", "gap"), [("fast", 32, 6), ("fast", 224, 3), ("fastest", 32, 3), ("exact", 224, 3)]
)
def test_jpegs_are_reduced_as_the_setting_says(mode: str, image_size: int, gap: float) -> None:
    decoder = decoder_for(Preprocessing(image_size), Settings(decode_mode=mode))
    assert isinstance(decoder, Decoder)
    assert (decoder.mode, decoder.least_gap) == (mode, gap)
