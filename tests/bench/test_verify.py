"""`vitserve verify`: one report of what an engine is here."""

from __future__ import annotations

import json
import os
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
from vitserve.model.bundle.bundle import AttentionKernels, Bundle
from vitserve.model.bundle.evaluation import Images
from vitserve.service.engines.engine import EngineOptions, EngineUnavailableError
from vitserve.service.engines.selection import NoEngineError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "images"
    made.mkdir()
    for seed in range(6):
        (made / f"{seed}.png").write_bytes(encoded(random_image(seed=seed)))
    return made


def test_the_report_has_all_that_was_found(bundle: Bundle, directory: Path, tmp_path: Path) -> None:
    written = tmp_path / "report.json"
    options = (
        "--engine",
        "openvino",
        "--precision",
        "fp32",
        "--batch-sizes",
        "1,3",
        "--seconds",
        "0.01",
        "--rounds",
        "2",
    )
    result = CliRunner().invoke(
        app, ["verify", str(bundle.path), *options, "--images", str(directory), "--json", str(written)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(written.read_text())
    assert (report["engine"], report["precision"], report["failures"]) == ("openvino", "fp32", [])
    assert report["attention"]["said"].startswith("fused when the bundle was made: 2 × ")
    assert (report["evaluation"]["images"], report["evaluation"]["top1_agreement"]) == (5, 1.0)
    assert [row["batch_size"] for row in report["rows"]] == [1, 3]
    assert {"numpy", "openvino"} <= report["machine"]["packages"].keys()
    assert "5 images: 100.00% agree with float32" in result.output


def test_attention_that_is_not_fused_is_said_and_fails_only_a_plan(bundle: Bundle) -> None:
    openvino = next(each for each in bundle.manifest.artifacts if (each.engine, each.precision) == ("openvino", "fp32"))
    apart = replace(
        bundle, manifest=replace(bundle.manifest, artifacts=(replace(openvino, attention=AttentionKernels({}, 2)),))
    )
    report = verify(apart, EngineOptions(), None, [1], 0.01, 1)
    assert report.attention is not None
    assert (report.attention.said, report.attention.fused) == (
        "fused when the bundle was made: none; 2 softmax layers beside",
        False,
    )
    assert not report.failures


def test_what_is_wrong_with_an_engine_is_its_report_and_not_hidden_behind_the_next(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        name, precision, streams, max_batch = "openvino", "fp32", 1, 4

        def run(self, stream: int, pixels: np.ndarray, rows: None = None) -> object:
            from vitserve.model.arrays import Outputs

            return Outputs(
                np.ones((len(pixels), TINY.classes), np.float32), np.ones((len(pixels), TINY.width), np.float32)
            )

        def share(self, pixels: np.ndarray) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr("vitserve.bench.verify.open_artifact", lambda *_: Wrong())
    images = Images(np.stack([np.asarray(random_image(16, 16, seed)) for seed in range(30)]), None)
    report = verify(bundle, EngineOptions(), images, [1], 0.01, 1)
    assert report.parity is None
    assert report.failures[0].startswith("golden images: logits differ by")
    assert "of the images are classified otherwise than in float32; 1% may be" in report.failures[1]


def test_nothing_to_open_names_every_reason(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(*_: object) -> object:
        raise EngineUnavailableError("no such device")

    monkeypatch.setattr("vitserve.bench.verify.open_artifact", reject)
    with pytest.raises(NoEngineError, match=r"openvino in bf16: no such device; .*onnxruntime in fp32: no such device"):
        verify(bundle, EngineOptions(), None, [1], 0.01, 1)


def test_on_a_gpu_it_builds_the_plan_and_says_what_attention_became(
    bundle: Bundle, directory: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    command = [
        sys.executable,
        "-m",
        "vitserve",
        "verify",
        str(bundle.path),
        "--engine",
        "tensorrt",
        "--batch-sizes",
        "1,2",
        "--seconds",
        "0.01",
        "--rounds",
        "1",
    ]
    command += ["--images", str(directory), "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["attention"]["said"].startswith("2 of 2 attention layers are fused (input: BFloat16)")
    assert 0 < report["attention"]["share_of_time"] < 1
    assert report["machine"]["device"] == "NVIDIA H200, compute capability 9.0"
    assert any("building the TensorRT plan" in step for step in report["steps"])
    assert "% of the time" in done.stdout
