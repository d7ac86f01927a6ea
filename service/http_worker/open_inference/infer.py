"""Inference with the Open Inference Protocol: a request becomes images, and their results become tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from pydantic_core import from_json, to_json

from vitserve.service import errors
from vitserve.service.http_worker.classifiers.classes import most_probable
from vitserve.service.http_worker.dispatch.decoding import PixelImage
from vitserve.service.http_worker.dispatch.image_job import ImageResult
from vitserve.service.http_worker.inference import request_parsing
from vitserve.service.http_worker.inference.content_coding import decoded
from vitserve.service.http_worker.inference.json_body import too_many_images
from vitserve.service.http_worker.inference.options import flag, whole_number
from vitserve.service.http_worker.inference.request_parsing import (
    DEFAULT_PRIORITY,
    Headers,
    ImageInput,
    ImageRequest,
    RequestHead,
)
from vitserve.service.http_worker.inference.response import (
    Outcome,
    Response,
    ResponseEncoder,
    server_timing,
)
from vitserve.service.http_worker.open_inference.tensors import Input, Output, message
from vitserve.service.ipc.model_info import ModelInfo
from vitserve.service.settings import Settings

OUTPUTS = ("probabilities", "logits", "embedding")
LENGTH_HEADER = b"inference-header-content-length"
# JSON with more values takes so long to parse that other requests would wait for the interpreter lock.
MAX_VALUES = 500_000
_PARSED_ON_LOOP = 65_536  # bytes
_MOST_DIMENSIONS = 4
_FIELDS = ("id", "parameters", "inputs", "outputs")
_OF_THE_PATH = ("model_name", "model_version")  # KServe's client repeats them in the body
PARAMETERS = ("timeout", "priority", "binary_data_output")


class Requested(NamedTuple):
    """An output that the client requests."""

    name: str
    binary: bool
    classification: int  # number of classes in place of values; 0 for values


class Infer:
    """An Operation. The handler of its route has compared the model's name with the path."""

    route = "/v2/models/{name}/infer"

    def parse_head(self, query: bytes, headers: Headers, settings: Settings) -> RequestHead:
        plain = [(name, value) for name, value in headers if name != b"content-type"]
        head = request_parsing.parse_head(query, [*plain, (b"content-type", b"application/json")], settings, ())
        for name, value in headers:
            if name == LENGTH_HEADER:
                text = value.decode("latin-1")
                head.options["json_bytes"] = whole_number("Inference-Header-Content-Length", text, 1, 1 << 40)
        return head

    def takes_long(self, head: RequestHead, chunks: list[bytes], length: int) -> bool:
        return bool(head.coding) or length > _PARSED_ON_LOOP

    def parse_body(
        self, head: RequestHead, chunks: list[bytes], settings: Settings, encoder: ResponseEncoder
    ) -> ImageRequest:
        body = request_parsing.joined(chunks, in_steps=True)
        if head.coding:
            body = decoded(body, head.coding, settings.max_body_bytes)
        json_bytes = head.options.get("json_bytes", len(body))
        if json_bytes > len(body):
            raise errors.BadRequestError(
                f"Inference-Header-Content-Length is {json_bytes:,}, but the body has {len(body):,} bytes"
            )
        request = _parsed(body, json_bytes)
        parameters = members(request.get("parameters", {}), "parameters", PARAMETERS)
        images = images_of(_inputs(request, memoryview(body)[json_bytes:]), settings, encoder.model_info)
        requested = requested_outputs(request, parameters, encoder.model_info)
        return ImageRequest(
            images,
            timeout_of(parameters) or settings.timeout_ms,
            any(output.name == "embedding" for output in requested),
            partial(_response, short_text(request.get("id", ""), "id"), requested),
            priority_of(parameters, head.priority),
        )

    def problem(self, error: errors.ServiceError) -> Response:
        return error_response(error)


