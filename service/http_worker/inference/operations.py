"""The operations on images that have a route: their options, their responses, and the form of their errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

from vitserve.model.bundle.head import NO_HEAD
from vitserve.service import errors
from vitserve.service.http_worker.inference import request_parsing
from vitserve.service.http_worker.inference.options import TIMEOUT, choice, flag, read_timeout_ms, whole_number
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
from vitserve.service.settings import Settings

HEAD = "head"
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
        self, head: RequestHead, chunks: list[bytes], settings: Settings, encoder: ResponseEncoder
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
    needs_classes: bool

    def parse_head(self, query: bytes, headers: Headers, settings: Settings) -> RequestHead:
        return request_parsing.parse_head(query, headers, settings, self.names)

    def takes_long(self, head: RequestHead, chunks: list[bytes], length: int) -> bool:
        return request_parsing.takes_long(head, chunks, length)

    def parse_body(
        self, head: RequestHead, chunks: list[bytes], settings: Settings, encoder: ResponseEncoder
    ) -> ImageRequest:
        images, values = request_parsing.parse_body(head, chunks, settings, self.names)
        classes = len(encoder.model_info.labels)
        if not values and (classes or not self.needs_classes):
            return ImageRequest(images, head.timeout_ms, *_default(self.encoding, classes), head.priority)
        if not classes and self.needs_classes and HEAD not in values:
            raise errors.BadRequestError(
                "the model has no classifier: send the image to /v1/embed, or choose a head with the option head"
            )
        if HEAD in values and _text(HEAD, values[HEAD]) != NO_HEAD:
            values = {**values, HEAD: encoder.heads.find(values[HEAD])}
            classes = len(values[HEAD].head.labels)
        for name, value in head.options.items():
            _read(name, value, classes)  # also if the body overrides it
        options = {name: _read(name, value, classes) for name, value in values.items()}
        deadline_ms = options.get(TIMEOUT, settings.timeout_ms)
        return ImageRequest(images, deadline_ms, *self.encoding(options, classes), head.priority)

    def problem(self, error: errors.ServiceError) -> Response:
        return problem(error)


@cache
def _default(encoding: Callable[[Mapping[str, Any], int], tuple[bool, Encode]], classes: int) -> tuple[bool, Encode]:
    """Without options, as most requests are."""
    return encoding({}, classes)


def _read(name: str, value: Any, classes: int) -> Any:
    """The value of one option."""
    if name == "top_k":
        return whole_number(name, value, 1, classes)
    if name == TIMEOUT:
        return read_timeout_ms(value)
    if name == HEAD:
        return value
    if name in ("embedding", "normalize"):
        return flag(name, value)
    return choice(name, value, ENCODINGS if name == "encoding" else TYPES)


def _classification(options: Mapping[str, Any], classes: int) -> tuple[bool, Encode]:
    head = options.get(HEAD)
    if head == NO_HEAD:
        return _without_head(options)
    embedding = _embedding_format(options) if options.get("embedding", False) else None
    for name in options if embedding is None else ():
        if name in _EMBEDDING_OPTIONS:
            raise errors.BadRequestError(f"{name} has no effect without embedding=true")
    top_k = options.get("top_k", min(5, classes))
    encode = partial(ResponseEncoder.classification, top_k=top_k, embedding=embedding, head=head)
    return embedding is not None or head is not None, encode


def _without_head(options: Mapping[str, Any]) -> tuple[bool, Encode]:
    """No predictions, and always the embedding."""
    if "top_k" in options:
        raise errors.BadRequestError(f"top_k has no effect with head={NO_HEAD}")
    return True, partial(ResponseEncoder.classification, top_k=0, embedding=_embedding_format(options))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise errors.BadRequestError(f"{name} must be a text")
    return value


def _embeddings(options: Mapping[str, Any], _: int) -> tuple[bool, Encode]:
    return True, partial(ResponseEncoder.embeddings, embedding=_embedding_format(options))


def _embedding_format(options: Mapping[str, Any]) -> EmbeddingFormat:
    encoding, dtype = options.get("encoding", "list"), options.get("dtype", "float32")
    if dtype != "float32" and encoding == "list":
        raise errors.BadRequestError(f"dtype is {dtype}, which needs encoding=base64")
    return EmbeddingFormat(options.get("normalize", False), encoding, dtype)


CLASSIFY = _OnImages("/v1/classify", ("top_k", TIMEOUT, "embedding", HEAD, *_EMBEDDING_OPTIONS), _classification, True)
EMBED = _OnImages("/v1/embed", (TIMEOUT, *_EMBEDDING_OPTIONS), _embeddings, False)
