"""fp8 as the bundle holds it: made from images, judged before a GPU has seen it, and tried first where one can run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.gpu.fixtures import Gpu
from tests.support.images import random_image
from tests.support.networks import TINY, checkpoint
from tests.support.paths import ROOT
from vitserve.export.build_bundle import ExportError, build_bundle
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.model.bundle.evaluation import Images
from vitserve.service.engines import selection as opening
from vitserve.service.engines.engine import EngineOptions, EngineUnavailableError
from vitserve.service.engines.tensorrt.target import Target


@pytest.fixture(scope="module")
def with_fp8(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    pixels = np.stack([np.asarray(random_image(TINY.image_size, TINY.image_size, seed)) for seed in range(60)])
    path = tmp_path_factory.mktemp("fp8") / "bundle"
    calibration, evaluation_images = Images(pixels[:20], None), Images(pixels[20:], None)
    return build_bundle(
        checkpoint(),
        path,
        name="tiny",
        precisions=["fp8"],
        calibration=calibration,
        evaluation_images=evaluation_images,
        max_loss=20,
    )


def test_it_is_judged_where_it_was_made(with_fp8: Bundle) -> None:
    (fp8,) = [each for each in open_bundle(with_fp8.path).manifest.artifacts if each.precision == "fp8"]
    assert (fp8.engine, fp8.path, fp8.weights, fp8.simulated) == ("tensorrt", "fp8.onnx", "model.onnx.data", True)
    assert fp8.evaluation is not None
    assert fp8.evaluation.images == 40
    assert 1e-3 < fp8.parity.logits < 0.3, "three bits of mantissa"
    assert not (with_fp8.path / "fp8.onnx.data").exists(), "weights are shared"


def test_without_images_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"fp8 needs images to calibrate with \(--images\)"):
        build_bundle(checkpoint(), tmp_path / "bundle", name="tiny", precisions=["fp8"])


def test_it_comes_first_on_a_gpu_and_not_at_all_without_one(
    with_fp8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(plan_dir=str(tmp_path))
    assert "tensorrt" not in {each.engine for each in opening.candidates(with_fp8, options)}
    monkeypatch.setattr("vitserve.service.machine.gpus", lambda: ["0"])
    found = [(each.engine, each.precision) for each in opening.candidates(with_fp8, options)]
    assert found[:4] == [("tensorrt", "fp8"), ("tensorrt", "bf16"), ("tensorrt", "fp16"), ("onnxruntime-cuda", "bf16")]
    assert found[5:7] == [("torch", "bf16"), ("torch", "fp16")]
    assert ("torch", "fp32") not in found
    without_plans = opening.candidates(with_fp8, EngineOptions(engine="torch"))
    assert [each.precision for each in without_plans] == ["bf16", "fp16", "fp32"], "torch needs no directory for plans"


def test_a_gpu_without_it_is_told_apart(
    with_fp8: Bundle, tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "vitserve.service.engines.gpu_artifacts.local_target"
    monkeypatch.setattr(target, lambda: Target("NVIDIA A100", (8, 0), "11.4"))
    options = EngineOptions(engine="tensorrt", precision="fp8", plan_dir=str(tmp_path))
    (fp8,) = opening.candidates(with_fp8, options)
    with pytest.raises(
        EngineUnavailableError, match=r"fp8 needs compute capability \(8, 9\); the NVIDIA A100 has \(8, 0\)"
    ):
        opening.open_artifact(with_fp8, fp8, options)


def test_its_plan_is_built_from_the_quantized_graph_and_computes_what_was_judged(
    with_fp8: Bundle, tmp_path: Path, environment: dict[str, str]
) -> None:
    command = [
        sys.executable,
        "-m",
        "vitserve",
        "verify",
        str(with_fp8.path),
        "--engine",
        "tensorrt",
        "--precision",
        "fp8",
        "--batch-sizes",
        "2",
    ]
    command += ["--rounds", "1", "--seconds", "0.01", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["precision"], report["failures"]) == ("fp8", [])
    (evaluation_images,) = [each for each in with_fp8.manifest.artifacts if each.precision == "fp8"]
    assert report["parity"]["logits"] < 2 * evaluation_images.parity.logits, (
        "bf16 around it adds to what fp8 rounds, and not much"
    )
    (plan,) = (tmp_path / "cache" / "vitserve" / "plans").glob("*-fp8-b2-*.plan")
    assert b"QuantizeLinear" in plan.read_bytes()
