"""The normalization of pixels as one multiplication and one addition. Needs no torch."""

from __future__ import annotations

import numpy as np

from vitserve.model.arrays import Floats
from vitserve.model.bundle.preprocess import Preprocessing


def scale_and_shift(preprocessing: Preprocessing) -> tuple[Floats, Floats]:
    """(pixels / 255 - mean) / std as pixels * scale + shift, one value for each channel."""
    mean, std = (np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
