"""Fits the temperature of a bundle's probabilities on labeled images."""

from __future__ import annotations

from collections.abc import Callable

from vitserve.export.artifacts import ExportError
from vitserve.export.source_model import SourceModel
from vitserve.model.arrays import Activation
from vitserve.model.bundle.calibration import LEAST_IMAGES, ProbabilityCalibration, calibrate
from vitserve.model.bundle.evaluation import Images, in_batches

_BATCH = 32


def check_labeled(images: Images | None, activation: Activation) -> None:
    """Raises ExportError if the images cannot calibrate such probabilities."""
    if images is None:
        return
    if activation != "softmax":
        raise ExportError(
            f"only probabilities of a softmax are calibrated; those of this network are from {activation}"
        )
    if images.classes is None:
        raise ExportError("the images to calibrate with must lie in directories named after the labels")
    if (count := len(images.classes)) < LEAST_IMAGES:
        raise ExportError(f"{count} labeled images cannot calibrate probabilities; {LEAST_IMAGES} are needed")


def calibrated(
    source: SourceModel, images: Images | None, progress: Callable[[str], None]
) -> ProbabilityCalibration | None:
    """None without images. The logits are those of the source in float32."""
    if images is None:
        return None
    assert images.classes is not None  # see check_labeled()
    progress(f"calibrating the probabilities with {len(images.pixels):,} images")
    logits = in_batches(source.run, _BATCH)(images.pixels).logits
    return calibrate(logits, images.classes)
