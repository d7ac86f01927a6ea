"""fp8 on a GPU: tried first, rejected on a GPU without fp8, and built from the quantized graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.bundles import artifact_in
from tests.support.paths import ROOT
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.engines import selection
from vitserve.service.engines.engine import EngineOptions, EngineUnavailableError
from vitserve.service.engines.tensorrt.target import Target


def test_fp8_is_the_first_candidate_on_a_gpu(
    fp8_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(plan_dir=str(tmp_path))
    assert "tensorrt" not in {artifact.engine for artifact in selection.candidates(fp8_bundle, options)}
    monkeypatch.setattr("vitserve.service.machine.gpus", lambda: ["0"])
    on_gpu = [(artifact.engine, artifact.precision) for artifact in selection.candidates(fp8_bundle, options)]
    assert on_gpu[:4] == [("tensorrt", "fp8"), ("tensorrt", "bf16"), ("tensorrt", "fp16"), ("onnxruntime-cuda", "bf16")]
    assert on_gpu[5:7] == [("torch", "bf16"), ("torch", "fp16")]
    assert not {("torch", "fp32"), ("torch", "fp8")} & set(on_gpu), "only on request"


def test_torch_on_a_gpu_needs_no_plan_directory(fp8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitserve.service.machine.gpus", lambda: ["0"])
    candidates = selection.candidates(fp8_bundle, EngineOptions(engine="torch"))
    assert [artifact.precision for artifact in candidates] == ["bf16", "fp16", "fp32", "fp8"]


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        (
            Target("NVIDIA A100", (8, 0), "11.4", "data-center"),
            "fp8",
            r"fp8 needs sm89; the NVIDIA A100 is sm80",
        ),
        (Target("Tesla T4", (7, 5), "1.7", "rtx"), "bf16", r"bf16 needs sm80; the Tesla T4 is sm75"),
        (
            Target("NVIDIA H100", (9, 0), "1.7", "rtx"),
            "bf16",
            r"TensorRT for RTX does not support the NVIDIA H100, which is sm90: pip install 'vitserve\[tensorrt\]'",
        ),
    ],
)
def test_a_gpu_without_the_type_or_the_library_is_rejected_before_a_build(
    fp8_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Target, precision: str, message: str
) -> None:
    monkeypatch.setattr("vitserve.service.engines.gpu_artifacts.local_target", lambda: target)
    options = EngineOptions(engine="tensorrt", precision=precision, plan_dir=str(tmp_path))
    (artifact,) = selection.candidates(fp8_bundle, options)
    with pytest.raises(EngineUnavailableError, match=message):
        selection.open_artifact(fp8_bundle, artifact, options)


def test_fp8_plan_matches_the_verified_graph(fp8_bundle: Bundle, tmp_path: Path, environment: dict[str, str]) -> None:
    report_path = tmp_path / "report.json"
    command = [sys.executable, "-m", "vitserve", "verify", str(fp8_bundle.path), "--engine", "tensorrt"]
    command += ["--precision", "fp8", "--batch-sizes", "2", "--rounds", "1", "--seconds", "0.01"]
    command += ["--json", str(report_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(report_path.read_text())
    assert (report["precision"], report["failures"]) == ("fp8", [])
    limit = 2 * artifact_in(fp8_bundle, "fp8").parity.logits
    assert report["parity"]["logits"] < limit, "bf16 in the other layers adds little to the rounding of fp8"
    (plan,) = (tmp_path / "cache" / "vitserve" / "plans").glob("*-fp8-b2-*.plan")
    assert b"QuantizeLinear" in plan.read_bytes()
