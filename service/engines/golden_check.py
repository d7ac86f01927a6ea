"""The golden check: does an engine reproduce the source network's outputs for the golden images?"""

from __future__ import annotations

import numpy as np

from vitserve.model.arrays import Outputs
from vitserve.model.bundle.bundle import Artifact, Bundle
from vitserve.model.bundle.parity import CALIBRATED, Parity, artifact_failure, compare
from vitserve.service import machine
from vitserve.service.engines.engine import Engine

# On another CPU an artifact may differ twice as much from its source as at export, because CPUs round and saturate
# differently.
_MAX_RATIO, _MAX_EXCESS = 2.0, 0.01


class GoldenCheckError(ValueError):
    """The engine's outputs for the golden images differ too much from the source network's."""


def golden_check(engine: Engine, bundle: Bundle, artifact: Artifact) -> Parity:
    """Runs the golden images and returns how close the outputs are.

    Raises GoldenCheckError if they are further from the source network's outputs than the precision allows or, for a
    calibrated precision, than ``artifact`` was at export. int8 must also have the outputs that it had at export, if
    the bundle records them and products are exact on this CPU.
    """
    golden = bundle.golden()
    if not len(golden.pixels):
        raise GoldenCheckError("the bundle has no golden images")
    starts = range(0, len(golden.pixels), engine.max_batch)
    batches = [engine.run(0, golden.pixels[start : start + engine.max_batch]) for start in starts]
    outputs = Outputs(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))
    parity = compare(outputs, golden.reference, bundle.manifest.activation, golden.domain_images)
    failure = parity.failure(engine.precision, golden.judged_by_median)
    if failure is None and engine.precision in CALIBRATED:
        failure = _drift(parity, artifact.parity)
    recorded = golden.recorded.get((artifact.engine, artifact.precision))
    if failure is None and recorded is not None and machine.multiplies_int8_exactly():
        same = compare(outputs, recorded, bundle.manifest.activation, golden.domain_images)
        failure = artifact_failure(same)
    if failure:
        raise GoldenCheckError(f"golden images: {failure}")
    return parity


def _drift(current: Parity, at_export: Parity) -> str | None:
    """The tolerance of a calibrated precision is wide and would hide defects, so the export's own result limits it."""
    if current.typical <= _MAX_RATIO * at_export.typical + _MAX_EXCESS:
        return None
    return f"typical outputs differ by {current.typical:.2e} of their range; at export it was {at_export.typical:.2e}"
