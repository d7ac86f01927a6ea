"""All requests that the ASGI application handles: ids, CORS, the request log, and metrics."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitserve.service.errors import CLIENT_CLOSED_REQUEST
from vitserve.service.http_worker.exchange import request_id
from vitserve.service.http_worker.state import State
from vitserve.service.metrics import OTHER_ROUTE

_KEY = "vitserve.exchange"  # in the scope


@dataclass(slots=True)
class Exchange:
    """One request and its response."""

    request_id: bytes
    code: str = ""  # of the error
    route: str = ""  # as the metrics name it, if that is not the path
    recorded: bool = False  # by the handler, which has also added the headers


def exchange_of(scope: Scope) -> Exchange:
    exchange = scope[_KEY]
    assert isinstance(exchange, Exchange)
    return exchange


def observed(app: ASGIApp, state: State, routes: Collection[str]) -> ASGIApp:
    """Adds headers to all responses of ``app``, counts and logs them. A trailing slash of the path is ignored.

    With the setting root_path, paths are accepted with and without it: some proxies remove the prefix, others do not.
    """

    async def observe(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        began = time.monotonic()
        path = _route_path(scope["path"], state.settings.root_path, routes)
        scope["path"] = state.settings.root_path + path
        exchange = scope[_KEY] = Exchange(request_id.of(scope["headers"]))
        status = CLIENT_CLOSED_REQUEST

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not exchange.recorded:
                    message["headers"] = [*message.get("headers", ()), *_headers(scope, state, exchange)]
            await send(message)

        try:
            preflight = state.cors.preflight(scope["method"], scope["headers"])
            if preflight is None:
                await app(scope, receive, send_observed)
            else:
                headers = {name.decode(): value.decode() for name, value in preflight}
                await Response(status_code=204, headers=headers)(scope, receive, send_observed)
        finally:
            if not exchange.recorded:
                seconds = time.monotonic() - began
                route = exchange.route or (path if path in routes else OTHER_ROUTE)
                state.count_request(route, str(status), seconds)
                if state.request_log.on:
                    about = exchange.request_id, scope["client"], scope["method"], path
                    state.request_log.write(*about, status, exchange.code, seconds)

    return observe


def _route_path(path: str, root_path: str, routes: Collection[str]) -> str:
    if root_path and path.startswith(f"{root_path}/") and path not in routes:
        path = path[len(root_path) :]
    return path.removesuffix("/") or "/"


def _headers(scope: Scope, state: State, exchange: Exchange) -> list[tuple[bytes, bytes]]:
    headers = [(request_id.HEADER, exchange.request_id), *state.cors.headers(scope["headers"])]
    if state.draining.is_set():
        headers.append((b"connection", b"close"))
    return headers
