"""`vitserve verify`: the report on one engine on this machine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.images import encoded, random_image
from tests.support.networks import TINY
from tests.support.paths import ROOT
from vitserve.bench.verify import verify
from vitserve.cli.main import app
from vitserve.model.arrays import Outputs
from vitserve.model.bundle.bundle import AttentionKernels, Bundle
from vitserve.model.bundle.evaluation import Images
from vitserve.service.engines.engine import EngineOptions, EngineUnavailableError
from vitserve.service.engines.selection import NoEngineError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(6):
        (images / f"{seed}.png").write_bytes(encoded(random_image(seed=seed)))
    return images


def test_the_report_has_every_section(bundle: Bundle, directory: Path, tmp_path: Path) -> None:
    written = tmp_path / "report.json"
    options = shlex.split("--engine openvino --precision fp32 --batch-sizes 1,3 --seconds 0.01 --rounds 2")
    command = ["verify", str(bundle.path), *options, "--images", str(directory), "--json", str(written)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads(written.read_text())
    assert (report["engine"], report["precision"], report["failures"]) == ("openvino", "fp32", [])
    assert report["attention"]["description"].startswith("fused kernels at export: 2 × ")
    assert (report["images"]["evaluation"]["images"], report["images"]["evaluation"]["top1_agreement"]) == (5, 1.0)
    assert (report["images"]["domain"], report["images"]["reference"]) == ("unknown", "openvino in fp32 on the CPU")
    assert [row["batch_size"] for row in report["rows"]] == [1, 3]
    assert {"numpy", "openvino"} <= report["machine"]["packages"].keys()
    assert "5 images without labels: openvino in fp32 compared with openvino in fp32 on the CPU" in result.output
    assert "golden images: 16 textures, compared with the network that was exported" in result.output


def test_unfused_attention_on_a_cpu_is_no_failure(bundle: Bundle) -> None:
    openvino = next(
        artifact
        for artifact in bundle.manifest.artifacts
        if (artifact.engine, artifact.precision) == ("openvino", "fp32")
    )
    unfused = replace(openvino, attention=AttentionKernels({}, 2))
    changed = replace(bundle, manifest=replace(bundle.manifest, artifacts=(unfused,)))
    report = verify(changed, EngineOptions(), None, [1], 0.01, 1)
    assert report.attention is not None
    assert report.attention.description == "fused kernels at export: none; separate softmax layers: 2"
    assert not report.attention.fused
    assert not report.failures


class WrongEngine:
    """Computes the same logits for every image."""

    name, precision, streams, max_batch = "openvino", "fp32", 1, 4

    def run(self, stream: int, pixels: np.ndarray, rows: None = None) -> Outputs:
        logits = np.ones((len(pixels), TINY.classes), np.float32)
        return Outputs(logits, np.ones((len(pixels), TINY.width), np.float32))

    def share(self, pixels: np.ndarray) -> None: ...

    def close(self) -> None: ...


def test_the_report_is_on_the_first_engine_that_opens(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that fails the golden check is reported, not replaced by the next."""
    monkeypatch.setattr("vitserve.bench.verify.open_artifact", lambda *_: WrongEngine())
    images = Images(np.stack([np.asarray(random_image(16, 16, seed)) for seed in range(30)]), None)
    report = verify(bundle, EngineOptions(), images, [1], 0.01, 1)
    assert report.parity is None
    assert report.failures[0].startswith("golden images: logits differ by")
    assert report.failures[1].startswith("on the images, logits differ by")


def test_all_reasons_are_named_if_no_engine_opens(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> object:
        raise EngineUnavailableError("no such device")

    monkeypatch.setattr("vitserve.bench.verify.open_artifact", fail)
    with pytest.raises(NoEngineError, match=r"openvino in bf16: no such device; .*onnxruntime in fp32: no such device"):
        verify(bundle, EngineOptions(), None, [1], 0.01, 1)


def test_a_gpu_report_describes_the_plan(
    bundle: Bundle, directory: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    options = shlex.split("--engine tensorrt --batch-sizes 1,2 --seconds 0.01 --rounds 1")
    command = [sys.executable, "-m", "vitserve", "verify", str(bundle.path), *options]
    command += ["--images", str(directory), "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["attention"]["description"].startswith("2 of 2 attention layers are fused (input: BFloat16)")
    assert 0 < report["attention"]["share_of_time"] < 1
    assert report["machine"]["device"] == "NVIDIA H200, compute capability 9.0"
    assert any("building the TensorRT plan" in step for step in report["steps"])
    assert "% of the time" in done.stdout
