"""Responses of POST /v1/classify as bytes. The parts that depend on the model only are encoded once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from pydantic_core import to_json

from vitserve.model.arrays import Floats
from vitserve.service import errors
from vitserve.service.http_worker.dispatch.image_job import ImageResult
from vitserve.service.ipc.model_info import ModelInfo

_MAX_SELECTED = 16  # for so few of a thousand classes, repeated argmax is faster than sorting

Outcome = ImageResult | errors.ServiceError


class Response(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]  # without Content-Length
    body: bytes


def problem(error: errors.ServiceError) -> Response:
    headers = [(name.encode(), value.encode()) for name, value in error.headers().items()]
    return Response(error.status, [(b"content-type", b"application/problem+json"), *headers], error.body())


class ResponseEncoder:
    """Encodes the results of one model."""

    def __init__(self, model_info: ModelInfo) -> None:
        model = to_json({"model": model_info.name, "version": model_info.version, "results": []})
        self._begin = model.removesuffix(b"]}")
        self._classes = [
            to_json({"label": label, "index": index}).removesuffix(b"}") + b',"probability":'
            for index, label in enumerate(model_info.labels)
        ]

    def classification(self, outcomes: Sequence[Outcome], top_k: int, read_seconds: float) -> Response:
        """``outcomes`` has one entry per image, in the order of the request."""
        results = b",".join([self._result(outcome, top_k) for outcome in outcomes])
        headers = [
            (b"content-type", b"application/json"),
            (b"server-timing", server_timing(read_seconds, outcomes)),
        ]
        return Response(200, headers, b"%b%b]}" % (self._begin, results))

    def _result(self, outcome: Outcome, top_k: int) -> bytes:
        if isinstance(outcome, errors.ServiceError):
            return json.dumps({"error": outcome.problem()}).encode()
        probabilities = outcome.probabilities
        indices = most_probable(probabilities, top_k)
        predictions = [
            b"%b%a}" % (self._classes[index], probability)
            for index, probability in zip(indices, probabilities[indices].tolist(), strict=True)
        ]
        return b'{"predictions":[%b]}' % b",".join(predictions)


def most_probable(probabilities: Floats, count: int) -> list[int]:
    """Indices of the ``count`` largest probabilities, largest first. Ties go to the lower index."""
    if count > _MAX_SELECTED or len(probabilities) <= 4 * _MAX_SELECTED:
        order: list[int] = (-probabilities).argsort(kind="stable")[:count].tolist()
        return order
    remaining, indices = probabilities.copy(), []
    for _ in range(count):
        indices.append(int(remaining.argmax()))
        remaining[indices[-1]] = -1
    return indices


def server_timing(read_seconds: float, outcomes: Sequence[Outcome]) -> bytes:
    """A W3C Server-Timing header in milliseconds. With several images, the slowest of each stage."""
    results = [outcome for outcome in outcomes if isinstance(outcome, ImageResult)]
    if not results:
        return b"read;dur=%.3f" % (read_seconds * 1000)
    decode = max([result.decode_seconds for result in results])
    queue = max([result.queue_seconds for result in results])
    inference = max([result.inference_seconds for result in results])
    return b"read;dur=%.3f, decode;dur=%.3f, queue;dur=%.3f, inference;dur=%.3f" % (
        read_seconds * 1000,
        decode * 1000,
        queue * 1000,
        inference * 1000,
    )
