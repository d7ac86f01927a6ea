"""How close two sets of outputs are, and how close they must be: one measure for export's proof and the service's golden check."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitserve.model.arrays import Floats, Outputs, Precision, softmax

# Greatest difference allowed, relative to the largest magnitude in the reference. The mantissas have 23, 8 (bf16), 11 (fp16) bits
# and rounding accumulates over the depth; int8 and fp8 are judged on accuracy when they are exported, and here only against gross error.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 6e-2, "int8": 0.3, "fp8": 0.3}
# Their ranges were calibrated on real images. Some golden ones lie far outside of them and are clipped, which says nothing of real ones: a network that agreed
# with float32 on 99.2 % of 10,000 images was off by 0.73 on noise. So the image in the middle counts for them, and not the worst.
CALIBRATED: tuple[Precision, ...] = ("int8", "fp8")


@dataclass(frozen=True)
class Parity:
    """Served outputs against the source network's, over the golden images."""

    logits: float  # greatest difference relative to the largest reference logit
    embedding: float  # likewise
    probability: float  # greatest difference of a class probability
    top1_agreement: float  # share of images whose most probable class is the same
    typical: float  # as the larger of ``logits`` and ``embedding``, of the image in the middle when all are ordered by their difference

    def failure(self, precision: Precision) -> str | None:
        """Why this is not good enough for the precision, naming both numbers; None if it is."""
        limit = TOLERANCE[precision]
        judged = (
            {"typical outputs": self.typical}
            if precision in CALIBRATED
            else {"logits": self.logits, "embedding": self.embedding}
        )
        for name, difference in judged.items():
            if not difference <= limit:  # also rejects NaN
                return f"{name} differ by {difference:.2e} of their range; {precision} allows {limit:.0e}"
        return None


def compare(outputs: Outputs, reference: Outputs) -> Parity:
    """Differences relative to the largest magnitude in the reference. Raises ValueError if the shapes differ."""
    for name, ours, theirs in zip(Outputs._fields, outputs, reference, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"{name} have shape {ours.shape}; the reference has {theirs.shape}")
    logits, embedding = (_relative(ours, theirs) for ours, theirs in zip(outputs, reference, strict=True))
    return Parity(
        logits=float(logits.max()),
        embedding=float(embedding.max()),
        probability=float(np.abs(softmax(outputs.logits) - softmax(reference.logits)).max()),
        top1_agreement=float((outputs.logits.argmax(1) == reference.logits.argmax(1)).mean()),
        typical=float(max(np.median(logits), np.median(embedding))),
    )


def _relative(ours: Floats, theirs: Floats) -> Floats:
    """The greatest difference of each image, [n]."""
    differences: Floats = np.abs(ours - theirs).max(1) / max(float(np.abs(theirs).max()), 1e-12)
    return differences
