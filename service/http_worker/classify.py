"""POST /v1/classify: reads the request, classifies its images and builds the response."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import numpy as np
from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from vitserve.model.arrays import Floats
from vitserve.service import errors
from vitserve.service.http_worker.dispatcher import Dispatcher
from vitserve.service.http_worker.image_job import ImageResult, ModelReplacedError
from vitserve.service.http_worker.request_parsing import ClassifyRequest, parse, read_body
from vitserve.service.http_worker.state import State

# Watching for a disconnect costs as much as parsing the request, and most requests finish sooner than this.
WATCH_AFTER_SECONDS = 0.05

_MAX_SELECTED = 16  # for so few of a thousand classes, repeated argmax is faster than sorting

Outcome = ImageResult | errors.ServiceError


class _ClassifyResponse(Response):
    """Skips the general header handling of Starlette's Response: all headers are known here."""

    def __init__(self, content: bytes, server_timing: str) -> None:
        self.status_code, self.body, self.background = 200, content, None
        self.raw_headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"server-timing", server_timing.encode()),
        ]


async def classify(state: State, request: Request) -> Response:
    """Raises ServiceError if the whole request fails, ClientDisconnect."""
    began = time.monotonic()
    dispatcher = state.serving()
    body = await read_body(request, state.settings.max_body_bytes)
    read_seconds = time.monotonic() - began
    loop = asyncio.get_running_loop()
    loop.call_soon(state.metrics.read_seconds.observe, read_seconds)  # runs while the image is decoded
    work = await parse(request, body, state.settings, len(dispatcher.model_info.labels))
    outcomes = await _while_connected(request, _classify_images(dispatcher, work, began))
    while outcomes is None:  # the model was replaced: classify all images again, so that one model handles them all
        dispatcher = state.serving()
        outcomes = await _while_connected(request, _classify_images(dispatcher, work, began, admitted=True))
    loop.call_soon(_count_images, state, outcomes)  # runs after the response has been sent
    first = outcomes[0]
    if isinstance(first, errors.ServiceError) and all(isinstance(outcome, type(first)) for outcome in outcomes):
        raise first
    model_info = dispatcher.model_info
    results = [_result(outcome, work.top_k, model_info.labels) for outcome in outcomes]
    return _ClassifyResponse(
        to_json({"model": model_info.name, "version": model_info.version, "results": results}),
        _server_timing(read_seconds, outcomes),
    )


async def _classify_images(
    dispatcher: Dispatcher, work: ClassifyRequest, began: float, admitted: bool = False
) -> list[Outcome] | None:
    """The outcome of each image. None if the model was replaced before all of them were finished."""
    deadline = began + work.timeout_ms / 1000

    async def outcome_of(image: bytes | errors.ServiceError) -> Outcome | None:
        if isinstance(image, errors.ServiceError):
            return image
        try:
            return await dispatcher.classify(image, deadline, work.priority, admitted)
        except errors.ServiceError as error:
            return error
        except ModelReplacedError:
            return None

    if len(work.images) == 1:
        results = [await outcome_of(work.images[0])]
    else:
        results = await asyncio.gather(*map(outcome_of, work.images))
    outcomes = [outcome for outcome in results if outcome is not None]
    return outcomes if len(outcomes) == len(results) else None


async def _while_connected(request: Request, work: Coroutine[Any, Any, list[Outcome] | None]) -> list[Outcome] | None:
    """Cancels the work when the client disconnects, so that its slots become free. Raises ClientDisconnect."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    watcher: asyncio.Task[None] | None = None
    disconnected = False

    async def watch() -> None:
        nonlocal disconnected
        while (await request.receive())["type"] != "http.disconnect":
            pass
        disconnected = True
        task.cancel()

    def start_watching() -> None:
        nonlocal watcher
        watcher = loop.create_task(watch())

    timer = loop.call_later(WATCH_AFTER_SECONDS, start_watching)
    try:
        return await work
    except asyncio.CancelledError:
        if disconnected:
            task.uncancel()
            raise ClientDisconnect from None
        raise
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()


def _result(outcome: Outcome, top_k: int, labels: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(outcome, errors.ServiceError):
        return {"error": outcome.problem()}
    probabilities = outcome.probabilities
    return {
        "predictions": [
            {"label": labels[index], "index": index, "probability": float(probabilities[index])}
            for index in most_probable(probabilities, top_k)
        ]
    }


def most_probable(probabilities: Floats, count: int) -> list[int]:
    """Indices of the ``count`` largest probabilities, largest first. Ties go to the lower index."""
    if count > _MAX_SELECTED:
        order: list[int] = np.argsort(-probabilities, kind="stable")[:count].tolist()
        return order
    remaining, indices = probabilities.copy(), []
    for _ in range(count):
        indices.append(int(remaining.argmax()))
        remaining[indices[-1]] = -1
    return indices


def _server_timing(read_seconds: float, outcomes: list[Outcome]) -> str:
    """A W3C Server-Timing header in milliseconds. With several images, the slowest of each stage."""
    stages = {"read": read_seconds}
    results = [outcome for outcome in outcomes if isinstance(outcome, ImageResult)]
    if results:
        stages["decode"] = max(result.decode_seconds for result in results)
        stages["queue"] = max(result.queue_seconds for result in results)
        stages["inference"] = max(result.inference_seconds for result in results)
    return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in stages.items())


def _count_images(state: State, outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, ImageResult):
            state.metrics.images.labels("ok").inc()
            state.metrics.queue_seconds.observe(outcome.queue_seconds)
        else:
            state.metrics.images.labels(outcome.code).inc()
