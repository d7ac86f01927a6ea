"""Array types shared by all stages, the names of the precisions, and softmax. Imports numpy only."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Precision = Literal["fp32", "bf16", "fp16", "int8", "fp8"]
Pixels = npt.NDArray[np.uint8]  # [H, W, 3], or a batch [n, H, W, 3]
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
