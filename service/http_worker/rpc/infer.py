"""ModelInfer: a message becomes images, and their results become a message. The rules are those of HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vitserve.service import errors
from vitserve.service.http_worker.inference.options import whole_number
from vitserve.service.http_worker.inference.request_parsing import (
    DEFAULT_PRIORITY,
    PRIORITY_HEADER,
    Headers,
    ImageRequest,
    RequestHead,
)
from vitserve.service.http_worker.inference.response import Outcome, Response, ResponseEncoder, server_timing
from vitserve.service.http_worker.open_inference.description import check_model
from vitserve.service.http_worker.open_inference.infer import (
    PARAMETERS,
    Requested,
    checked_input,
    count_predictions,
    images_of,
    members,
    outputs_of,
    priority_of,
    requested_outputs,
    short_text,
    timeout_of,
)
from vitserve.service.http_worker.open_inference.tensors import Input
from vitserve.service.http_worker.rpc.messages import INFERENCE, DecodeError, message_class
from vitserve.service.http_worker.rpc.wire import check_size, malformed
from vitserve.service.settings import Settings

DEADLINE_HEADER = b"grpc-timeout"  # of gRPC over HTTP/2, which the library replaces by a deadline
MEDIA_TYPE = "application/grpc"
_PARSED_ON_LOOP = 65_536  # bytes
_LONGEST_MS = 3_600_000

_Request, _Response = message_class("inference.ModelInferRequest"), message_class("inference.ModelInferResponse")


class Infer:
    """An Operation. Bodies are messages; that of an error is its text."""

    route = f"/{INFERENCE}/ModelInfer"

    def parse_head(self, query: bytes, headers: Headers, settings: Settings) -> RequestHead:
        """``headers``: DEADLINE_HEADER has milliseconds."""
        priority, options, milliseconds = DEFAULT_PRIORITY, dict[str, Any](), settings.timeout_ms
        for name, value in headers:
            if name == DEADLINE_HEADER:
                milliseconds = options["deadline_ms"] = max(1, min(int(value), _LONGEST_MS))
            elif name == PRIORITY_HEADER.lower().encode():
                priority = whole_number(PRIORITY_HEADER, value.decode("latin-1"), 0, 9)
        return RequestHead(MEDIA_TYPE, MEDIA_TYPE, "", None, options, milliseconds, priority)

    def takes_long(self, head: RequestHead, chunks: list[bytes], length: int) -> bool:
        return length > _PARSED_ON_LOOP

    def parse_body(
        self, head: RequestHead, chunks: list[bytes], settings: Settings, encoder: ResponseEncoder
    ) -> ImageRequest:
        message = _parsed(chunks.pop())
        check_model(encoder.model_info, message.model_name, message.model_version)
        parameters = members(_values(message.parameters), "parameters", PARAMETERS)
        outputs = [{"name": output.name, "parameters": _values(output.parameters)} for output in message.outputs]
        requested = requested_outputs({"outputs": outputs}, parameters, encoder.model_info)
        images = images_of(_inputs(message), settings, encoder.model_info)
        timeout = timeout_of(parameters)
        return ImageRequest(
            images,
            head.timeout_ms if timeout is None else min(timeout, head.options.get("deadline_ms", timeout)),
            any(output.name == "embedding" for output in requested),
            partial(_response, short_text(message.id, "id"), requested),
            priority_of(parameters, head.priority),
        )

    def problem(self, error: errors.ServiceError) -> Response:
        return error_response(error)


def error_response(error: errors.ServiceError) -> Response:
    """With the headers of HTTP, and the exact time for gRPC's own retries (gRFC A6)."""
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers().items()]
    if isinstance(error, errors.OverloadedError):
        headers.append((b"grpc-retry-pushback-ms", b"%d" % max(1, round(error.retry_after_seconds * 1000))))
    return Response(error.status, headers, f"{error.code}: {error.detail}".encode())


def _parsed(body: bytes) -> Any:
    if len(body) > _PARSED_ON_LOOP:
        check_size(body)
    try:
        return _Request.FromString(body)
    except DecodeError:
        raise malformed() from None


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter without a value is None, which no option allows."""
    chosen = ((name, value, value.WhichOneof("parameter_choice")) for name, value in parameters.items())
    return {name: getattr(value, kind) if kind else None for name, value, kind in chosen}


def _inputs(message: Any) -> list[Input]:
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise errors.BadRequestError(
            f"raw_input_contents has {len(raw)} elements; it must have one for each of the {len(message.inputs)} inputs"
        )
    inputs = []
    for index, tensor in enumerate(message.inputs):
        name, shape = checked_input(tensor.name, list(tensor.shape))
        members(_values(tensor.parameters), f"parameters of input {name!r}", ())
        if raw and tensor.HasField("contents"):
            raise errors.BadRequestError(f"input {name!r} has contents, and raw_input_contents has values too")
        typed = tensor.contents.bytes_contents if tensor.datatype == "BYTES" else tensor.contents.uint_contents
        content = memoryview(raw[index]) if raw else None
        inputs.append(Input(name, tensor.datatype, shape, list(typed), content))
    return inputs


def _response(
    request_id: str,
    requested: Sequence[Requested],
    encoder: ResponseEncoder,
    outcomes: Sequence[Outcome],
    read_seconds: float,
) -> Response:
    info = encoder.model_info
    count_predictions(encoder, requested, outcomes)
    in_binary = [output._replace(binary=True) for output in requested]
    encoded = [output.encode() for output in outputs_of(in_binary, outcomes, info.labels)]
    message = _Response(
        model_name=info.name,
        model_version=info.version,
        id=request_id,
        outputs=[{name: entry[name] for name in ("name", "datatype", "shape")} for entry, _ in encoded],
        raw_output_contents=[content for _, content in encoded],
    )
    headers = [(b"server-timing", server_timing(read_seconds, outcomes))]
    return Response(200, headers, message.SerializeToString())


INFER = Infer()
