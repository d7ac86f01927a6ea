"""POST /v1/classify on a real server: results, input formats, errors per image and load shedding."""

from __future__ import annotations

import base64
import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from tests.support.http import classify, metric
from tests.support.images import encoded, png_header, random_image
from tests.support.networks import TINY, checkpoint
from tests.support.server import start_server
from vitserve.export.build_bundle import build_bundle
from vitserve.model.arrays import Floats, softmax
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import Decoder
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import open_engine
from vitserve.service.http_worker.classifiers.classes import most_probable

IMAGE = encoded(random_image())
GRAY_16_BIT = np.arange(0, 65536, 16).astype(np.uint16).reshape(64, 64)


def probabilities(result: dict[str, Any]) -> list[float]:
    """In the order of the classes."""
    predictions = sorted(result["predictions"], key=lambda prediction: prediction["index"])
    return [prediction["probability"] for prediction in predictions]


def classify_in_all_formats(client: httpx.Client, images: list[bytes]) -> list[Floats]:
    """[images, classes] for raw bodies, one multipart form, and one JSON body."""
    raw = [classify(client, image, top_k=7).json()["results"][0] for image in images]
    form = client.post("/v1/classify", params={"top_k": 7}, files=[("image", ("name", image)) for image in images])
    body = {"images": [base64.b64encode(image).decode() for image in images], "top_k": 7}
    json_body = client.post("/v1/classify", json=body)
    return [
        np.array([probabilities(result) for result in results], np.float32)
        for results in (raw, form.json()["results"], json_body.json()["results"])
    ]


def assert_formats_agree(raw: Floats, form: Floats, json_body: Floats) -> None:
    np.testing.assert_allclose(form, raw, atol=1e-6)
    np.testing.assert_allclose(json_body, raw, atol=1e-6)
    np.testing.assert_allclose(raw.sum(1), 1, atol=1e-6)


def test_the_response_has_sorted_predictions(client: httpx.Client) -> None:
    response = classify(client, IMAGE)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"model", "version", "results"}
    (result,) = response.json()["results"]
    assert len(result["predictions"]) == 5
    assert result["predictions"][0].keys() == {"label", "index", "probability"}
    ordered = [prediction["probability"] for prediction in result["predictions"]]
    assert ordered == sorted(ordered, reverse=True)
    assert all(prediction["label"] == f"class {prediction['index']}" for prediction in result["predictions"])


def test_all_input_formats_agree_with_the_engine(client: httpx.Client, bundle: Bundle) -> None:
    images = [encoded(random_image(seed=seed), "JPEG") for seed in range(20)]
    raw, form, json_body = classify_in_all_formats(client, images)
    assert_formats_agree(raw, form, json_body)
    engine = open_engine(bundle, EngineOptions()).engine
    decoder = Decoder(bundle.manifest.preprocessing)
    expected = softmax(engine.run(0, np.stack([decoder.decode(image) for image in images])).logits)
    engine.close()
    np.testing.assert_allclose(raw, expected, atol=1e-5)


def test_photos_agree_in_all_input_formats(client: httpx.Client, photos: list[Path]) -> None:
    assert_formats_agree(*classify_in_all_formats(client, [photo.read_bytes() for photo in photos]))


def test_concurrent_requests_get_their_own_results(client: httpx.Client) -> None:
    images = [encoded(random_image(seed=seed)) for seed in range(40)]
    expected = [probabilities(classify(client, image, top_k=7).json()["results"][0]) for image in images]
    with ThreadPoolExecutor(16) as pool:
        bodies = list(pool.map(lambda index: classify(client, images[index % 40], top_k=7).json(), range(400)))
    for index, body in enumerate(bodies):
        np.testing.assert_allclose(probabilities(body["results"][0]), expected[index % 40], atol=1e-6)


def test_an_invalid_image_among_several_has_its_own_error(client: httpx.Client) -> None:
    response = client.post(
        "/v1/classify",
        files=[
            ("a", IMAGE),
            ("b", b"not an image"),
            ("c", IMAGE[:-40]),
            ("d", png_header(9000, 9000)),
            ("e", IMAGE),
        ],
    )
    assert response.status_code == 200
    results = response.json()["results"]
    codes = [result.get("error", {}).get("code") for result in results]
    assert codes == [None, "not_an_image", "damaged_image", "image_too_large", None]
    assert probabilities(results[0]) == probabilities(results[4])


def test_invalid_base64_among_several_has_its_own_error(client: httpx.Client) -> None:
    response = client.post("/v1/classify", json={"images": ["%%%", 7, base64.b64encode(IMAGE).decode()]})
    codes = [result.get("error", {}).get("code") for result in response.json()["results"]]
    assert codes == ["bad_request", "bad_request", None]


