"""`vitserve verify` passes on a good bundle and fails on a spoiled one, in every precision and on any images."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.images import random_image
from tests.support.paths import CIFAR10, ROOT
from vitserve.bench.image_check import check_images, lines
from vitserve.bench.verify import verify
from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.model.bundle.bundle import MANIFEST, Bundle, Evaluation, open_bundle, sha256
from vitserve.model.bundle.evaluation import Images, read_images
from vitserve.service.engines.engine import Engine, EngineOptions
from vitserve.service.engines.selection import NoEngineError, candidates, open_artifact
from vitserve.service.settings import DEFAULT_BUNDLE

# Precision → the file with the weights that it computes with.
ON_CPU: dict[Precision, str] = {"fp32": "model.onnx.data", "bf16": "model.onnx.data", "int8": "int8-plain.bin"}


def spoiled(source: Path, name: str, path: Path) -> Path:
    """A copy whose manifest is in order, but a fiftieth of the weights in the file is zero."""
    shutil.copytree(source, path)
    data = bytearray((path / name).read_bytes())
    start, length = len(data) // 3, len(data) // 50
    data[start : start + length] = bytes(length)
    (path / name).write_bytes(data)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = sha256(path / name)
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def failures_of(path: Path, precision: Precision, images: Images | None = None) -> list[str]:
    try:
        report = verify(open_bundle(path), EngineOptions("openvino", precision), images, [1], 0.01, 1)
    except NoEngineError as error:
        if "has no bf16 arithmetic" in str(error):
            pytest.skip(str(error))
        raise
    return list(report.failures)


@pytest.mark.parametrize("precision", ON_CPU)
def test_a_good_bundle_passes_and_a_spoiled_one_fails(precision: Precision, tmp_path: Path) -> None:
    assert failures_of(DEFAULT_BUNDLE, precision) == []
    (first, *_) = failures_of(spoiled(DEFAULT_BUNDLE, ON_CPU[precision], tmp_path / "spoiled"), precision)
    assert re.match(r"golden images: (typical outputs|logits|embedding) differ by", first)


@pytest.mark.parametrize("precision", ON_CPU)
def test_photos_of_another_domain_pass(precision: Precision, photos: list[Path]) -> None:
    """The default model knows ten classes of small images. On photos, int8 predicts another class for some of them."""
    bundle = open_bundle(DEFAULT_BUNDLE)
    _, images = read_images(photos[0].parent, bundle.manifest.preprocessing, bundle.labels, 1, 1000)
    assert failures_of(DEFAULT_BUNDLE, precision, images) == []


def test_images_of_the_domain_pass() -> None:
    if not CIFAR10.exists():
        pytest.skip("TEST_CIFAR10 does not name the archive")
    bundle = open_bundle(DEFAULT_BUNDLE)
    _, images = read_images(CIFAR10, bundle.manifest.preprocessing, bundle.labels, 1, 200)
    assert failures_of(DEFAULT_BUNDLE, "int8", images) == []


@pytest.mark.parametrize("precision", [pytest.param("fp16", marks=pytest.mark.slow), "fp8"])
def test_a_good_bundle_passes_and_a_spoiled_one_fails_on_a_gpu(
    precision: Precision, bundle: Bundle, fp8_bundle: Bundle, tmp_path: Path, environment: dict[str, str]
) -> None:
    """With the double of TensorRT. fp8 has its own graph, over the weights of the reference graph."""
    good = bundle if precision == "fp16" else fp8_bundle
    bad = spoiled(good.path, "model.onnx.data", tmp_path / "spoiled")
    options = shlex.split(f"--engine tensorrt --precision {precision} --batch-sizes 1 --seconds 0.01 --rounds 1")
    # tests/service/engines/test_fp8_plan.py verifies a good bundle in fp8.
    for path, status in ((good.path, 0), (bad, 1))[precision == "fp8" :]:
        command = [sys.executable, "-m", "vitserve", "verify", str(path), *options]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stdout + done.stderr


class ChangedEngine:
    """An int8 engine that is right about every image but the first ``changed``, whose logits it reverses."""

    name, precision, max_batch = "openvino", "int8", 4

    def __init__(self, exact: Engine, changed: int) -> None:
        self.exact, self.changed, self.seen = exact, changed, 0

    def run(self, stream: int, pixels: Pixels, rows: None = None) -> Outputs:
        outputs = self.exact.run(0, pixels)
        wrong = np.arange(self.seen, self.seen + len(pixels)) < self.changed
        self.seen += len(pixels)
        return Outputs(np.where(wrong[:, None], -outputs.logits, outputs.logits), outputs.embedding)


@pytest.mark.parametrize(
    ("labels", "in_domain", "changed", "failed"),
    [
        (False, False, 20, False),  # of another domain, perhaps
        (False, True, 20, True),
        (False, True, 1, False),
        (True, False, 20, True),
        (True, False, 1, False),
        (False, False, 60, True),  # the median image is wrong
    ],
)
def test_changed_predictions_are_judged_on_images_of_the_domain(
    labels: bool, in_domain: bool, changed: int, failed: bool, bundle: Bundle
) -> None:
    options = EngineOptions("openvino", "fp32", max_batch=4)
    (artifact,) = candidates(bundle, options)
    exact = open_artifact(bundle, artifact, options)
    pixels = np.stack([np.asarray(random_image(16, 16, seed)) for seed in range(100)])
    classes = np.concatenate([exact.run(0, pixels[at : at + 4]).logits.argmax(1) for at in range(0, 100, 4)])
    images = Images(pixels, classes if labels else None)
    int8 = replace(artifact, precision="int8", evaluation=Evaluation(1000, 0.99, 0.1))
    engine: Engine = ChangedEngine(exact, changed)  # type: ignore[assignment]  # what check_images() uses of it
    check = check_images(bundle, engine, int8, images, in_domain)
    exact.close()
    assert bool(check.failures) is failed, check.failures
    assert check.evaluation.top1_agreement == pytest.approx(1 - changed / 100)
    text = " ".join(lines(check))
    assert "openvino in int8 compared with openvino in fp32 on the CPU" in text
    assert "at export: same class for 99.00% of 1000 images" in text
    assert ("Not judged: the classes" in text) is (not labels and not in_domain)
