"""The Open Inference Protocol on a real server: Triton's own client, and requests that no client sends."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.support.http import classify, metric
from tests.support.images import encoded, random_image
from tests.support.server import Server
from vitserve.model.arrays import Pixels
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import Decoder

IMAGES = [encoded(random_image(seed=seed), "JPEG") for seed in range(4)]
NAME = "tiny"
INFER = f"/v2/models/{NAME}/infer"


@pytest.fixture(scope="module")
def client_of_triton(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


def image_input(shape: list[int], images: list[bytes] = IMAGES) -> triton.InferInput:
    tensor = triton.InferInput("image", shape, "BYTES")
    tensor.set_data_from_numpy(np.array(images, object).reshape(shape))
    return tensor


def pixel_input(pixels: Pixels, binary: bool) -> triton.InferInput:
    tensor = triton.InferInput("pixels", pixels.shape, "UINT8")
    tensor.set_data_from_numpy(pixels, binary_data=binary)
    return tensor


def expected_probabilities(client: httpx.Client) -> np.ndarray[Any, np.dtype[np.float32]]:
    rows = [classify(client, image, top_k=7).json()["results"][0]["predictions"] for image in IMAGES]
    ordered = [sorted(row, key=lambda prediction: prediction["index"]) for row in rows]
    return np.array([[prediction["probability"] for prediction in row] for row in ordered], np.float32)


@pytest.mark.parametrize("shape", [[4], [4, 1]])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_encoded_images_are_classified_and_embedded(
    client: httpx.Client, client_of_triton: triton.InferenceServerClient, shape: list[int], compression: str | None
) -> None:
    arguments = {"request_id": "a-1", "request_compression_algorithm": compression}
    result = client_of_triton.infer(NAME, [image_input(shape)], **arguments)
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected_probabilities(client), atol=1e-5)
    logits = result.as_numpy("logits")
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(softmax, result.as_numpy("probabilities"), atol=1e-5)
    embed = [client.post("/v1/embed", content=image).json()["results"][0]["embedding"] for image in IMAGES]
    np.testing.assert_allclose(result.as_numpy("embedding"), np.array(embed), atol=1e-5)
    answer = result.get_response()
    assert (answer["id"], answer["model_name"]) == ("a-1", NAME)


@pytest.mark.parametrize("binary", [True, False])
def test_pixels_are_taken_as_they_are(
    client: httpx.Client, client_of_triton: triton.InferenceServerClient, bundle: Bundle, binary: bool
) -> None:
    decoder = Decoder(bundle.manifest.preprocessing)
    pixels = np.stack([decoder.decode(image) for image in IMAGES])
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=binary)]
    result = client_of_triton.infer(NAME, [pixel_input(pixels, binary)], outputs=outputs)
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected_probabilities(client), atol=1e-5)
    assert [output["name"] for output in result.get_response()["outputs"]] == ["probabilities"]


@pytest.mark.parametrize("output", ["probabilities", "logits"])
def test_classifications_are_sorted_texts(client_of_triton: triton.InferenceServerClient, output: str) -> None:
    requested = [triton.InferRequestedOutput(output, class_count=3)]
    texts = client_of_triton.infer(NAME, [image_input([4])], outputs=requested).as_numpy(output)
    values = client_of_triton.infer(NAME, [image_input([4])]).as_numpy(output)
    assert texts.shape == (4, 3)
    for row, expected in zip(texts, values, strict=True):
        scores, indices, labels = zip(*(text.decode().split(":") for text in row), strict=True)
        assert [int(index) for index in indices] == (-expected).argsort(kind="stable")[:3].tolist()
        np.testing.assert_allclose(np.array(scores, float), np.sort(expected)[::-1][:3], atol=1e-5)
        assert labels == tuple(f"class {index}" for index in indices)


def test_the_asynchronous_client(server: Server) -> None:
    async def logits() -> Any:
        async with triton_aio.InferenceServerClient(server.url.removeprefix("http://")) as client:
            return (await client.infer(NAME, [image_input([4, 1])])).as_numpy("logits")

    assert asyncio.run(logits()).shape == (4, 7)


def test_the_server_and_the_model_are_described(client_of_triton: triton.InferenceServerClient) -> None:
    client = client_of_triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(NAME)
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata(NAME)
    assert client.is_model_ready(NAME, metadata["versions"][0])
    assert metadata["inputs"][1] == {"name": "pixels", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}
    sizes = {output["name"]: output["shape"] for output in metadata["outputs"]}
    assert sizes == {"probabilities": [-1, 7], "logits": [-1, 7], "embedding": [-1, 32]}
    config = client.get_model_config(NAME)
    assert [entry["dims"] for entry in config["output"]] == [[7], [7], [32]]
    assert client.get_model_repository_index()[0]["name"] == NAME


def test_statistics_count_images(client_of_triton: triton.InferenceServerClient) -> None:
    def counted() -> int:
        count: int = client_of_triton.get_inference_statistics(NAME)["model_stats"][0]["inference_count"]
        return count

    before = counted()
    client_of_triton.infer(NAME, [image_input([4])])
    assert counted() == before + 4


def test_images_in_json_are_base64(client: httpx.Client) -> None:
    texts = [base64.b64encode(image).decode() for image in IMAGES]
    body = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [4], "data": texts}]}
    outputs = {output["name"]: output for output in client.post(INFER, json=body).json()["outputs"]}
    assert outputs["probabilities"]["shape"] == [4, 7]
    actual = np.array(outputs["probabilities"]["data"]).reshape(4, 7)
    np.testing.assert_allclose(actual, expected_probabilities(client), atol=1e-5)


PIXELS = {"name": "pixels", "datatype": "UINT8", "shape": [1, 16, 16, 3], "data": [0] * 768}
TEXTS = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(IMAGES[0]).decode()]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "the body must be an object"),
        ({"inputs": [PIXELS], "model": 1}, "the body has 'model'; allowed: id, parameters, inputs, outputs"),
        ({"inputs": []}, "the request has 0 inputs; it must have one: image or pixels"),
        ({"inputs": [PIXELS, TEXTS]}, "the request has 2 inputs"),
        ({"inputs": [PIXELS | {"name": "x"}]}, "unknown input 'x'; allowed: image, pixels"),
        ({"inputs": [PIXELS | {"shape": [1, 3, 16, 16]}]}, "has shape [1, 3, 16, 16]; it must be [n, 16, 16, 3]"),
        ({"inputs": [PIXELS | {"shape": [0, 16, 16, 3]}]}, "the request has 0 images"),
        ({"inputs": [PIXELS | {"shape": [10**6, 16, 16, 3]}]}, "the request has 1000000 images"),
        ({"inputs": [PIXELS | {"shape": [-1]}]}, "the shape of input 'pixels' must be a list of one to four sizes"),
        ({"inputs": [PIXELS | {"shape": [1] * 99}]}, "the shape of input 'pixels' must be a list of one to four sizes"),
        ({"inputs": [PIXELS | {"datatype": "FP32"}]}, "input 'pixels' has datatype 'FP32'; it must be UINT8"),
        ({"inputs": [PIXELS | {"data": [0] * 767}]}, "input 'pixels' has 767 values; its shape needs 768"),
        ({"inputs": [PIXELS | {"data": [0.5] * 768}]}, "must have integers from 0 to 255"),
        ({"inputs": [PIXELS | {"data": [256] * 768}]}, "must have integers from 0 to 255"),
        ({"inputs": [PIXELS | {"data": [None] * 768}]}, "must have integers from 0 to 255"),
        ({"inputs": [TEXTS | {"data": [7]}]}, "must have images in base64; element 0 is no text"),
        ({"inputs": [TEXTS | {"data": ["%"]}]}, "element 0 of input 'image' is not valid base64"),
        ({"inputs": [TEXTS | {"shape": [2]}]}, "input 'image' has 1 elements; its shape needs 2"),
        ({"inputs": [TEXTS | {"data": [""] * 100_000}]}, "input 'image' has 100000 elements; its shape needs 1"),
        ({"inputs": [TEXTS | {"shape": [1, 2]}]}, "input 'image' has shape [1, 2]; it must be [n, 1]"),
        ({"inputs": [TEXTS | {"parameters": {"binary_data_size": 9}}]}, "9 bytes of binary data; the body has 0"),
        ({"inputs": [TEXTS], "outputs": [{"name": "y"}]}, "unknown output 'y'; allowed: probabilities, logits, embed"),
        ({"inputs": [TEXTS], "parameters": {"timeout": 0}}, "timeout is 0; it must be from 1"),
        ({"inputs": [TEXTS], "parameters": {"sequence_id": 4}}, "parameters has 'sequence_id'; allowed: timeout"),
    ],
)
def test_wrong_requests_are_explained(client: httpx.Client, body: Any, message: str) -> None:
    response = client.post(INFER, json=body)
    assert response.status_code == 400
    assert response.json().keys() == {"error"}
    assert message in response.json()["error"]


@pytest.mark.parametrize(
    ("header", "binary", "message"),
    [
        ("999999", b"", "Inference-Header-Content-Length is 999,999, but the body has"),
        ("x", b"", "Inference-Header-Content-Length must be an integer"),
        (None, struct.pack("<I", 5) + b"abcd", "the binary data of input 'image' ends within an element"),
        (None, bytes(30_000_000), "input 'image' has more than 1 elements; its shape needs 1"),
        (None, b"", "input 'image' has 0 elements; its shape needs 1"),
        (None, b"abc", "the binary data of input 'image' ends within an element"),
    ],
)
def test_wrong_binary_data_is_explained(client: httpx.Client, header: str | None, binary: bytes, message: str) -> None:
    text = b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":%d}}]}'
    text %= len(binary)
    headers = {"Inference-Header-Content-Length": header or str(len(text))}
    response = client.post(INFER, content=text + binary, headers=headers)
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_long_json_is_rejected_before_it_is_parsed(client: httpx.Client) -> None:
    body = b'{"inputs":[{"name":"pixels","data":[' + b"1," * 600_000 + b"1]}]}"
    response = client.post(INFER, content=body)
    assert response.status_code == 400
    assert "the JSON has more than 500,000 values; send tensors as binary data" in response.json()["error"]


def test_an_image_that_cannot_be_decoded_fails_the_request(client_of_triton: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="not_an_image"):
        client_of_triton.infer(NAME, [image_input([2], [IMAGES[0], b"no image"])])


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2/nothing", 404, "the path '/v2/nothing' does not exist"),
        ("GET", "/v2/models/other", 404, "unknown model 'other'; served: 'tiny'"),
        ("POST", "/v2/models/other/infer", 404, "unknown model 'other'; served: 'tiny'"),
        ("GET", "/v2/models/tiny/versions/7", 404, "unknown model 'tiny, version 7'; served: 'tiny'"),
        ("GET", "/v2/models/tiny/load", 404, "the path '/v2/models/tiny/load' does not exist"),
        ("GET", INFER, 405, "the path supports POST, not GET"),
        ("POST", "/v2", 405, "the path supports GET, not POST"),
    ],
)
def test_all_errors_have_the_form_of_the_protocol(
    client: httpx.Client, method: str, path: str, status: int, message: str
) -> None:
    response = client.request(method, path)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    assert response.json().keys() == {"error"}
    assert message in response.json()["error"]
    assert "x-request-id" in response.headers


def test_requests_are_counted_by_route(client: httpx.Client, client_of_triton: triton.InferenceServerClient) -> None:
    labels = {"route": "/v2/models/{name}/infer", "status": "200"}
    before = metric(client, "vitserve_requests_total", **labels)
    client_of_triton.infer(NAME, [image_input([4])])
    assert metric(client, "vitserve_requests_total", **labels) == before + 1
