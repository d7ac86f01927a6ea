"""The decoder that the settings choose."""

from __future__ import annotations

import pytest

from vitserve.model.bundle.preprocess import Decoder, Preprocessing
from vitserve.service.http_worker.dispatch.decoding import decoder_for
from vitserve.service.settings import Settings


@pytest.mark.parametrize(
    ("setting", "image_size", "reduces"),
    [("auto", 32, False), ("auto", 224, True), ("on", 32, True), ("off", 224, False)],
)
def test_jpegs_are_reduced_as_the_setting_says(setting: str, image_size: int, reduces: bool) -> None:
    decoder = decoder_for(Preprocessing(image_size), Settings(jpeg_draft=setting))
    assert isinstance(decoder, Decoder)
    assert decoder.reduces_jpegs is reduces
