"""How close outputs must be to the source network's, and softmax."""

from __future__ import annotations

import numpy as np

from vitserve.model.arrays import Outputs, softmax
from vitserve.model.bundle.parity import Parity, compare


def test_softmax_neither_overflows_nor_loses_small_values() -> None:
    probabilities = softmax(np.array([[1000, 0, -1000], [-60, 40, 40]], np.float32))
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(probabilities[1], [0, 0.5, 0.5], atol=1e-6)


def test_nan_fails_parity() -> None:
    parity = Parity(logits=float("nan"), embedding=0.0, probability=0.0, top1_agreement=1.0, typical=0.0)
    assert parity.failure("bf16") is not None


def test_calibrated_precisions_are_judged_by_the_median_image() -> None:
    """Images outside the calibrated ranges are clipped: here 3 of 16, as with the default model."""
    reference = Outputs(
        np.random.default_rng(0).normal(size=(16, 7)).astype(np.float32), np.zeros((16, 32), np.float32)
    )
    clipped = reference.logits.copy()
    clipped[13:] = -clipped[13:]
    parity = compare(Outputs(clipped, reference.embedding), reference)
    assert parity.typical == 0.0
    assert parity.logits > 0.3
    assert parity.failure("int8") is None
    assert parity.failure("bf16") is not None
    assert compare(Outputs(-reference.logits, reference.embedding), reference).failure("int8") is not None