def error_response(error: errors.ServiceError) -> Response:
    """As the protocol has it, with the status and the headers of all errors."""
    headers = [(name.encode(), value.encode()) for name, value in error.headers().items()]
    body = to_json({"error": f"{error.code}: {error.detail}"})
    return Response(error.status, [(b"content-type", b"application/json"), *headers], body)


# -- the request


def _parsed(body: bytes | bytearray, json_bytes: int) -> Mapping[str, Any]:
    if body.count(b",", 0, json_bytes) > MAX_VALUES:
        raise errors.BadRequestError(f"the JSON has more than {MAX_VALUES:,} values; send tensors as binary data")
    try:
        request = from_json(bytes(memoryview(body)[:json_bytes]))
    except ValueError as error:
        raise errors.BadRequestError(f"the body is not valid JSON: {str(error)[:200]}") from error
    if isinstance(request, dict):
        request = {name: value for name, value in request.items() if name not in _OF_THE_PATH}
    return members(request, "the body", _FIELDS)


def members(value: Any, name: str, allowed: Sequence[str]) -> Mapping[str, Any]:
    """An object of JSON that has only ``allowed`` members."""
    if not isinstance(value, dict):
        raise errors.BadRequestError(f"{name} must be an object")
    for member in value:
        if member not in allowed:
            raise errors.BadRequestError(f"{name} has {member[:100]!r}; allowed: {', '.join(allowed)}")
    return value


def _objects(request: Mapping[str, Any], name: str, allowed: Sequence[str]) -> list[Mapping[str, Any]]:
    values = request.get(name, [])
    if not isinstance(values, list):
        raise errors.BadRequestError(f"{name} must be a list")
    return [members(value, f"an element of {name}", allowed) for value in values]


def short_text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise errors.BadRequestError(f"{name} must be a text of at most 1,000 characters")
    return value


def images_of(inputs: Sequence[Input], settings: Settings, model_info: ModelInfo) -> Sequence[ImageInput]:
    if len(inputs) != 1:
        raise errors.BadRequestError(f"the request has {len(inputs)} inputs; it must have one: image or pixels")
    (value,) = inputs
    count = value.shape[0]
    if not 1 <= count <= settings.max_images:
        raise too_many_images(str(count), settings.max_images)
    if value.name == "pixels":
        value.check("UINT8", (None, *model_info.preprocessing.shape))
        return [PixelImage(pixels) for pixels in value.pixels()]
    value.check("BYTES", (None,) if len(value.shape) == 1 else (None, 1))
    return value.elements()


def _inputs(request: Mapping[str, Any], binary: memoryview) -> list[Input]:
    inputs, position = [], 0
    for member in _objects(request, "inputs", ("name", "shape", "datatype", "parameters", "data")):
        name, shape = checked_input(member.get("name"), member.get("shape"))
        parameters = members(member.get("parameters", {}), f"parameters of input {name!r}", ("binary_data_size",))
        content: memoryview | None = None
        if "binary_data_size" in parameters:
            size = whole_number("binary_data_size", parameters["binary_data_size"], 0, 1 << 40)
            content = binary[position : position + size]
            position += size
        elif "data" not in member:
            raise errors.BadRequestError(f"input {name!r} has neither data nor binary_data_size")
        inputs.append(Input(name, str(member.get("datatype")), shape, member.get("data"), content))
    if position != len(binary):
        raise errors.BadRequestError(f"the inputs have {position:,} bytes of binary data; the body has {len(binary):,}")
    return inputs


def checked_input(name: Any, shape: Any) -> tuple[str, tuple[int, ...]]:
    """The name and the shape of an input. Raises BadRequestError."""
    name = short_text(name, "the name of an input")
    if name not in ("image", "pixels"):
        raise errors.BadRequestError(f"unknown input {name[:100]!r}; allowed: image, pixels")
    sizes = shape[: _MOST_DIMENSIONS + 1] if isinstance(shape, list) else []
    if not 1 <= len(sizes) <= _MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < 1 << 31 for size in sizes):
        raise errors.BadRequestError(f"the shape of input {name!r} must be a list of one to four sizes")
    return name, tuple(sizes)


