"""The HTTP routes and their responses. inference/ has those that take images."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from vitserve import __version__
from vitserve.service import errors
from vitserve.service.http_worker.admin_key import AdminKey
from vitserve.service.http_worker.exchange.middleware import exchange_of, observed
from vitserve.service.http_worker.explain.route import ROUTE, explain
from vitserve.service.http_worker.gauges import gauges
from vitserve.service.http_worker.inference.asgi import respond
from vitserve.service.http_worker.inference.operations import CLASSIFY, EMBED
from vitserve.service.http_worker.inference.options import reject_unknown
from vitserve.service.http_worker.open_inference.routes import PREFIX, OpenInference
from vitserve.service.http_worker.openapi import pages
from vitserve.service.http_worker.page import routes as page
from vitserve.service.http_worker.state import State
from vitserve.service.metrics import Exposition

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

ADMIN_PATHS = ("/metrics", "/v1/admin/")  # only on the admin port, if there is one


def create_app(state: State) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.begin()
        yield
        state.end()

    key = AdminKey(state.settings.admin_key)
    exposition = Exposition(lambda: gauges(state), state.stored_metrics)
    app = FastAPI(
        title="vitserve",
        version=__version__,
        lifespan=lifespan,
        root_path=state.settings.root_path,
        openapi_url=None,  # see openapi/
        redirect_slashes=False,  # a redirect would lead from https to http behind a proxy that ends TLS
        exception_handlers={HTTPException: _http_problem, Exception: _internal_error},
    )
    handlers: dict[tuple[str, str], Handler] = {
        ("POST", CLASSIFY.route): lambda request: respond(state, CLASSIFY, request),
        ("POST", EMBED.route): lambda request: respond(state, EMBED, request),
        **_explanations(state),
        ("GET", "/v1/model"): lambda request: _model(state, request),
        ("POST", "/v1/admin/reload"): lambda request: _reload(state, key, request),
        ("GET", "/livez"): lambda request: _livez(),
        ("GET", "/readyz"): lambda request: _readyz(state),
        ("GET", "/metrics"): lambda request: _metrics(exposition),
    }
    guarded = {(method, path): _guarded(handler) for (method, path), handler in handlers.items()}
    reserved = {key for key in guarded if state.settings.admin_port and key[1].startswith(ADMIN_PATHS)}
    app.router.routes += [
        Route(path, handler, methods=[method])
        for (method, path), handler in guarded.items()
        if (method, path) not in reserved
    ]
    app.router.routes += pages.routes(state)
    if state.settings.page:
        app.router.routes += page.routes()
    routes = frozenset(path for _, path in handlers)
    open_inference = OpenInference(state, exposition)
    router = _bypass(app.build_middleware_stack(), guarded, reserved, open_inference, state)
    app.middleware_stack = observed(router, state, routes)
    return app


def _explanations(state: State) -> dict[tuple[str, str], Handler]:
    if not state.settings.explanations:
        return {}
    return {("POST", ROUTE): lambda request: explain(state, state.explainer, request)}


def _bypass(
    app: ASGIApp,
    handlers: dict[tuple[str, str], Handler],
    reserved: Collection[tuple[str, str]],
    open_inference: OpenInference,
    state: State,
) -> ASGIApp:
    """Calls our handlers without FastAPI's middleware, which cost a third of the throughput.

    The handlers raise no exceptions: see _guarded(). All other requests go to ``app``, and those for ``reserved``
    handlers that did not arrive on the admin port: ``app`` does not know these routes.
    """
    prefix = len(state.settings.root_path)

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        key = (scope["method"], scope["path"][prefix:]) if scope["type"] == "http" else ("", "")
        handler, path = handlers.get(key), key[1]
        if path == PREFIX or path.startswith(f"{PREFIX}/"):
            response = await open_inference(Request(scope, receive, send), path)
            await response(scope, receive, send)
        elif handler is None or (key in reserved and scope["server"][1] != state.settings.admin_port):
            await app(scope, receive, send)
        else:
            response = await handler(Request(scope, receive, send))
            await response(scope, receive, send)

    return route


def _guarded(handler: Handler) -> Handler:
    """Turns every exception into a problem response."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except errors.ServiceError as error:
            return _problem(request, error)
        except ClientDisconnect:
            return Response(status_code=errors.CLIENT_CLOSED_REQUEST)
        except Exception as error:
            return await _internal_error(request, error)

    return guarded


def _problem(request: Request, error: errors.ServiceError) -> Response:
    exchange_of(request.scope).code = error.code
    return problem_response(error)


def problem_response(error: errors.ServiceError) -> Response:
    return Response(error.body(), error.status, error.headers(), media_type="application/problem+json")


async def _http_problem(request: Request, error: Exception) -> Response:
    """Starlette's exceptions of its router."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"].removeprefix(request.scope["root_path"])[:200]
    if error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        detail = f"the path {path!r} supports {allowed}, not {request.method}"
        return _problem(request, errors.MethodNotAllowedError(detail, allowed))
    return _problem(request, errors.NotFoundError(f"the path {path!r} does not exist; GET /docs lists all paths"))


async def _internal_error(request: Request, error: Exception) -> Response:
    """The client receives only the id; the details are in the log."""
    request_id = exchange_of(request.scope).request_id.decode()
    log.error("request %s failed", request_id, exc_info=error)
    return _problem(request, errors.internal(request_id))


async def _model(state: State, request: Request) -> Response:
    state.clients.check(request.headers.raw)
    dispatcher = state.serving()
    model_info = dispatcher.model_info
    serving = model_info.details["serving"] | dispatcher.slot_table.measured(0)
    limits = {name: getattr(state.settings, name) for name in ("max_images", "max_body_bytes")}
    heads = state.encoder(dispatcher).heads.describe()
    fields = {"labels": model_info.labels, "heads": heads, "serving": serving, "limits": limits}
    return JSONResponse(model_info.details | fields)


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
