"""Responses with results of images, as bytes. The parts that depend on the model only are encoded once."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from pydantic_core import to_json

from vitserve.model.arrays import Floats
from vitserve.service import errors
from vitserve.service.http_worker.classifiers.classes import Classes
from vitserve.service.http_worker.classifiers.heads import Heads, ServedHead
from vitserve.service.http_worker.dispatch.image_job import ImageResult
from vitserve.service.http_worker.metric_buffer import MetricBuffer
from vitserve.service.ipc.model_info import ModelInfo

Outcome = ImageResult | errors.ServiceError
Encoding = Literal["list", "base64"]
Type = Literal["float32", "float16"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
TYPES: tuple[Type, ...] = get_args(Type)


class Response(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]  # without Content-Length
    body: bytes


def problem(error: errors.ServiceError) -> Response:
    headers = [(name.encode(), value.encode()) for name, value in error.headers().items()]
    return Response(error.status, [(b"content-type", b"application/problem+json"), *headers], error.body())


class EmbeddingFormat(NamedTuple):
    normalize: bool  # to a Euclidean norm of 1
    encoding: Encoding  # base64: of little-endian values
    dtype: Type

    def encode(self, embedding: Floats) -> bytes:
        """A JSON value. ``embedding``: float32 [width]."""
        if self.normalize:
            embedding = embedding / (float(np.linalg.norm(embedding)) or 1.0)
        if self.encoding == "list":
            return to_json(embedding.tolist())
        return b'"%b"' % base64.b64encode(embedding.astype("<f4" if self.dtype == "float32" else "<f2").tobytes())


class ResponseEncoder:
    """Encodes the results of one model."""

    def __init__(self, model_info: ModelInfo, heads: Heads, metrics: MetricBuffer | None = None) -> None:
        """``metrics``: None if predictions are not counted."""
        self.model_info, self.heads = model_info, heads
        model = to_json({"model": model_info.name, "version": model_info.version, "results": []})
        self._begin = model.removesuffix(b"]}")
        self.classes = Classes(model_info.labels, metrics)

    def classification(
        self,
        outcomes: Sequence[Outcome],
        read_seconds: float,
        *,
        top_k: int,
        embedding: EmbeddingFormat | None,
        head: ServedHead | None = None,
    ) -> Response:
        """``outcomes`` has one entry per image, in the order of the request. ``head``: None for that of the network.

        ``top_k``: 0 for no predictions.
        """
        results = [self._predictions(outcome, top_k, embedding, head) for outcome in outcomes]
        return self._response(results, outcomes, read_seconds)

    def embeddings(self, outcomes: Sequence[Outcome], read_seconds: float, *, embedding: EmbeddingFormat) -> Response:
        """As classification(), with embeddings only."""
        results = [
            b'{"embedding":%b}' % _embedding(outcome, embedding)
            if isinstance(outcome, ImageResult)
            else _failed(outcome)
            for outcome in outcomes
        ]
        return self._response(results, outcomes, read_seconds)

    def _response(self, results: list[bytes], outcomes: Sequence[Outcome], read_seconds: float) -> Response:
        headers = [
            (b"content-type", b"application/json"),
            (b"server-timing", server_timing(read_seconds, outcomes)),
        ]
        return Response(200, headers, b"%b%b]}" % (self._begin, b",".join(results)))

    def _predictions(
        self, outcome: Outcome, top_k: int, embedding: EmbeddingFormat | None, head: ServedHead | None
    ) -> bytes:
        if isinstance(outcome, errors.ServiceError):
            return _failed(outcome)
        if not top_k:
            predictions = b""
        elif head is None:
            predictions = self.classes.predictions(outcome.probabilities, top_k)
        else:
            assert outcome.embedding is not None
            predictions = head.classes.predictions(head.head.probabilities(outcome.embedding), top_k)
        if embedding is None:
            return b'{"predictions":[%b]}' % predictions
        return b'{"predictions":[%b],"embedding":%b}' % (predictions, _embedding(outcome, embedding))


def _failed(error: errors.ServiceError) -> bytes:
    return json.dumps({"error": error.problem()}).encode()


def _embedding(result: ImageResult, embedding: EmbeddingFormat) -> bytes:
    assert result.embedding is not None
    return embedding.encode(result.embedding)


def stage_milliseconds(read_seconds: float, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Duration by stage. With several images, the slowest of each stage."""
    results = [outcome for outcome in outcomes if isinstance(outcome, ImageResult)]
    stages = {"read": read_seconds * 1000}
    if results:
        stages["decode"] = max([result.decode_seconds for result in results]) * 1000
        stages["queue"] = max([result.queue_seconds for result in results]) * 1000
        stages["inference"] = max([result.inference_seconds for result in results]) * 1000
    return stages


def server_timing(read_seconds: float, outcomes: Sequence[Outcome]) -> bytes:
    """A W3C Server-Timing header in milliseconds."""
    stages = stage_milliseconds(read_seconds, outcomes).items()
    return ", ".join([f"{name};dur={milliseconds:.3f}" for name, milliseconds in stages]).encode()
