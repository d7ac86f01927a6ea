"""Numerical parity: how far outputs differ from a reference, and the tolerance of each precision.

Export verifies every artifact with it, and the golden check verifies every engine at start-up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitserve.model.arrays import (
    Activation,
    Floats,
    Outputs,
    Precision,
    agreement_of,
    to_probabilities,
)

# Allowed difference relative to the largest magnitude in the reference. Mantissas have 23 (fp32), 10 (fp16) and
# 7 (bf16) bits, and rounding errors accumulate over the depth. Export checks the accuracy of int8 and fp8; here they
# are only checked for gross errors.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 6e-2, "int8": 0.3, "fp8": 0.3}
# Their ranges are calibrated on real images. Values of some golden images lie outside the ranges and are clipped, which
# does not affect real images: a network that agreed with fp32 on 99.2% of 10,000 images differed by 0.73 on noise.
# So these precisions are judged by the median image instead of the worst. It is the median of the golden images of the
# model's domain, if there are any.
CALIBRATED: tuple[Precision, ...] = ("int8", "fp8")
# Allowed difference of int8 to the outputs that the same artifact had at export, relative as above: of any image, and
# of the median image. About twice the largest that was measured between CPUs with and without bf16, for the default
# model and ViT-B/16: docs/experiments.md. Only for CPUs whose int8 products are exact.
SAME_ARTIFACT_TOLERANCE = {"logits": 0.1, "embedding": 0.1, "typical": 0.05}


@dataclass(frozen=True)
class Parity:
    """Differences between an engine's outputs and the source network's, over the golden images."""

    logits: float  # largest difference, relative to the largest reference logit
    embedding: float  # largest difference, relative to the largest reference value
    probability: float  # largest difference of a class probability
    top1_agreement: float  # share of images with the same most probable class; with sigmoid, of classes in common
    # The larger of the median images' differences in logits and in embedding, relative as above; over the images of the
    # model's domain, if there are any.
    typical: float

    def failure(self, precision: Precision, by_median: bool = False) -> str | None:
        """Why the differences exceed the precision's tolerance, naming both numbers; None if they do not.

        ``by_median``: judge the median image instead of the worst, as for calibrated precisions.
        """
        limit = TOLERANCE[precision]
        judged = (
            {"typical outputs": self.typical}
            if precision in CALIBRATED or by_median
            else {"logits": self.logits, "embedding": self.embedding}
        )
        for name, difference in judged.items():
            if not difference <= limit:  # NaN is a failure too
                return f"{name} differ by {difference:.2e} of their range; {precision} allows {limit:.0e}"
        return None


def artifact_failure(parity: Parity) -> str | None:
    """Why outputs are not those that the same artifact had at export, naming both numbers. None if they are.

    ``parity`` compares the two.
    """
    for name, limit in SAME_ARTIFACT_TOLERANCE.items():
        difference = getattr(parity, name)
        if not difference <= limit:  # NaN is a failure too
            return f"{name} outputs differ by {difference:.2e} of their range from those at export; {limit} is allowed"
    return None


def compare(outputs: Outputs, reference: Outputs, activation: Activation = "softmax", domain_images: int = 0) -> Parity:
    """Compares outputs with a reference. Raises ValueError if the shapes differ.

    The last ``domain_images`` images are of the model's domain.
    """
    for name, actual, expected in zip(Outputs._fields, outputs, reference, strict=True):
        if actual.shape != expected.shape:
            raise ValueError(f"{name} have shape {actual.shape}; the reference has {expected.shape}")
    logits, embedding = (_relative(actual, expected) for actual, expected in zip(outputs, reference, strict=True))
    actual_probabilities, expected_probabilities = (
        to_probabilities(result.logits, activation) for result in (outputs, reference)
    )
    of_domain = slice(len(logits) - domain_images if domain_images else 0, None)
    return Parity(
        logits=float(logits.max()),
        embedding=float(embedding.max()),
        probability=float(np.abs(actual_probabilities - expected_probabilities).max()),
        top1_agreement=agreement_of(outputs.logits, reference.logits, activation),
        typical=float(max(np.median(logits[of_domain]), np.median(embedding[of_domain]))),
    )


def _relative(actual: Floats, expected: Floats) -> Floats:
    """The largest difference of each image relative to the largest expected magnitude, [n]."""
    differences: Floats = np.abs(actual - expected).max(1) / max(float(np.abs(expected).max()), 1e-12)
    return differences
