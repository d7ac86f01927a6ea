"""Compares an engine with float32 on the user's images, and judges the result as far as the images allow it.

Rounding errors do not depend on what an image shows, so the numerical parity is judged on any images. The share of
changed predictions does: on images of another domain a network is undecided between classes, and the ranges of a
calibrated precision were not made for them. So predictions are judged on images of the model's domain only: images in
directories that are named after its labels, or of which the user states it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vitserve.model.bundle.bundle import Artifact, Bundle, Evaluation
from vitserve.model.bundle.evaluation import Images, evaluate, in_batches
from vitserve.model.bundle.parity import CALIBRATED, TOLERANCE, Parity, compare
from vitserve.model.config import merges_tokens
from vitserve.service.engines.engine import Engine, EngineOptions
from vitserve.service.engines.selection import open_engine

MAX_LOSS = 0.5  # percentage points, the default of `vitserve export --max-loss`
_STANDARD_ERRORS = 2  # that a loss may exceed the limit by, because it is measured on a sample

Domain = Literal["labels", "stated", "unknown"]


@dataclass(frozen=True)
class ImageCheck:
    """``engine`` compared with ``reference`` on images. Failed if ``failures`` is not empty."""

    engine: str
    reference: str
    domain: Domain  # how it is known that the images are of the model's domain
    evaluation: Evaluation
    parity: Parity  # with the reference instead of the source network, and on these images
    at_export: Evaluation | None
    judged: str
    failures: tuple[str, ...]


def check_images(bundle: Bundle, engine: Engine, artifact: Artifact, images: Images, in_domain: bool) -> ImageCheck:
    """Compares the engine with the fastest float32 engine on the CPU. Raises NoEngineError if there is none."""
    activation = bundle.manifest.activation
    opened = open_engine(bundle, EngineOptions(precision="fp32", max_batch=8)).engine
    try:
        expected = in_batches(lambda pixels: opened.run(0, pixels), 8)(images.pixels)
    finally:
        opened.close()
    outputs = in_batches(lambda pixels: engine.run(0, pixels), engine.max_batch)(images.pixels)
    evaluation = evaluate(lambda _: outputs, expected, images, activation)
    parity = compare(outputs, expected, activation)
    domain: Domain = "labels" if images.classes is not None else "stated" if in_domain else "unknown"
    failure = parity.failure(engine.precision, merges_tokens(bundle.manifest.config))
    failures = [] if failure is None else [f"on the images, {failure}"]
    if domain != "unknown" and engine.precision != "fp32":
        failures += _loss_failures(evaluation, artifact.evaluation)
    return ImageCheck(
        f"{engine.name} in {engine.precision}",
        f"{opened.name} in fp32 on the CPU",
        domain,
        evaluation,
        parity,
        artifact.evaluation,
        _judged(engine, domain),
        tuple(failures),
    )


def lines(check: ImageCheck) -> list[str]:
    """The check in words, for the report."""
    here = check.evaluation
    kind = {"labels": "with labels", "stated": "of the model's domain", "unknown": "without labels"}[check.domain]
    compared = f"{here.images} images {kind}: {check.engine} compared with {check.reference}"
    result = f"same class: {here.top1_agreement:.2%}; maximum difference of a probability: {here.probability:.1e}"
    if here.accuracy is not None and here.source_accuracy is not None:
        result += f"; accuracy {here.accuracy:.2%}, of the reference {here.source_accuracy:.2%}"
    if check.at_export is not None:
        result += f"; at export: same class for {check.at_export.top1_agreement:.2%} of {check.at_export.images} images"
    return [compared, result, check.judged]


def _judged(engine: Engine, domain: Domain) -> str:
    which = "the median image" if engine.precision in CALIBRATED else "every image"
    judged = f"judged: the outputs of {which} (limit: {TOLERANCE[engine.precision]:.0e} of their range)"
    if engine.precision == "fp32":
        return judged
    if domain != "unknown":
        return f"{judged} and the loss of accuracy"
    return (
        f"{judged}. Not judged: the classes, because images of another domain than the model's change more often"
        " (directories named after its labels, or --in-domain, say that they are of its domain)"
    )


def _loss_failures(here: Evaluation, at_export: Evaluation | None) -> list[str]:
    """The loss of accuracy; without labels, half of the changed predictions, as at export."""
    changed = 1 - here.top1_agreement
    points = 100 if here.accuracy is not None else 50
    error = points * math.sqrt(changed / here.images)
    limit = max(MAX_LOSS, 0.0 if at_export is None else at_export.loss) + _STANDARD_ERRORS * error
    if here.loss <= limit:
        return []
    return [
        f"{here.loss:.2f} percentage points of accuracy are lost on the images; for {here.images} images at most"
        f" {limit:.2f} are allowed ({changed:.2%} have another class than in float32)"
    ]
