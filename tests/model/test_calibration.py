"""Calibration of probabilities: the temperature is found again, and predictions stay the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vitserve.model.arrays import softmax, to_probabilities
from vitserve.model.bundle.calibration import ProbabilityCalibration, calibrate, calibration_error, reliability

Arrays = tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.int64]]]


def calibrated_logits(count: int = 4000, classes: int = 6) -> Arrays:
    """Logits whose probabilities are right: the classes are drawn from them."""
    random = np.random.default_rng(0)
    logits = (2 * random.standard_normal((count, classes))).astype(np.float32)
    drawn = [random.choice(classes, p=row / row.sum()) for row in softmax(logits).astype(np.float64)]
    return logits, np.array(drawn)


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_temperature_of_too_large_and_too_small_logits_is_found(factor: float) -> None:
    logits, classes = calibrated_logits()
    found = calibrate(factor * logits, classes)
    assert found.temperature == pytest.approx(factor, rel=0.1)
    assert (found.images, found.held_out) == (2000, 2000)
    assert found.error_after < 0.04
    assert found.error_after < found.error_before / 2 or factor == 1.0


def test_a_temperature_changes_probabilities_but_no_prediction() -> None:
    logits, _ = calibrated_logits(50)
    for temperature in (0.5, 2.0):
        probabilities = to_probabilities(logits, "softmax", temperature)
        np.testing.assert_allclose(probabilities, softmax(logits / temperature), rtol=1e-5)
        assert (probabilities.argmax(1) == logits.argmax(1)).all()


def test_the_calibration_error_is_the_distance_of_probability_and_accuracy() -> None:
    """Half of the predictions state 0.9 and are right 3 times of 4; the others state 0.6 and are always right."""
    probabilities = np.array([0.9] * 4 + [0.6] * 4, np.float32)
    right = np.array([True, True, True, False] + [True] * 4)
    assert calibration_error(reliability(probabilities, right)) == pytest.approx((0.15 + 0.4) / 2)
    assert calibration_error(reliability(probabilities[:0], right[:0])) == 0


def test_few_images_and_impossible_temperatures_are_rejected() -> None:
    logits, classes = calibrated_logits(99)
    with pytest.raises(ValueError, match="99 labeled images cannot calibrate probabilities; 100 are needed"):
        calibrate(logits, classes)
    for temperature in (0.0, -1.0, 1e9):
        with pytest.raises(ValueError, match=r"less than or equal|greater than or equal"):
            ProbabilityCalibration(temperature, 50, 50, 0.1, 0.1)
