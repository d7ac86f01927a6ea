"""The HTTP surface: routes, and what each answers. Imported by serve.py and the tests."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from service import errors, openapi
from service.metrics import Metrics
from service.requests import parse, read_body
from service.runtime import Answer
from service.settings import Settings
from service.state import Serving, State

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
Outcome = Answer | errors.ServiceError


def create_app(settings: Settings, registry: CollectorRegistry | None = None) -> FastAPI:
    """The application; its State, which serve.py tells of signals, is ``app.state.vitserve``."""
    state = State(settings, Metrics(registry or CollectorRegistry()))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.begin()
        yield
        await state.end()

    app = FastAPI(title="vitserve", lifespan=lifespan, openapi_url="/openapi.json")
    app.state.vitserve = state
    handlers: dict[str, tuple[str, Handler]] = {
        "/v1/classify": ("POST", lambda request: _classify(state, request)),
        "/v1/model": ("GET", lambda request: _model(state)),
        "/livez": ("GET", lambda request: _livez()),
        "/readyz": ("GET", lambda request: _readyz(state)),
        "/metrics": ("GET", lambda request: _metrics(state)),
    }
    # Plain Starlette routes: FastAPI's own solve dependencies that these do not have, at a third of the door's throughput.
    app.router.routes += [Route(path, _guarded(state, path, handler), methods=[method]) for path, (method, handler) in handlers.items()]
    openapi.describe(app)
    return app


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
        state.metrics.requests.labels(path, str(response.status_code)).inc()
        state.metrics.request_seconds.labels(path).observe(time.monotonic() - began)
        return response

    return guarded


def problem(error: errors.ServiceError) -> Response:
    return JSONResponse(error.problem(), error.status, error.headers(), media_type="application/problem+json")


async def _classify(state: State, request: Request) -> Response:
    began = time.monotonic()
    serving = _serving(state)
    body = await read_body(request, state.settings.max_body_bytes)
    read_seconds = time.monotonic() - began
    state.metrics.read_seconds.observe(read_seconds)
    asked = await parse(request, body, state.settings, len(serving.bundle.labels))
    deadline = began + asked.timeout_ms / 1000
    outcomes = await asyncio.gather(*(_outcome(state, serving, image, deadline) for image in asked.images))
    first = outcomes[0]
    if isinstance(first, errors.ServiceError) and all(isinstance(each, type(first)) for each in outcomes):
        raise first
    manifest = serving.bundle.manifest
    results = [_result(outcome, asked.top_k, serving.bundle.labels) for outcome in outcomes]
    content = json.dumps({"model": manifest.name, "version": manifest.version, "results": results})
    return Response(content, media_type="application/json", headers={"Server-Timing": _server_timing(read_seconds, outcomes)})


async def _outcome(state: State, serving: Serving, image: bytes | errors.ServiceError, deadline: float) -> Outcome:
    """An image's answer, or the error that stands for it in a request of several."""
    outcome: Outcome
    try:
        if isinstance(image, errors.ServiceError):
            raise image
        outcome = await serving.runtime.classify(image, deadline)
    except errors.ServiceError as error:
        outcome = error
    state.metrics.images.labels("ok" if isinstance(outcome, Answer) else outcome.code).inc()
    return outcome


def _result(outcome: Outcome, top_k: int, labels: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(outcome, errors.ServiceError):
        return {"error": outcome.problem()}
    order = np.argsort(-outcome.probabilities, kind="stable")[:top_k].tolist()
    return {"predictions": [{"label": labels[index], "index": index, "probability": float(outcome.probabilities[index])} for index in order]}


def _server_timing(read_seconds: float, outcomes: list[Outcome]) -> str:
    """W3C Server Timing, milliseconds; of several images, each stage's slowest."""
    answers = [each for each in outcomes if isinstance(each, Answer)]
    stages = (
        {
            "read": read_seconds,
            "decode": max(each.decode_seconds for each in answers),
            "queue": max(each.queue_seconds for each in answers),
            "run": max(each.run_seconds for each in answers),
        }
        if answers
        else {"read": read_seconds}
    )
    return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in stages.items())


async def _model(state: State) -> Response:
    serving = _serving(state)
    engine, scheduler = serving.opened.engine, serving.runtime.scheduler
    return JSONResponse(
        serving.bundle.summary()
        | {
            "labels": serving.bundle.labels,
            "serving": {
                "engine": engine.name,
                "precision": engine.precision,
                "parity": asdict(serving.opened.parity),
                "refused": serving.opened.refused,
                "lanes": engine.lanes,
                "batch_size": scheduler.knee,
                "seconds_per_batch_size": scheduler.measured(),
            },
        }
    )


async def _livez() -> Response:
    return JSONResponse({"status": "live"})


async def _readyz(state: State) -> Response:
    reasons = state.reasons()
    return JSONResponse({"status": "not ready" if reasons else "ready", "reasons": reasons}, 503 if reasons else 200)


async def _metrics(state: State) -> Response:
    state.reasons()  # brings vitserve_ready up to date
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _serving(state: State) -> Serving:
    """While draining too: what still arrives on an open connection is admitted and answered."""
    if state.serving is None:
        raise errors.NotReady("; ".join(state.reasons()))
    return state.serving
