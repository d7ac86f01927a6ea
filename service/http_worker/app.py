"""The HTTP routes and their responses. classify/ has POST /v1/classify."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from vitserve import __version__
from vitserve.service import errors
from vitserve.service.http_worker import openapi
from vitserve.service.http_worker.admin_key import AdminKey
from vitserve.service.http_worker.classify.asgi import classify
from vitserve.service.http_worker.classify.call import ROUTE
from vitserve.service.http_worker.classify.request_parsing import reject_unknown
from vitserve.service.http_worker.connections.rejections import count_other
from vitserve.service.http_worker.gauges import gauges
from vitserve.service.http_worker.state import State
from vitserve.service.metrics import Exposition

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


def create_app(state: State) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.begin()
        yield
        state.end()

    key = AdminKey(state.settings.admin_key)
    exposition = Exposition(lambda: gauges(state), state.stored_metrics)
    app = FastAPI(title="vitserve", version=__version__, lifespan=lifespan, openapi_url="/openapi.json")
    handlers: dict[tuple[str, str], Handler] = {
        ("GET", "/v1/model"): lambda request: _model(state),
        ("POST", "/v1/admin/reload"): lambda request: _reload(state, key, request),
        ("GET", "/livez"): lambda request: _livez(),
        ("GET", "/readyz"): lambda request: _readyz(state),
        ("GET", "/metrics"): lambda request: _metrics(exposition),
    }
    guarded = {(method, path): _guarded(state, path, handler) for (method, path), handler in handlers.items()}
    app.router.routes += [Route(path, handler, methods=[method]) for (method, path), handler in guarded.items()]
    app.router.routes.append(Route(ROUTE, partial(classify, state), methods=["POST"]))
    openapi.describe(app)
    app.middleware_stack = _bypass(count_other(app.build_middleware_stack(), state), guarded)
    return app


def _bypass(app: ASGIApp, handlers: dict[tuple[str, str], Handler]) -> ASGIApp:
    """Calls our handlers without FastAPI's middleware, which cost a third of the throughput.

    The handlers raise no exceptions: see _guarded(). All other requests go to ``app``.
    """

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        handler = handlers.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if handler is None:
            await app(scope, receive, send)
        else:
            response = await handler(Request(scope, receive, send))
            await response(scope, receive, send)

    return route


def _guarded(state: State, path: str, handler: Handler) -> Handler:
    """Counts and times requests, and turns every exception into a problem response."""

    async def guarded(request: Request) -> Response:
        began = time.monotonic()
        try:
            response = await handler(request)
        except errors.ServiceError as error:
            response = problem_response(error)
        except ClientDisconnect:
            response = Response(status_code=499)  # nginx's code for it; only the metrics see it
        except Exception:  # the client receives only an id; the details are in the log
            request_id = uuid.uuid4().hex
            log.exception("request %s failed", request_id)
            response = problem_response(errors.ServiceError(f"internal server error (request id {request_id})"))
        if state.draining.is_set():
            response.headers["Connection"] = "close"
        seconds = time.monotonic() - began
        state.count_request(path, str(response.status_code), seconds)
        return response

    return guarded


def problem_response(error: errors.ServiceError) -> Response:
    return Response(error.body(), error.status, error.headers(), media_type="application/problem+json")


async def _model(state: State) -> Response:
    dispatcher = state.serving()
    model_info = dispatcher.model_info
    serving = model_info.details["serving"] | dispatcher.slot_table.measured(0)
    return JSONResponse(model_info.details | {"labels": model_info.labels, "serving": serving})


async def _reload(state: State, key: AdminKey, request: Request) -> Response:
    """Reloads the configured bundle. Clients cannot choose a path."""
    key.check(request.headers.get("authorization", ""))
    reject_unknown("query parameter", request.query_params)
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
