"""The model that comes along: small, recorded, and as good when served as its card says."""

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


def test_it_is_small_and_meets_its_floor(default: Bundle) -> None:
    assert sum(each.stat().st_size for each in default.path.iterdir()) <= 12_000_000
    assert default.manifest.training is not None
    assert default.manifest.training["test_accuracy"] >= 0.9
    assert np.sum(default.manifest.training["confusion"]) == default.manifest.training["test_images"]
    assert {"onnxruntime", "openvino"} == {each.engine for each in default.manifest.artifacts}


def test_its_card_says_what_its_record_says(default: Bundle) -> None:
    card, record = (default.path / "MODEL_CARD.md").read_text(), default.manifest.training
    assert record is not None
    assert f"Test accuracy **{record['test_accuracy']:.2%}**" in card
    assert all(
        f"| **{label}** | {' | '.join(map(str, row))} |" in card
        for label, row in zip(record["labels"], record["confusion"], strict=True)
    )


def test_its_checkpoint_is_in_the_repository_and_is_its_source(default: Bundle) -> None:
    record = json.loads((ROOT / "checkpoints" / "default" / "training.json").read_text())
    assert record == default.manifest.training


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("images", "tolerance"), [(1_000, 0.035), pytest.param(10_000, 1e-3, marks=pytest.mark.slow)])
def test_served_accuracy_is_the_trained_accuracy(
    default: Bundle, images: int, tolerance: float, precision: Precision
) -> None:
    """Test images through decoder and engine: of all, within one in a thousand of what torch counted (fp32) or the export did, which lost at most half a point;
    of a part, within three standard deviations."""
    path = CIFAR10
    if not path.exists():
        pytest.skip("the test images are not beside the repository")
    with np.load(path, allow_pickle=False) as arrays:
        encoded, offsets, classes = (arrays[f"test_{name}"] for name in ("jpeg", "offsets", "labels"))
    try:
        engine = open_engine(default, EngineOptions(precision=precision, max_batch=64)).engine
    except NoEngineError as error:  # bf16, on a CPU without it
        pytest.skip(str(error))
    decoder = Decoder(default.manifest.preprocessing)
    pixels = np.stack([decoder.decode(encoded[a:b].tobytes()) for a, b in itertools.pairwise(offsets[: images + 1])])
    predicted = np.concatenate([engine.run(0, part).logits.argmax(1) for part in np.array_split(pixels, images // 50)])
    engine.close()
    assert default.manifest.training is not None
    expected = default.manifest.training["test_accuracy"]
    if precision != "fp32":
        evaluation_images = next(each.evaluation for each in default.manifest.artifacts if each.precision == precision)
        assert evaluation_images is not None
        assert evaluation_images.accuracy is not None
        assert evaluation_images.images == 10_000
        assert evaluation_images.loss <= 0.5
        expected = evaluation_images.accuracy
    assert (predicted == classes[:images]).mean() == pytest.approx(expected, abs=tolerance)


def test_it_is_served_when_nothing_else_is_asked_for(default_server: Server, default: Bundle) -> None:
    with httpx.Client(base_url=default_server.url) as client:
        model = client.get("/v1/model").json()
    assert (model["name"], model["version"]) == (default.manifest.name, default.manifest.version)
    assert len(model["labels"]) == 10
