"""How the pixels of a bundle differ from those of the image processor that the checkpoint names."""

from __future__ import annotations

import pydantic
from pydantic.dataclasses import dataclass as validated

_STRICT = pydantic.ConfigDict(extra="forbid")


@validated(frozen=True, config=_STRICT)
class ProcessorComparison:
    """Measured at export on generated images of several sizes. Photos may differ more."""

    processor: str  # its class and backend, and the version of the library
    images: int
    levels: float  # the largest difference of a value, of 255
    mean_levels: float
    logits: float  # the largest difference of the source network's logits, relative to the largest logit

    def __str__(self) -> str:
        if not self.levels:
            return f"equal to {self.processor} on {self.images} generated images"
        return (
            f"differs from {self.processor} by at most {self.levels:.0f} of 255 levels (mean {self.mean_levels:.3f}),"
            f" the logits by {self.logits:.1e}, on {self.images} generated images"
        )
