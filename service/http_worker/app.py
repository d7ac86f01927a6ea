"""The HTTP surface: routes, and what each answers."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from vitserve.model.arrays import Floats
from vitserve.service import errors
from vitserve.service.http_worker import openapi
from vitserve.service.http_worker.dispatcher import Answer, Dispatcher, ModelReplacedError
from vitserve.service.http_worker.gauges import gauges
from vitserve.service.http_worker.request_parsing import Classification, parse, read_body
from vitserve.service.http_worker.state import State
from vitserve.service.metrics import Exposition

WATCH_AFTER_SECONDS = (
    0.05  # to watch whether a client leaves costs as much as to parse its request; most are answered before
)

log = logging.getLogger(__name__)

_FEW = 16  # of a thousand classes, so many are found sooner one by one than by sorting all

Handler = Callable[[Request], Awaitable[Response]]
Outcome = Answer | errors.ServiceError


def create_app(state: State) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.begin()
        yield
        state.end()

    exposition = Exposition(lambda: gauges(state), state.metrics)
    app = FastAPI(title="vitserve", lifespan=lifespan, openapi_url="/openapi.json")
    handlers: dict[tuple[str, str], Handler] = {
        ("POST", "/v1/classify"): lambda request: _classify(state, request),
        ("GET", "/v1/model"): lambda request: _model(state),
        ("POST", "/v1/admin/reload"): lambda request: _reload(state, request),
        ("GET", "/livez"): lambda request: _livez(),
        ("GET", "/readyz"): lambda request: _readyz(state),
        ("GET", "/metrics"): lambda request: _metrics(exposition),
    }
    guarded = {(method, path): _guarded(state, path, handler) for (method, path), handler in handlers.items()}
    app.router.routes += [Route(path, handler, methods=[method]) for (method, path), handler in guarded.items()]
    openapi.describe(app)
    app.middleware_stack = _straight_to(guarded, app.build_middleware_stack())
    return app


def _straight_to(handlers: dict[tuple[str, str], Handler], otherwise: ASGIApp) -> ASGIApp:
    """Our own routes without FastAPI's layers, which do nothing for them at a third of the door's throughput. They raise nothing: see _guarded()."""

    async def door(scope: Scope, receive: Receive, send: Send) -> None:
        handler = handlers.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if handler is None:
            await otherwise(scope, receive, send)
        else:
            response = await handler(Request(scope, receive, send))
            await response(scope, receive, send)

    return door


def _guarded(state: State, path: str, handler: Handler) -> Handler:
    """Counts and times the request, and turns every exception into a problem."""

    async def guarded(request: Request) -> Response:
        began = time.monotonic()
        try:
            response = await handler(request)
        except errors.ServiceError as error:
            response = problem(error)
        except ClientDisconnect:
            response = Response(status_code=499)  # nginx's word for it; nobody is there to read it, but the metric is
        except Exception:  # the client learns an id, the log the reason
            request_id = uuid.uuid4().hex
            log.exception("request %s failed", request_id)
            response = problem(errors.ServiceError(f"something went wrong inside; the log knows it as {request_id}"))
        if state.draining.is_set():
            response.headers["Connection"] = "close"
        asyncio.get_running_loop().call_soon(
            _count, state, path, str(response.status_code), time.monotonic() - began
        )  # after it has been sent
        return response

    return guarded


def _count(state: State, path: str, status: str, seconds: float) -> None:
    state.metrics.requests.labels(path, status).inc()
    state.metrics.request_seconds.labels(path).observe(seconds)


def _count_images(state: State, outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, Answer):
            state.metrics.images.labels("ok").inc()
            state.metrics.queue_seconds.observe(outcome.queue_seconds)
        else:
            state.metrics.images.labels(outcome.code).inc()


def problem(error: errors.ServiceError) -> Response:
    """In ASCII: whatever a client wrote into a message can be sent back."""
    return Response(json.dumps(error.problem()), error.status, error.headers(), media_type="application/problem+json")


class _Classified(Response):
    """Starlette's own makes its headers out of whatever they may be; here they are known."""

    def __init__(self, content: bytes, timing: str) -> None:
        self.status_code, self.body, self.background = 200, content, None
        self.raw_headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"server-timing", timing.encode()),
        ]


