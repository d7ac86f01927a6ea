"""The Open Inference Protocol over gRPC: Triton's own client against a real server."""

from __future__ import annotations

import asyncio
import queue
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from tests.support.http import classify, metric
from tests.support.images import encoded, random_image
from tests.support.rpc import INFER, NAME, RpcService, image_input, method, rejection
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.preprocess import Decoder

IMAGES = [encoded(random_image(seed=seed), "JPEG") for seed in range(4)]


@pytest.fixture(scope="module")
def http(rpc: RpcService) -> Any:
    with httpx.Client(base_url=rpc.running.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def expected(http: httpx.Client) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The probabilities over HTTP: [images, classes]."""
    rows = [classify(http, image, top_k=7).json()["results"][0]["predictions"] for image in IMAGES]
    ordered = [sorted(row, key=lambda prediction: prediction["index"]) for row in rows]
    return np.array([[prediction["probability"] for prediction in row] for row in ordered], np.float32)


@pytest.fixture(scope="module")
def pixels(bundle: Bundle) -> Any:
    decoder = Decoder(bundle.manifest.preprocessing)
    return np.stack([decoder.decode(image) for image in IMAGES])


@pytest.mark.parametrize("shape", [[4], [4, 1]])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_encoded_images_have_all_outputs_and_the_id(
    client_of_triton: triton.InferenceServerClient, expected: Any, shape: list[int], compression: str | None
) -> None:
    images = [image_input(IMAGES, shape)]
    result = client_of_triton.infer(NAME, images, request_id="a-1", compression_algorithm=compression)
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected, atol=1e-5)
    logits = result.as_numpy("logits")
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(softmax, result.as_numpy("probabilities"), atol=1e-5)
    assert result.as_numpy("embedding").shape == (4, 32)
    assert (result.get_response().id, result.get_response().model_name) == ("a-1", NAME)


@pytest.mark.parametrize("kind", ["raw", "typed"])
@pytest.mark.parametrize("name", ["image", "pixels"])
def test_contents_may_be_raw_or_typed(channel: grpc.Channel, expected: Any, pixels: Any, name: str, kind: str) -> None:
    datatype, shape = ("BYTES", [4]) if name == "image" else ("UINT8", list(pixels.shape))
    tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    raw = b"".join(len(image).to_bytes(4, "little") + image for image in IMAGES)
    raw_contents = []
    if kind == "raw":
        raw_contents = [raw if name == "image" else pixels.tobytes()]
    elif name == "image":
        tensor["contents"] = {"bytes_contents": IMAGES}
    else:
        tensor["contents"] = {"uint_contents": pixels.reshape(-1).tolist()}
    request = service_pb2.ModelInferRequest(
        model_name=NAME, inputs=[tensor], outputs=[{"name": "probabilities"}], raw_input_contents=raw_contents
    )
    answer = service_pb2.ModelInferResponse.FromString(method(channel, INFER)(request.SerializeToString()))
    assert [output.name for output in answer.outputs] == ["probabilities"]
    values = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(answer.outputs[0].shape)
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_classifications_are_sorted_texts(client_of_triton: triton.InferenceServerClient, expected: Any) -> None:
    requested = [triton.InferRequestedOutput("probabilities", class_count=3)]
    texts = client_of_triton.infer(NAME, [image_input(IMAGES)], outputs=requested).as_numpy("probabilities")
    assert texts.shape == (4, 3)
    for row, values in zip(texts, expected, strict=True):
        scores, indices, labels = zip(*(text.decode().split(":") for text in row), strict=True)
        assert [int(index) for index in indices] == (-values).argsort(kind="stable")[:3].tolist()
        np.testing.assert_allclose(np.array(scores, float), np.sort(values)[::-1][:3], atol=1e-5)
        assert labels == tuple(f"class {index}" for index in indices)


def test_the_asynchronous_client_and_callbacks(rpc: RpcService, client_of_triton: Any, expected: Any) -> None:
    async def many() -> list[Any]:
        async with triton_aio.InferenceServerClient(rpc.address) as client:
            requests = [client.infer(NAME, [image_input([image])]) for image in IMAGES * 5]
            return [result.as_numpy("probabilities")[0] for result in await asyncio.gather(*requests)]

    np.testing.assert_allclose(asyncio.run(many()), np.tile(expected, (5, 1)), atol=1e-5)
    results: queue.Queue[Any] = queue.Queue()
    client_of_triton.async_infer(NAME, [image_input(IMAGES)], lambda result, error: results.put((result, error)))
    result, error = results.get(timeout=60)
    assert error is None
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected, atol=1e-5)


def test_the_server_and_the_model_are_described(
    client_of_triton: triton.InferenceServerClient, http: httpx.Client
) -> None:
    client = client_of_triton
    assert client.is_server_live()
    assert client.is_server_ready()
    version = client.get_model_metadata(NAME).versions[0]
    assert client.is_model_ready(NAME)
    assert client.is_model_ready(NAME, version)
    assert client.get_server_metadata(as_json=True) == http.get("/v2").json()
    metadata = client.get_model_metadata(NAME)
    assert [list(tensor.shape) for tensor in metadata.inputs] == [[-1, 1], [-1, 16, 16, 3]]
    assert {output.name: list(output.shape) for output in metadata.outputs} == {
        "probabilities": [-1, 7],
        "logits": [-1, 7],
        "embedding": [-1, 32],
    }
    config = client.get_model_config(NAME).config
    assert [list(entry.dims) for entry in config.output] == [[7], [7], [32]]
    assert config.dynamic_batching.preferred_batch_size
    assert client.get_model_repository_index().models[0].name == NAME


def test_statistics_count_images(client_of_triton: triton.InferenceServerClient) -> None:
    def counted() -> int:
        count: int = client_of_triton.get_inference_statistics(NAME).model_stats[0].inference_count
        return count

    before = counted()
    client_of_triton.infer(NAME, [image_input(IMAGES)])
    assert counted() == before + 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ({"model_name": "other"}, "NOT_FOUND", "unknown model 'other'; served: 'tiny'"),
        ({"model_version": "7"}, "NOT_FOUND", "unknown model 'tiny, version 7'; served: 'tiny'"),
        ({"outputs": [triton.InferRequestedOutput("y")]}, "INVALID_ARGUMENT", "unknown output 'y'; allowed: prob"),
        ({"timeout": 0}, "INVALID_ARGUMENT", "timeout is 0; it must be from 1"),
        ({"parameters": {"x": 1}}, "INVALID_ARGUMENT", "parameters has 'x'; allowed: timeout, priority"),
        ({"sequence_id": 4}, "INVALID_ARGUMENT", "allowed: timeout, priority"),
        ({"inputs": [image_input([IMAGES[0], b"no image"])]}, "INVALID_ARGUMENT", "not_an_image: "),
        ({"inputs": []}, "INVALID_ARGUMENT", "the request has 0 inputs; it must have one: image or pixels"),
        ({"inputs": [image_input(IMAGES * 17)]}, "INVALID_ARGUMENT", "the request has 68 images"),
    ],
)
def test_wrong_requests_are_explained(
    client_of_triton: triton.InferenceServerClient, arguments: dict[str, Any], code: str, message: str
) -> None:
    with pytest.raises(InferenceServerException) as raised:
        client_of_triton.infer(**{"model_name": NAME, "inputs": [image_input(IMAGES)]} | arguments)
    assert raised.value.status() == f"StatusCode.{code}"
    assert message in raised.value.message()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"raw_input_contents": []}, "input 'image' has 0 elements; its shape needs 1"),
        ({"raw_input_contents": [b"", b""]}, "raw_input_contents has 2 elements; it must have one for each of the 1"),
        ({"raw_input_contents": [b"\x05\0\0\0abcd"]}, "the binary data of input 'image' ends within an element"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}]}, "must be a list of one to four sizes"),
        ({"inputs": [{"name": "pixels", "datatype": "INT8", "shape": [1, 16, 16, 3]}]}, "it must be UINT8"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "contents": {}}]}, "values too"),
        ({"parameters": {"timeout": {}}}, "timeout must be an integer"),
        ({"id": "x" * 1001}, "id must be a text of at most 1,000 characters"),
    ],
)
def test_wrong_messages_are_explained(channel: grpc.Channel, fields: dict[str, Any], message: str) -> None:
    valid = {
        "model_name": NAME,
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]}],
        "raw_input_contents": [len(IMAGES[0]).to_bytes(4, "little") + IMAGES[0]],
    }
    request = service_pb2.ModelInferRequest(**valid | fields)
    failure = rejection(channel, INFER, request.SerializeToString())
    assert failure.code == "INVALID_ARGUMENT"
    assert message in failure.details


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        (INFER, "INVALID_ARGUMENT", "the message is not a ModelInferRequest"),
        ("/inference.GRPCInferenceService/ModelReady", "INVALID_ARGUMENT", "the message is not a ModelReadyRequest"),
        ("/grpc.health.v1.Health/Check", "INVALID_ARGUMENT", "the message is not a HealthCheckRequest"),
        ("/inference.GRPCInferenceService/Other", "UNIMPLEMENTED", ""),
        ("/grpc.health.v1.Health/Watch", "UNIMPLEMENTED", ""),
    ],
)
def test_malformed_messages_and_unknown_methods(channel: grpc.Channel, path: str, code: str, message: str) -> None:
    failure = rejection(channel, path, b"\xff\xff\xff")
    assert (failure.code, message in failure.details) == (code, True)


def test_health_is_checked(channel: grpc.Channel) -> None:
    check = method(channel, "/grpc.health.v1.Health/Check")
    serving = b"\x08\x01"  # field 1 is 1
    assert check(b"") == serving
    name = b"inference.GRPCInferenceService"
    assert check(b"\x0a" + bytes([len(name)]) + name) == serving
    failure = rejection(channel, "/grpc.health.v1.Health/Check", b"\x0a\x01x")
    assert (failure.code, "unknown service 'x'" in failure.details) == ("NOT_FOUND", True)


def test_requests_are_counted_and_logged(rpc: RpcService, http: httpx.Client, channel: grpc.Channel) -> None:
    labels = {"route": INFER, "status": "400"}
    before = metric(http, "vitserve_requests_total", **labels)
    failure = rejection(channel, INFER, b"\xff", metadata=[("x-request-id", "my-id-7")])
    assert failure.trailers["x-request-id"] == "my-id-7"
    eventually(lambda: metric(http, "vitserve_requests_total", **labels) == before + 1, "the request is counted")
    rpc.running.wait_for(rf'id=my-id-7 client=127\.0\.0\.1 method=POST path="{INFER}" status=400 code=bad_request')
