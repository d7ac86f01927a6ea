"""A bundle with calibrated probabilities: written by the export, and applied by the service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.bundles import SMALL, confident_checkpoint, random_images
from tests.support.images import encoded, random_image
from tests.support.server import Server, start_server
from vitserve.cli.main import app
from vitserve.export.artifacts import ExportError
from vitserve.export.build_bundle import build_bundle
from vitserve.model.arrays import softmax
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.evaluation import Images

COUNT = 240


def labeled() -> Images:
    """Random classes: the network knows nothing, so its confident probabilities are wrong."""
    classes = np.random.default_rng(0).integers(0, SMALL.classes, COUNT)
    return Images(random_images(COUNT).pixels, classes)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("calibrated") / "bundle"
    return build_bundle(confident_checkpoint(), path, name="calibrated", precisions=[], labeled_images=labeled())


@pytest.fixture(scope="module")
def server(calibrated: Bundle) -> Iterator[Server]:
    running = start_server("--bundle", str(calibrated.path))
    yield running
    assert running.stop() == 0


def test_the_bundle_states_what_the_calibration_showed(calibrated: Bundle) -> None:
    found = calibrated.manifest.probability_calibration
    assert found is not None
    assert found.temperature > 1.5
    assert (found.images, found.held_out) == (COUNT // 2, COUNT // 2)
    assert found.error_after < found.error_before
    shown = CliRunner().invoke(app, ["inspect", str(calibrated.path)], env={"COLUMNS": "300"}).output
    assert f"calibrated with the temperature {found.temperature:.3f}, fitted on 120 images" in shown


def test_the_service_applies_the_temperature_and_reports_it(server: Server, calibrated: Bundle) -> None:
    calibration = calibrated.manifest.probability_calibration
    assert calibration is not None
    image = encoded(random_image(SMALL.image_size, SMALL.image_size))
    with httpx.Client(base_url=server.url, timeout=60) as client:
        described = client.get("/v1/model").json()
        assert described["probability_calibration"]["temperature"] == calibration.temperature
        inputs = [{"name": "pixels", "datatype": "UINT8", "shape": [1, SMALL.image_size, SMALL.image_size, 3]}]
        pixels = np.asarray(random_image(SMALL.image_size, SMALL.image_size)).ravel().tolist()
        outputs = [{"name": "logits"}, {"name": "probabilities"}]
        body = {"inputs": [{**inputs[0], "data": pixels}], "outputs": outputs}
        answered = client.post(f"/v2/models/{described['name']}/infer", json=body).json()["outputs"]
        logits, probabilities = (np.array(output["data"], np.float32) for output in answered)
        np.testing.assert_allclose(probabilities, softmax(logits / calibration.temperature), rtol=1e-4)
        predictions = client.post("/v1/classify?top_k=1", content=image).json()["results"][0]["predictions"]
        assert predictions[0]["probability"] == pytest.approx(float(probabilities.max()), rel=1e-4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (random_images(4), "must lie in directories named after the labels"),
        (Images(random_images(4).pixels, np.zeros(4, np.int64)), "4 labeled images cannot calibrate"),
    ],
)
def test_unusable_images_are_rejected(tmp_path: Path, images: Images, message: str) -> None:
    steps: list[str] = []
    options: dict[str, Any] = {"name": "x", "precisions": [], "labeled_images": images, "progress": steps.append}
    with pytest.raises(ExportError, match=message):
        build_bundle(confident_checkpoint(), tmp_path / "bundle", **options)
    assert not steps, "before the minutes that an export takes"
    assert not (tmp_path / "bundle").exists()
