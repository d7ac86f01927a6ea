"""POST /v1/embed, and embeddings of POST /v1/classify, on a real server."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.http import classify, metric
from tests.support.images import encoded, random_image
from vitserve.model.arrays import Floats
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import Decoder
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import open_engine

IMAGES = [encoded(random_image(seed=seed), "JPEG") for seed in range(5)]
FORM = [("image", ("name", image)) for image in IMAGES]


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> Floats:
    """Of the engine, [images, width]."""
    decoder, engine = Decoder(bundle.manifest.preprocessing), open_engine(bundle, EngineOptions()).engine
    try:
        return engine.run(0, np.stack([decoder.decode(image) for image in IMAGES])).embedding
    finally:
        engine.close()


def embeddings(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.json().keys() == {"model", "version", "results"}
    return [result["embedding"] for result in response.json()["results"]]


def test_all_input_formats_give_the_embedding_of_the_engine(client: httpx.Client, expected: Floats) -> None:
    json_body = {"images": [base64.b64encode(image).decode() for image in IMAGES]}
    raw = [embeddings(client.post("/v1/embed", content=image))[0] for image in IMAGES]
    form = embeddings(client.post("/v1/embed", files=FORM))
    for actual in (raw, form, embeddings(client.post("/v1/embed", json=json_body))):
        np.testing.assert_allclose(np.array(actual), expected, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_base64_has_little_endian_values(client: httpx.Client, expected: Floats, dtype: str, tolerance: float) -> None:
    response = client.post("/v1/embed", params={"encoding": "base64", "dtype": dtype}, files=FORM)
    kind = np.dtype(dtype).newbyteorder("<")
    actual = [np.frombuffer(base64.b64decode(text), kind) for text in embeddings(response)]
    np.testing.assert_allclose(np.array(actual), expected, atol=tolerance)


def test_normalized_embeddings_have_a_norm_of_1(client: httpx.Client, expected: Floats) -> None:
    actual = np.array(embeddings(client.post("/v1/embed", params={"normalize": "true"}, files=FORM)))
    np.testing.assert_allclose(actual, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_classify_returns_embeddings_on_request(client: httpx.Client, expected: Floats) -> None:
    plain = classify(client, IMAGES[0]).json()["results"][0]
    (result,) = classify(client, IMAGES[0], embedding="true").json()["results"]
    np.testing.assert_allclose(result.pop("embedding"), expected[0], atol=1e-5)
    assert result == plain


def test_an_image_that_cannot_be_embedded_has_an_error(client: httpx.Client) -> None:
    response = client.post("/v1/embed", files=[FORM[0], ("image", ("name", b"no image"))])
    first, second = response.json()["results"]
    assert first.keys() == {"embedding"}
    assert second["error"]["code"] == "not_an_image"


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("embed", {"dtype": "float16"}, "dtype is float16, which needs encoding=base64"),
        ("embed", {"dtype": "int8"}, "dtype is 'int8'; it must be float32 or float16"),
        ("embed", {"encoding": "hex"}, "encoding is 'hex'; it must be list or base64"),
        ("embed", {"normalize": "maybe"}, "normalize is 'maybe'; it must be true or false"),
        ("embed", {"top_k": "1"}, "unknown query parameter 'top_k'; allowed: timeout_ms, normalize, encoding, dtype"),
        ("classify", {"normalize": "true"}, "normalize has no effect without embedding=true"),
    ],
)
def test_wrong_options_are_named(client: httpx.Client, path: str, options: dict[str, str], message: str) -> None:
    response = client.post(f"/v1/{path}", params=options, content=IMAGES[0])
    assert (response.status_code, response.json()["detail"]) == (400, message)


def test_requests_are_counted_by_route(client: httpx.Client) -> None:
    labels = {"route": "/v1/embed", "status": "200"}
    before = metric(client, "vitserve_requests_total", **labels)
    client.post("/v1/embed", content=IMAGES[0])
    assert metric(client, "vitserve_requests_total", **labels) == before + 1