def test_server_timing_has_the_stages(client: httpx.Client) -> None:
    timing = classify(client, IMAGE).headers["server-timing"]
    assert re.fullmatch(r"read;dur=[\d.]+, decode;dur=[\d.]+, queue;dur=[\d.]+, inference;dur=[\d.]+", timing)


@given(values=arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([0.0, 0.125, 0.25, 0.5])), data=st.data())
def test_most_probable_sorts_and_breaks_ties_by_index(values: Floats, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    indices = most_probable(values, count)
    assert indices == sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]
    assert {type(index) for index in indices} == {int}


def test_labels_may_have_any_characters(tmp_path: Path) -> None:
    labels = ("Möwe", "猫", 'so-called "bird"', "back\\slash", "\t", "🦆", "plain")
    build_bundle(dataclasses.replace(checkpoint(), labels=labels), tmp_path / "bundle", name="labels")
    running = start_server("--bundle", str(tmp_path / "bundle"))
    with httpx.Client(base_url=running.url, timeout=60) as client:
        predictions = classify(client, IMAGE, top_k=7).json()["results"][0]["predictions"]
    assert {prediction["index"]: prediction["label"] for prediction in predictions} == dict(enumerate(labels))
    assert running.stop() == 0


@pytest.mark.parametrize(
    "image",
    [
        encoded(Image.new("RGB", (1, 1), "red")),
        encoded(random_image().convert("CMYK"), "JPEG"),
        encoded(Image.fromarray(GRAY_16_BIT)),
        encoded(random_image(), "GIF", save_all=True, append_images=[random_image(seed=1)]),
        encoded(random_image(), "WEBP"),
        encoded(random_image(), "BMP"),
        encoded(random_image(), "TIFF", compression="tiff_lzw"),
    ],
    ids=["1x1", "cmyk", "16-bit", "animated", "webp", "bmp", "tiff"],
)
def test_unusual_images_are_classified(client: httpx.Client, image: bytes) -> None:
    response = client.post("/v1/classify", content=image, headers={"content-type": "application/octet-stream"})
    assert response.status_code == 200, response.text


def test_overload_is_rejected_with_retry_after(bundle: Bundle) -> None:
    """Forms with more images than there are slots. Images without a slot are rejected before they are decoded."""
    running = start_server("--bundle", str(bundle.path), "--slots", "8", "--max-images", "8")
    files = [("image", encoded(random_image(1200, 900)))] * 8
    try:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            with ThreadPoolExecutor(12) as pool:
                responses = list(pool.map(lambda _: client.post("/v1/classify", files=files), range(12)))
            assert {response.status_code for response in responses} <= {200, 429}
            results = [result for each in responses if each.status_code == 200 for result in each.json()["results"]]
            errors = [result["error"] for result in results if "error" in result]
            rejected = [response for response in responses if response.status_code == 429]
            assert {error["code"] for error in errors} <= {"overloaded"}
            assert errors or rejected
            assert all(int(response.headers["retry-after"]) >= 1 for response in rejected)
            assert all(response.json()["retry_after_seconds"] >= 0 for response in rejected)
            assert metric(client, "vitserve_images_shed_total") == len(errors) + 8 * len(rejected)
            assert metric(client, "vitserve_images_in_flight") == 0
            assert classify(client, IMAGE).status_code == 200
    finally:
        assert running.stop() == 0


def test_a_deadline_that_cannot_be_met_is_reported(client: httpx.Client) -> None:
    """64 images with a deadline of 1 ms: at least one is rejected or expires, and none waits forever."""
    form = [("image", encoded(random_image(800, 600)))] * 64
    response = client.post("/v1/classify", params={"timeout_ms": 1}, files=form)
    results = response.json().get("results", [{"error": response.json()}])
    codes = {result["error"]["code"] for result in results if "error" in result}
    assert codes
    assert codes <= {"overloaded", "deadline_exceeded"}


@pytest.mark.parametrize("classes", [1, 3], ids=["one logit", "independent labels"])
def test_a_model_with_a_sigmoid_is_served_with_it(tmp_path: Path, classes: int) -> None:
    config = dataclasses.replace(TINY, classes=classes)
    original = dataclasses.replace(checkpoint(config), activation="sigmoid")
    bundle = build_bundle(original, tmp_path / "bundle", name="sigmoid", precisions=[])
    running = start_server("--bundle", str(bundle.path), "--precision", "fp32")
    try:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            served = probabilities(classify(client, IMAGE, top_k=classes).json()["results"][0])
            assert client.get("/v1/model").json()["activation"] == "sigmoid"
        engine = open_engine(bundle, EngineOptions(precision="fp32")).engine
        logits = engine.run(0, Decoder(bundle.manifest.preprocessing).decode(IMAGE)[None]).logits
        engine.close()
        np.testing.assert_allclose(served, 1 / (1 + np.exp(-logits[0])), atol=1e-5)
    finally:
        assert running.stop() == 0