async def _classify(state: State, request: Request) -> Response:
    began = time.monotonic()
    dispatcher = state.serving()
    body = await read_body(request, state.settings.max_body_bytes)
    read_seconds = time.monotonic() - began
    asyncio.get_running_loop().call_soon(
        state.metrics.read_seconds.observe, read_seconds
    )  # while the image is being decoded
    asked = await parse(request, body, state.settings, len(dispatcher.model_info.labels))
    outcomes = await _while_connected(request, _outcomes(dispatcher, asked, began))
    while outcomes is None:  # all images again: one answer names one model
        dispatcher = state.serving()
        outcomes = await _while_connected(request, _outcomes(dispatcher, asked, began, admitted=True))
    asyncio.get_running_loop().call_soon(_count_images, state, outcomes)  # after it has been sent
    first = outcomes[0]
    if isinstance(first, errors.ServiceError) and all(isinstance(each, type(first)) for each in outcomes):
        raise first
    model_info = dispatcher.model_info
    results = [_result(outcome, asked.top_k, model_info.labels) for outcome in outcomes]
    return _Classified(
        to_json({"model": model_info.name, "version": model_info.version, "results": results}),
        _server_timing(read_seconds, outcomes),
    )


async def _outcomes(
    dispatcher: Dispatcher, asked: Classification, began: float, admitted: bool = False
) -> list[Outcome] | None:
    """None where another model serves by now and this one could not answer all of them."""
    deadline = began + asked.timeout_ms / 1000

    async def outcome(image: bytes | errors.ServiceError) -> Outcome | None:
        """An image's answer, or the error that stands for it in a request of several."""
        if isinstance(image, errors.ServiceError):
            return image
        try:
            return await dispatcher.classify(image, deadline, asked.priority, admitted)
        except errors.ServiceError as error:
            return error
        except ModelReplacedError:
            return None

    found = (
        [await outcome(asked.images[0])]
        if len(asked.images) == 1
        else await asyncio.gather(*map(outcome, asked.images))
    )
    known = [each for each in found if each is not None]
    return known if len(known) == len(found) else None


async def _while_connected(request: Request, work: Coroutine[Any, Any, list[Outcome] | None]) -> list[Outcome] | None:
    """Cancels the work when the client leaves, so that its images free their places. Raises ClientDisconnect."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    watcher: asyncio.Task[None] | None = None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    def begin() -> None:
        nonlocal watcher
        watcher = loop.create_task(watch())

    timer = loop.call_later(WATCH_AFTER_SECONDS, begin)
    try:
        return await work
    except asyncio.CancelledError:
        if left:
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
    order = most_probable(outcome.probabilities, top_k)
    return {
        "predictions": [
            {"label": labels[index], "index": index, "probability": float(outcome.probabilities[index])}
            for index in order
        ]
    }


def most_probable(probabilities: Floats, count: int) -> list[int]:
    """Classes, the most probable first; of those that are equal, the first of them."""
    if count > _FEW:
        order: list[int] = np.argsort(-probabilities, kind="stable")[:count].tolist()
        return order
    left, few = probabilities.copy(), []
    for _ in range(count):
        few.append(int(left.argmax()))
        left[few[-1]] = -1
    return few


def _server_timing(read_seconds: float, outcomes: list[Outcome]) -> str:
    """W3C Server Timing, milliseconds; of several images, each stage's slowest."""
    answers = [each for each in outcomes if isinstance(each, Answer)]
    stages = (
        {
            "read": read_seconds,
            "decode": max(each.decode_seconds for each in answers),
            "queue": max(each.queue_seconds for each in answers),
            "inference": max(each.inference_seconds for each in answers),
        }
        if answers
        else {"read": read_seconds}
    )
    return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in stages.items())


async def _model(state: State) -> Response:
    dispatcher = state.serving()
    model_info = dispatcher.model_info
    serving = model_info.details["serving"] | dispatcher.slot_table.measured(0)
    return JSONResponse(model_info.details | {"labels": model_info.labels, "serving": serving})


async def _reload(state: State, request: Request) -> Response:
    """Opens the configured bundle again. What a client sends is never a path."""
    key = state.settings.admin_key
    sent = request.headers.get("authorization", "")
    if not key:
        raise errors.ForbiddenError("no admin_key is set, so this route is closed; SIGHUP reloads too")
    if not hmac.compare_digest(sent.encode(), f"Bearer {key}".encode()):
        raise errors.ForbiddenError("the bearer token is not the admin key")
    reloaded = await state.reload()
    if reloaded.result != "ok":
        raise errors.ReloadRejectedError(f"{reloaded.result}: {reloaded.reason}")
    model_info = state.serving().model_info
    return JSONResponse({"model": model_info.name, "version": model_info.version})


async def _livez() -> Response:
    return JSONResponse({"status": "live"})


async def _readyz(state: State) -> Response:
    reasons = state.reasons()
    body = {"status": "not ready" if reasons else "ready", "reasons": reasons, "rejected": state.rejected()}
    return JSONResponse(body, 503 if reasons else 200)


async def _metrics(exposition: Exposition) -> Response:
    return Response(exposition.text(), media_type=CONTENT_TYPE_LATEST)
