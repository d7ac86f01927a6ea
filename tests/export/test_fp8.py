"""fp8 artifacts: made from calibration images, and verified on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.bundles import artifact_in
from tests.support.networks import TINY, checkpoint
from vitserve.export.artifacts import ExportError
from vitserve.export.build_bundle import build_bundle
from vitserve.model.bundle.bundle import Bundle, Quantization, open_bundle


def test_fp8_is_verified_by_simulation(fp8_bundle: Bundle) -> None:
    exported = fp8_bundle
    fp8 = artifact_in(open_bundle(exported.path), "fp8")
    assert (fp8.engine, fp8.path, fp8.weights, fp8.simulated) == ("tensorrt", "fp8.onnx", "model.onnx.data", True)
    assert fp8.evaluation is not None
    assert fp8.evaluation.images == 40
    layers = 4 * TINY.depth + 3  # with the patch projection and the head, and one more in the last block
    assert fp8.quantization == Quantization(layers - 2, layers), "the patch projection and the head are not"
    assert 1e-3 < fp8.parity.logits < 0.3, "E4M3 has three bits of mantissa"
    assert not (exported.path / "fp8.onnx.data").exists(), "weights are not shared"


def test_fp8_without_images_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"fp8 needs images to calibrate with \(--images\)"):
        build_bundle(checkpoint(), tmp_path / "bundle", name="tiny", precisions=["fp8"])
