"""The logic of a client without I/O: generators that yield requests and waits, and receive responses.

So the synchronous and the asynchronous client share everything but the steps themselves.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from vitserve.client import errors, results
from vitserve.client.errors import VitserveError
from vitserve.client.results import Model

Image = bytes | PathLike[str]  # an encoded image, or its path

T = TypeVar("T")
R = TypeVar("R", covariant=True)

_RETRIED = (errors.OverloadedError, errors.UnavailableError, errors.ConnectionFailedError)
_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.1, 5.0  # if the server gives no time
_LEAST_WAIT_SECONDS = 0.01
_MAX_TIMEOUT_MS = 3_600_000
_PART_BYTES = 1024  # of a form, around an image


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    timeout_seconds: float
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    images: Sequence[bytes] = ()  # one: the body; several: a form


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes


Step = Request | Wait
Reply = Response | VitserveError | None  # None after a wait
Steps = Generator[Step, Reply, T]


@dataclass(frozen=True, slots=True)
class Times:
    """``timeout_seconds``: of one attempt, which the server receives. ``deadline_seconds``: with all retries."""

    timeout_seconds: float
    deadline_seconds: float
    clock: Callable[[], float] = time.monotonic


class _Parse(Protocol[R]):
    def __call__(self, result: Mapping[str, Any], model: str, version: str) -> R: ...


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """On images."""

    path: str
    parse: _Parse[T]
    params: Mapping[str, str]
    headers: Mapping[str, str]
    times: Times

    def one(self, image: Image) -> Steps[T]:
        """Raises VitserveError."""
        (outcome,) = yield from self._request([_read(image)])
        if isinstance(outcome, VitserveError):
            raise outcome
        return outcome

    def many(self, images: Iterable[Image], limits: Model) -> Steps[list[T | VitserveError]]:
        """One outcome per image, in order. Raises RequestError: it is no property of an image."""
        outcomes: list[T | VitserveError] = []
        for chunk in _chunks(images, limits.max_images, limits.max_body_bytes):
            outcomes += yield from self._request(chunk)
            if isinstance(outcomes[-1], errors.RequestError):
                raise outcomes[-1]
        return outcomes

    def _request(self, images: Sequence[bytes]) -> Steps[list[T | VitserveError]]:
        def send(indices: Sequence[int], seconds: float) -> Request:
            timeout = {"timeout_ms": str(max(1, min(_MAX_TIMEOUT_MS, int(seconds * 1000))))}
            chosen = [images[index] for index in indices]
            return Request("POST", self.path, seconds, {**self.params, **timeout}, self.headers, chosen)

        return (yield from _until_deadline(len(images), send, self._results, self.times))

    def _results(self, response: Response) -> list[T | VitserveError]:
        body, request_id = json.loads(response.body), response.headers.get("x-request-id", "")
        return [
            errors.from_problem(result["error"], request_id)
            if "error" in result
            else self.parse(result, body["model"], body["version"])
            for result in body["results"]
        ]


def get_model(headers: Mapping[str, str], times: Times) -> Steps[Model]:
    def send(_: Sequence[int], seconds: float) -> Request:
        return Request("GET", "/v1/model", seconds, headers=headers)

    def parse(response: Response) -> list[Model | VitserveError]:
        return [results.model_of(json.loads(response.body))]

    (outcome,) = yield from _until_deadline(1, send, parse, times)
    if isinstance(outcome, VitserveError):
        raise outcome
    return outcome


def _until_deadline(
    count: int,
    send: Callable[[Sequence[int], float], Request],
    parse: Callable[[Response], list[T | VitserveError]],
    times: Times,
) -> Steps[list[T | VitserveError]]:
    """Sends ``count`` items, and those again that were not admitted, until their deadline.

    ``send``: the indices of the items and the timeout in seconds become a request.
    """
    deadline = times.clock() + times.deadline_seconds
    outcomes: list[T | VitserveError] = [errors.deadline_exceeded()] * count
    pending = list(range(count))
    for retry in itertools.count():
        remaining = deadline - times.clock()
        if remaining <= 0:
            break
        reply = yield send(pending, min(times.timeout_seconds, remaining))
        for index, outcome in zip(pending, _outcomes(reply, len(pending), parse), strict=True):
            outcomes[index] = outcome
        pending = [index for index in pending if isinstance(outcomes[index], _RETRIED)]
        wait = max([_wait_seconds(outcomes[index], retry) for index in pending], default=0.0)
        if not pending or times.clock() + wait >= deadline:
            break
        yield Wait(wait)
    return outcomes


def _outcomes(
    reply: Reply, count: int, parse: Callable[[Response], list[T | VitserveError]]
) -> Sequence[T | VitserveError]:
    assert reply is not None
    if isinstance(reply, VitserveError):
        return [reply] * count
    if reply.status != 200:
        return [errors.from_response(reply.status, reply.headers, reply.body)] * count
    try:
        outcomes = parse(reply)
    except (ValueError, KeyError, TypeError) as error:
        return [errors.InvalidResponseError(f"the response is not one of vitserve: {error!r}")] * count
    if len(outcomes) != count:
        return [errors.InvalidResponseError(f"{count} images have {len(outcomes)} results")] * count
    return outcomes


def _wait_seconds(error: object, retry: int) -> float:
    """At least the time that the server gives, with some more, so that clients do not come back at once."""
    given = error.retry_after_seconds if isinstance(error, errors.ProblemError) else None
    if given is not None:
        return max(_LEAST_WAIT_SECONDS, given) * random.uniform(1.0, 1.1)
    return min(_MAX_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2.0 ** min(retry, 10)) * random.uniform(0.5, 1.0)


def _chunks(images: Iterable[Image], max_images: int, max_bytes: int) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    size = 0
    for image in images:
        content = _read(image)
        length = len(content) + _PART_BYTES
        if chunk and (len(chunk) == max_images or size + length > max_bytes):
            yield chunk
            chunk, size = [], 0
        chunk.append(content)
        size += length
    if chunk:
        yield chunk


def _read(image: Image) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()
