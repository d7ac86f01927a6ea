"""The synchronous and the asynchronous client, with httpx."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from vitserve.client import results
from vitserve.client.errors import ConnectionFailedError, VitserveError, deadline_exceeded
from vitserve.client.results import Classification, Embedding, Model
from vitserve.client.steps import Image, Operation, Reply, Request, Response, Step, Steps, Times, Wait, get_model

try:
    import httpx
except ImportError as error:
    raise ImportError('vitserve.client needs httpx: pip install "vitserve[client]"') from error

T = TypeVar("T")
H = TypeVar("H", httpx.Client, httpx.AsyncClient)

_GRACE_SECONDS = 1.0  # the server responds at the deadline, and the response takes time
_IMAGE_TYPE = "application/octet-stream"


class _Requests(Generic[H]):
    """The operations of both clients."""

    _http_client: type[H]

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        timeout_seconds: float = 10.0,
        deadline_seconds: float = 60.0,
        priority: int | None = None,
        **options: Any,
    ) -> None:
        self._http: H = self._http_client(base_url=url, **options)
        self._times = Times(timeout_seconds, deadline_seconds)
        self._headers = {} if priority is None else {"Vitserve-Priority": str(priority)}
        self._limits: Model | None = None

    def _classification(self, top_k: int | None, embedding: bool, normalize: bool) -> Operation[Classification]:
        params = {} if top_k is None else {"top_k": str(top_k)}
        if embedding:
            params |= {"embedding": "true"} | _embedding_params(normalize)
        return Operation("/v1/classify", results.classification, params, self._headers, self._times)

    def _embedding(self, normalize: bool) -> Operation[Embedding]:
        params = _embedding_params(normalize)
        return Operation("/v1/embed", results.embedding, params, self._headers, self._times)

    def _many(self, operation: Operation[T], images: Iterable[Image]) -> Steps[list[T | VitserveError]]:
        if self._limits is None:
            self._limits = yield from self._model()
        return (yield from operation.many(images, self._limits))

    def _model(self) -> Steps[Model]:
        return get_model(self._headers, self._times)


def _embedding_params(normalize: bool) -> dict[str, str]:
    return {"encoding": "base64", "normalize": "true" if normalize else "false"}


class Client(_Requests[httpx.Client]):
    """Sends images again that were not admitted, after the time that the server gives, or if the connection failed.

    ``timeout_seconds``: of one attempt; the server receives it as the deadline of the request. ``deadline_seconds``: of
    a request with its retries. ``priority``: from 0 to 9, the most urgent. ``options``: those of httpx.Client, such as
    ``headers``.
    """

    _http_client = httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def classify(
        self, image: Image, *, top_k: int | None = None, embedding: bool = False, normalize: bool = False
    ) -> Classification:
        """``image``: an encoded image or its path. ``normalize``: embeddings have a norm of 1. Raises VitserveError."""
        return self._run(self._classification(top_k, embedding, normalize).one(image))

    def classify_many(
        self, images: Iterable[Image], *, top_k: int | None = None, embedding: bool = False, normalize: bool = False
    ) -> list[Classification | VitserveError]:
        """One result per image, in order, in as few requests as the server accepts.

        The result of an image that failed is its error. Raises RequestError for an option that is not valid.
        """
        return self._run(self._many(self._classification(top_k, embedding, normalize), images))

    def embed(self, image: Image, *, normalize: bool = False) -> Embedding:
        """As classify()."""
        return self._run(self._embedding(normalize).one(image))

    def embed_many(self, images: Iterable[Image], *, normalize: bool = False) -> list[Embedding | VitserveError]:
        """As classify_many()."""
        return self._run(self._many(self._embedding(normalize), images))

    def model(self) -> Model:
        """The model that is served. Raises VitserveError."""
        return self._run(self._model())

    def _run(self, steps: Steps[T]) -> T:
        reply: Reply = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as stop:
                result: T = stop.value
                return result
            reply = self._do(step)

    def _do(self, step: Step) -> Reply:
        if isinstance(step, Wait):
            time.sleep(step.seconds)
            return None
        try:
            return _response(self._http.request(step.method, step.path, **_arguments(step)))
        except httpx.HTTPError as error:
            return _failure(error)


class AsyncClient(_Requests[httpx.AsyncClient]):
    """As Client."""

    _http_client = httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def classify(
        self, image: Image, *, top_k: int | None = None, embedding: bool = False, normalize: bool = False
    ) -> Classification:
        return await self._run(self._classification(top_k, embedding, normalize).one(image))

    async def classify_many(
        self, images: Iterable[Image], *, top_k: int | None = None, embedding: bool = False, normalize: bool = False
    ) -> list[Classification | VitserveError]:
        return await self._run(self._many(self._classification(top_k, embedding, normalize), images))

    async def embed(self, image: Image, *, normalize: bool = False) -> Embedding:
        return await self._run(self._embedding(normalize).one(image))

    async def embed_many(self, images: Iterable[Image], *, normalize: bool = False) -> list[Embedding | VitserveError]:
        return await self._run(self._many(self._embedding(normalize), images))

    async def model(self) -> Model:
        return await self._run(self._model())

    async def _run(self, steps: Steps[T]) -> T:
        reply: Reply = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as stop:
                result: T = stop.value
                return result
            reply = await self._do(step)

    async def _do(self, step: Step) -> Reply:
        if isinstance(step, Wait):
            await asyncio.sleep(step.seconds)
            return None
        try:
            return _response(await self._http.request(step.method, step.path, **_arguments(step)))
        except httpx.HTTPError as error:
            return _failure(error)


def _arguments(request: Request) -> Mapping[str, Any]:
    body: dict[str, Any] = {}
    headers = dict(request.headers)
    if len(request.images) == 1:
        body = {"content": request.images[0]}
        headers["Content-Type"] = _IMAGE_TYPE
    elif request.images:
        body = {"files": [("image", ("image", image, _IMAGE_TYPE)) for image in request.images]}
    timeout = request.timeout_seconds + _GRACE_SECONDS
    return {"params": dict(request.params), "headers": headers, "timeout": timeout, **body}


def _response(response: httpx.Response) -> Response:
    return Response(response.status_code, response.headers, response.content)


def _failure(error: httpx.HTTPError) -> VitserveError:
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        failure: VitserveError = deadline_exceeded()
    else:
        failure = ConnectionFailedError(f"the connection failed: {error or type(error).__name__}")
    failure.__cause__ = error
    return failure