def output_names(model_info: ModelInfo) -> tuple[str, ...]:
    """A network without classifier has only embeddings."""
    return OUTPUTS if model_info.labels else ("embedding",)


def requested_outputs(
    request: Mapping[str, Any], parameters: Mapping[str, Any], model_info: ModelInfo
) -> list[Requested]:
    """All outputs unless the request names some."""
    allowed = output_names(model_info)
    binary = flag("binary_data_output", parameters.get("binary_data_output", False))
    requested = []
    for member in _objects(request, "outputs", ("name", "parameters")):
        name = short_text(member.get("name"), "the name of an output")
        if name not in allowed:
            raise errors.BadRequestError(f"unknown output {name[:100]!r}; allowed: {', '.join(allowed)}")
        options = members(
            member.get("parameters", {}), f"parameters of output {name!r}", ("binary_data", "classification")
        )
        classes = whole_number("classification", options.get("classification", 0), 0, 1 << 31)
        if classes and name == "embedding":
            raise errors.BadRequestError("the embedding is not a classification")
        requested.append(Requested(name, flag("binary_data", options.get("binary_data", binary)), classes))
    return requested or [Requested(name, binary, 0) for name in allowed]


def timeout_of(parameters: Mapping[str, Any]) -> int | None:
    """In milliseconds; None without one. The protocol has microseconds."""
    if "timeout" not in parameters:
        return None
    return max(1, whole_number("timeout", parameters["timeout"], 1, 3_600_000_000) // 1000)


def priority_of(parameters: Mapping[str, Any], of_header: int) -> int:
    """Triton's 1 is the most urgent, and 0 the default; 9 is our most urgent."""
    number = whole_number("priority", parameters.get("priority", 0), 0, 1 << 31)
    if number == 0:
        return of_header
    return max(0, 10 - number) if of_header == DEFAULT_PRIORITY else of_header


# -- the response


def _response(
    request_id: str,
    requested: Sequence[Requested],
    encoder: ResponseEncoder,
    outcomes: Sequence[Outcome],
    read_seconds: float,
) -> Response:
    info = encoder.model_info
    count_predictions(encoder, requested, outcomes)
    fields = {"model_name": info.name, "model_version": info.version} | ({"id": request_id} if request_id else {})
    body, json_bytes = message(fields, outputs_of(requested, outcomes, info.labels))
    headers = [(b"server-timing", server_timing(read_seconds, outcomes))]
    if json_bytes is None:
        headers.append((b"content-type", b"application/json"))
    else:
        headers += [(b"content-type", b"application/octet-stream"), (LENGTH_HEADER, b"%d" % json_bytes)]
    return Response(200, headers, body)


def count_predictions(encoder: ResponseEncoder, requested: Sequence[Requested], outcomes: Sequence[Outcome]) -> None:
    if any(output.name != "embedding" for output in requested):
        for outcome in outcomes:
            if isinstance(outcome, ImageResult):
                encoder.classes.count(outcome.probabilities)


def outputs_of(requested: Sequence[Requested], outcomes: Sequence[Outcome], labels: Sequence[str]) -> list[Output]:
    """Raises the error of the first image that has one: a tensor cannot have errors in it."""
    results = list[ImageResult]()
    for outcome in outcomes:
        if isinstance(outcome, errors.ServiceError):
            raise outcome
        results.append(outcome)
    return [_output(output, results, labels) for output in requested]


def _output(requested: Requested, results: Sequence[ImageResult], labels: Sequence[str]) -> Output:
    values = np.stack([getattr(result, requested.name) for result in results])
    if not requested.classification:
        return Output(requested.name, values, requested.binary)
    classes = min(requested.classification, len(labels))
    texts = [
        [f"{row[index]:f}:{index}:{labels[index]}".encode() for index in most_probable(row, classes)] for row in values
    ]
    return Output(requested.name, texts, requested.binary)


INFER = Infer()
