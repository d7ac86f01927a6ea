"""Requests over gRPC, as bytes: what a client library would not send can be sent too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import grpc
import numpy as np
import tritonclient.grpc as triton

from tests.support.server import Server

INFER = "/inference.GRPCInferenceService/ModelInfer"
NAME = "tiny"
MAX_BODY_BYTES = 3_000_000  # of the server


class RpcService(NamedTuple):
    running: Server
    address: str  # host and port


class Failure(NamedTuple):
    code: str
    details: str
    trailers: dict[str, Any]


def image_input(images: list[bytes], shape: list[int] | None = None) -> triton.InferInput:
    tensor = triton.InferInput("image", shape or [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, object).reshape(shape or [len(images)]))
    return tensor


def method(channel: grpc.Channel, path: str) -> Callable[..., bytes]:
    """Sends a message, and returns the response."""
    call: Any = channel.unary_unary(path)
    return cast(Callable[..., bytes], call)


def failure_of(error: Any) -> Failure:
    """``error``: of a call."""
    metadata = error.trailing_metadata() or ()
    return Failure(error.code().name, error.details() or "", dict(tuple(pair) for pair in metadata))


def rejection(channel: grpc.Channel, path: str, message: bytes, **options: Any) -> Failure:
    """The error of a request that fails. ``options``: of the call."""
    try:
        method(channel, path)(message, timeout=60, **options)
    except grpc.RpcError as error:
        return failure_of(error)
    raise AssertionError(f"{path} succeeded")
