"""How often predictions are right compared with their probabilities, and a temperature that makes the two equal.

Guo et al., "On Calibration of Modern Neural Networks", 2017 (arXiv:1706.04599).
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pydantic
from pydantic.dataclasses import dataclass as validated

from vitserve.model.arrays import Floats, softmax, to_probabilities

_BINS = 15
LEAST_IMAGES = 100  # fewer give no useful estimate of the error
_LOWEST, _HIGHEST = 0.05, 20.0  # of a temperature
_STEPS = 60  # of the search: the interval becomes smaller by 10⁻¹²
_GOLDEN = (math.sqrt(5) - 1) / 2


@validated(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class ProbabilityCalibration:
    """Logits are divided by ``temperature`` before the softmax. The predicted classes stay the same."""

    temperature: Annotated[float, pydantic.Field(ge=_LOWEST, le=_HIGHEST)]
    images: int  # that the temperature was fitted on
    held_out: int  # other images, on which the errors were measured
    error_before: float  # expected calibration error, from 0 to 1
    error_after: float

    def __str__(self) -> str:
        return (
            f"calibrated with the temperature {self.temperature:.3f}, fitted on {self.images:,} images; the expected"
            f" calibration error on {self.held_out:,} others is {self.error_after:.2%} instead of"
            f" {self.error_before:.2%}"
        )


def temperature_of(calibration: ProbabilityCalibration | None) -> float:
    return 1.0 if calibration is None else calibration.temperature


def calibrate(logits: Floats, classes: npt.NDArray[np.int64], seed: int = 0) -> ProbabilityCalibration:
    """Fits the temperature on a random half of the images, and measures the errors on the other half.

    ``logits``: float32 [n, classes] of the network. ``classes``: int64 [n], the true ones. Raises ValueError for fewer
    than 100 images.
    """
    if len(classes) < LEAST_IMAGES:
        raise ValueError(f"{len(classes)} labeled images cannot calibrate probabilities; {LEAST_IMAGES} are needed")
    order = np.random.default_rng(seed).permutation(len(classes))
    fitted, held_out = order[: len(order) // 2], order[len(order) // 2 :]
    temperature = round(_fit(logits[fitted], classes[fitted]), 4)
    test_logits, test_classes = logits[held_out], classes[held_out]

    def error(degree: float) -> float:
        probabilities = to_probabilities(test_logits, "softmax", degree).max(axis=1)
        return calibration_error(reliability(probabilities, test_logits.argmax(1) == test_classes))

    before, after = error(1.0), error(temperature)
    return ProbabilityCalibration(temperature, len(fitted), len(held_out), round(before, 5), round(after, 5))


def _fit(logits: Floats, classes: npt.NDArray[np.int64]) -> float:
    """The temperature with the least mean negative log-likelihood, which has one minimum over 1 ÷ temperature."""
    rows = np.arange(len(classes))

    def loss(inverse: float) -> float:
        probabilities = softmax(logits.astype(np.float64) * inverse)  # type: ignore[arg-type]  # float64 works too
        return float(-np.log(np.maximum(probabilities[rows, classes], 1e-300)).mean())

    low, high = 1 / _HIGHEST, 1 / _LOWEST
    for _ in range(_STEPS):  # golden-section search
        width = _GOLDEN * (high - low)
        if loss(high - width) <= loss(low + width):
            high = low + width
        else:
            low = high - width
    return 2 / (low + high)


def reliability(probabilities: Floats, right: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """[15, 3]: number of images, mean probability, and accuracy of the predictions in each bin of probability.

    ``probabilities``: of the predicted classes, [n]. ``right``: whether the prediction is right, [n].
    """
    number = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    rows = [
        (members.sum(), probabilities[members].mean(), right[members].mean()) if members.any() else (0, 0, 0)
        for members in (number == index for index in range(_BINS))
    ]
    return np.array(rows, np.float64)


def calibration_error(binned: npt.NDArray[np.float64]) -> float:
    """The expected calibration error (ECE, section 2): the mean distance of probability and accuracy."""
    counts, probability, accuracy = binned.T
    return float((counts * np.abs(probability - accuracy)).sum() / max(counts.sum(), 1))
