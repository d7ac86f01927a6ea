"""The operations on images that have a route: their options, their responses, and the form of their errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

from vitserve.service import errors
from vitserve.service.http_worker.inference import request_parsing
from vitserve.service.http_worker.inference.options import TIMEOUT, choice, flag, timeout_ms, whole_number
from vitserve.service.http_worker.inference.request_parsing import Headers, ImageRequest, RequestHead
from vitserve.service.http_worker.inference.response import (
    ENCODINGS,
    TYPES,
    EmbeddingFormat,
    Outcome,
    Response,
    ResponseEncoder,
    problem,
)
from vitserve.service.ipc.model_info import ModelInfo
from vitserve.service.settings import Settings

_EMBEDDING_OPTIONS = ("normalize", "encoding", "dtype")

Encode = Callable[[ResponseEncoder, Sequence[Outcome], float], Response]


class Operation(Protocol):
    """The methods raise ServiceError. They keep no state, so one object serves all requests."""

    @property
    def route(self) -> str:
        """As the metrics name it."""

    def parse_head(self, query: bytes, headers: Headers, settings: Settings) -> RequestHead: ...

    def takes_long(self, head: RequestHead, chunks: list[bytes], length: int) -> bool:
        """Whether parse_body() may take more than about a millisecond, so that it must not run on the event loop."""
        ...

    def parse_body(
        self, head: RequestHead, chunks: list[bytes], settings: Settings, model_info: ModelInfo
    ) -> ImageRequest:
        """``chunks`` are the body. Their memory is freed as they are joined."""
        ...

    def problem(self, error: errors.ServiceError) -> Response: ...


@dataclass(frozen=True)
class _OnImages:
    """With the formats of request_parsing.py, and problem responses."""

    route: str
    names: tuple[str, ...]  # of the options
    encoding: Callable[[Mapping[str, Any], int], tuple[bool, Encode]]  # options and classes → whether with embeddings

    def parse_head(self, query: bytes, headers: Headers, settings: Settings) -> RequestHead:
        return request_parsing.parse_head(query, headers, settings, self.names)

    def takes_long(self, head: RequestHead, chunks: list[bytes], length: int) -> bool:
        return request_parsing.takes_long(head, chunks, length)

    def parse_body(
        self, head: RequestHead, chunks: list[bytes], settings: Settings, model_info: ModelInfo
    ) -> ImageRequest:
        images, options = request_parsing.parse_body(head, chunks, settings, self.names)
        classes = len(model_info.labels)
        if not options:
            return ImageRequest(images, head.timeout_ms, *_default(self.encoding, classes), head.priority)
        return ImageRequest(images, timeout_ms(options, settings), *self.encoding(options, classes), head.priority)

    def problem(self, error: errors.ServiceError) -> Response:
        return problem(error)


@cache
def _default(encoding: Callable[[Mapping[str, Any], int], tuple[bool, Encode]], classes: int) -> tuple[bool, Encode]:
    """Without options, as most requests are."""
    return encoding({}, classes)


def _classification(options: Mapping[str, Any], classes: int) -> tuple[bool, Encode]:
    top_k = whole_number("top_k", options.get("top_k", min(5, classes)), 1, classes)
    embedding = _embedding_format(options) if flag("embedding", options.get("embedding", False)) else None
    for name in options if embedding is None else ():
        if name in _EMBEDDING_OPTIONS:
            raise errors.BadRequestError(f"{name} has no effect without embedding=true")
    return embedding is not None, partial(ResponseEncoder.classification, top_k=top_k, embedding=embedding)


def _embeddings(options: Mapping[str, Any], _: int) -> tuple[bool, Encode]:
    return True, partial(ResponseEncoder.embeddings, embedding=_embedding_format(options))


def _embedding_format(options: Mapping[str, Any]) -> EmbeddingFormat:
    encoding = choice("encoding", options.get("encoding", "list"), ENCODINGS)
    dtype = choice("dtype", options.get("dtype", "float32"), TYPES)
    if dtype != "float32" and encoding == "list":
        raise errors.BadRequestError(f"dtype is {dtype}, which needs encoding=base64")
    return EmbeddingFormat(flag("normalize", options.get("normalize", False)), encoding, dtype)


CLASSIFY = _OnImages("/v1/classify", ("top_k", TIMEOUT, "embedding", *_EMBEDDING_OPTIONS), _classification)
EMBED = _OnImages("/v1/embed", (TIMEOUT, *_EMBEDDING_OPTIONS), _embeddings)
