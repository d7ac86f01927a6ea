"""The default model: its size, its model card, and its accuracy when served."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from tests.support.paths import CIFAR10, ROOT
from tests.support.server import Server, start_server
from vitserve.model.arrays import Precision
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.model.bundle.preprocess import Decoder
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import NoEngineError, open_engine
from vitserve.service.settings import DEFAULT_BUNDLE


@pytest.fixture(scope="module")
def default() -> Bundle:
    return open_bundle(DEFAULT_BUNDLE)


@pytest.fixture(scope="module")
def default_server() -> Iterator[Server]:
    running = start_server()
    yield running
    assert running.stop() == 0


def test_the_bundle_is_small_and_accurate_enough(default: Bundle) -> None:
    assert sum(file.stat().st_size for file in default.path.iterdir()) <= 12_000_000
    assert default.manifest.training is not None
    assert default.manifest.training["test_accuracy"] >= 0.9
    assert np.sum(default.manifest.training["confusion"]) == default.manifest.training["test_images"]
    assert {"onnxruntime", "openvino"} == {artifact.engine for artifact in default.manifest.artifacts}


def test_the_model_card_matches_the_training_report(default: Bundle) -> None:
    card, report = (default.path / "MODEL_CARD.md").read_text(), default.manifest.training
    assert report is not None
    assert f"Test accuracy **{report['test_accuracy']:.2%}**" in card
    assert all(
        f"| **{label}** | {' | '.join(map(str, row))} |" in card
        for label, row in zip(report["labels"], report["confusion"], strict=True)
    )


def test_the_checkpoint_in_the_repository_is_the_source(default: Bundle) -> None:
    report = json.loads((ROOT / "checkpoints" / "default" / "training.json").read_text())
    assert report == default.manifest.training


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("images", "tolerance"), [(400, 0.045), pytest.param(10_000, 1e-3, marks=pytest.mark.slow)])
def test_the_served_accuracy_is_the_recorded_accuracy(
    default: Bundle, images: int, tolerance: float, precision: Precision
) -> None:
    """Classifies CIFAR-10's test images with decoder and engine.

    All of them reach the recorded accuracy within 0.1 points; a part reaches it within three standard deviations.
    """
    if not CIFAR10.exists():
        pytest.skip("TEST_CIFAR10 does not name the test images")
    with np.load(CIFAR10, allow_pickle=False) as arrays:
        encoded, offsets, classes = (arrays[f"test_{name}"] for name in ("jpeg", "offsets", "labels"))
    try:
        engine = open_engine(default, EngineOptions(precision=precision, max_batch=64)).engine
    except NoEngineError as error:  # a CPU without bf16
        pytest.skip(str(error))
    decoder = Decoder(default.manifest.preprocessing)
    spans = itertools.pairwise(offsets[: images + 1])
    pixels = np.stack([decoder.decode(encoded[start:end].tobytes()) for start, end in spans])
    predicted = np.concatenate([engine.run(0, part).logits.argmax(1) for part in np.array_split(pixels, images // 50)])
    engine.close()
    expected = recorded_accuracy(default, precision)
    assert (predicted == classes[:images]).mean() == pytest.approx(expected, abs=tolerance)


def recorded_accuracy(default: Bundle, precision: Precision) -> float:
    """Of the training report for fp32, else of the artifact's evaluation, which lost at most half a point."""
    if precision == "fp32":
        assert default.manifest.training is not None
        return float(default.manifest.training["test_accuracy"])
    (evaluation,) = [artifact.evaluation for artifact in default.manifest.artifacts if artifact.precision == precision]
    assert evaluation is not None
    assert evaluation.accuracy is not None
    assert evaluation.images == 10_000
    assert evaluation.loss <= 0.5
    return evaluation.accuracy


def test_the_default_model_is_served_without_options(default_server: Server, default: Bundle) -> None:
    with httpx.Client(base_url=default_server.url) as client:
        model = client.get("/v1/model").json()
    assert (model["name"], model["version"]) == (default.manifest.name, default.manifest.version)
    assert len(model["labels"]) == 10
