"""Array types shared by all stages, the names of the precisions, and how logits become probabilities. numpy only."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Precision = Literal["fp32", "bf16", "fp16", "int8", "fp8"]
# softmax: one of the classes applies. sigmoid: each class applies or not (multi-label), and one logit is one class.
# none: the network has no classes, and its embedding stands in the place of the logits.
Activation = Literal["softmax", "sigmoid", "none"]
_SAME_COSINE = 0.99  # of embeddings that count as equal, for networks without classes
Pixels = npt.NDArray[np.uint8]  # [H, W, C], or a batch [n, H, W, C]; C = 3 for RGB, 1 for gray
Floats = npt.NDArray[np.float32]


class Outputs(NamedTuple):
    logits: Floats  # [n, classes]
    embedding: Floats  # [n, width]


def softmax(logits: Floats) -> Floats:
    """Logits [n, classes] → probabilities, float32. Subtracts the maximum first, so that exp() cannot overflow."""
    # maximum.reduce takes half the time of .max(), which matters for a single row.
    maximum: Floats = np.maximum.reduce(logits, axis=-1, keepdims=True)
    exponentials = np.exp(logits - maximum)
    total: Floats = np.add.reduce(exponentials, axis=-1, keepdims=True)
    probabilities: Floats = exponentials / total
    return probabilities


def sigmoid(logits: Floats) -> Floats:
    """Logits [n, classes] → probabilities, float32, of each class on its own.

    exp() gets no positive number, so that it cannot overflow.
    """
    exponentials = np.exp(-np.abs(logits))
    probabilities: Floats = np.where(logits >= 0, np.float32(1), exponentials) / (1 + exponentials)
    return probabilities


def to_probabilities(logits: Floats, activation: Activation, temperature: float = 1.0) -> Floats:
    """Logits [n, classes] → probabilities [n, classes]. They add up to 1 only with softmax. Zeros without classes.

    ``temperature`` divides the logits, see model/bundle/calibration.py.
    """
    if activation == "none":
        return np.zeros_like(logits)
    if temperature != 1.0:
        logits = logits * np.float32(1 / temperature)
    return softmax(logits) if activation == "softmax" else sigmoid(logits)


def to_predictions(logits: Floats, activation: Activation) -> npt.NDArray[np.bool_]:
    """Logits [n, classes] → the predicted classes, bool [n, classes].

    With softmax it is the most probable class, with sigmoid all classes with a probability above one half.
    """
    predicted: npt.NDArray[np.bool_] = logits > 0
    if activation == "softmax":
        predicted = logits.argmax(1)[:, None] == np.arange(logits.shape[1])
    return predicted


def agreement_of(actual: Floats, expected: Floats, activation: Activation) -> float:
    """The agreement() of the classes that two arrays of logits [n, classes] predict.

    Without classes, it is the share of embeddings whose cosine is at least 0.99.
    """
    if activation != "none":
        return agreement(to_predictions(actual, activation), to_predictions(expected, activation))
    norms = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (actual * expected).sum(axis=1) / np.maximum(norms, 1e-12)
    return float((cosines >= _SAME_COSINE).mean())


def agreement(predicted: npt.NDArray[np.bool_], expected: npt.NDArray[np.bool_]) -> float:
    """Predicted classes, both bool [n, classes] → the mean share of classes in common, from 0 to 1.

    It is the Jaccard index of each image's two sets of classes, and 1 if both are empty. With one class for each image,
    it is the share of images with the same class.
    """
    intersection, union = (predicted & expected).sum(1), (predicted | expected).sum(1)
    return float(np.where(union, intersection / np.maximum(union, 1), 1.0).mean())
