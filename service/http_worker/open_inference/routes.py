"""The routes of the Open Inference Protocol, version 2, over HTTP. Their errors have the protocol's form.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from vitserve.service import errors
from vitserve.service.http_worker.dispatch.dispatcher import Dispatcher
from vitserve.service.http_worker.exchange.middleware import exchange_of
from vitserve.service.http_worker.inference.asgi import respond
from vitserve.service.http_worker.inference.options import reject_unknown
from vitserve.service.http_worker.open_inference import description
from vitserve.service.http_worker.open_inference.infer import INFER, error_response
from vitserve.service.http_worker.state import State
from vitserve.service.metrics import Exposition

log = logging.getLogger(__name__)

PREFIX = "/v2"
_MODEL = re.compile(r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?(?P<action>/[a-z]+)?")

_OPEN = (f"{PREFIX}/health/live", f"{PREFIX}/health/ready")  # without an API key: probes have none

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class OpenInference:
    """Handles all requests whose path begins with /v2."""

    state: State
    exposition: Exposition

    async def __call__(self, request: Request, path: str) -> Response:
        """``path``: without the prefix of a proxy. Turns every exception into a response."""
        exchange = exchange_of(request.scope)
        try:
            if path not in _OPEN:
                self.state.clients.check(request.headers.raw)
            exchange.route, method, handler = self._find(path)
            if request.method != method:
                raise errors.MethodNotAllowedError(f"the path supports {method}, not {request.method}", method)
            return await handler(request)
        except errors.ServiceError as error:
            failure = error
        except ClientDisconnect:
            return Response(status_code=errors.CLIENT_CLOSED_REQUEST)
        except Exception as error:
            request_id = exchange.request_id.decode()
            log.error("request %s failed", request_id, exc_info=error)
            failure = errors.internal(request_id)
        exchange.code = failure.code
        _, headers, body = error_response(failure)
        return Response(body, failure.status, {name.decode(): value.decode() for name, value in headers})

    def _find(self, path: str) -> tuple[str, str, Handler]:
        """The route as the metrics name it, its method, and its handler. Raises NotFoundError."""
        handlers: dict[str, tuple[str, Handler]] = {
            PREFIX: ("GET", self._server),
            f"{PREFIX}/health/live": ("GET", self._live),
            f"{PREFIX}/health/ready": ("GET", self._ready),
            f"{PREFIX}/models/stats": ("GET", self._statistics),
            f"{PREFIX}/repository/index": ("POST", self._index),
        }
        if path in handlers:
            return path, *handlers[path]
        actions: dict[str | None, tuple[str, Handler]] = {
            None: ("GET", self._model),
            "/ready": ("GET", self._model_ready),
            "/config": ("GET", self._configuration),
            "/stats": ("GET", self._statistics),
            "/infer": ("POST", self._infer),
        }
        match = _MODEL.fullmatch(path)
        if match is None or match["action"] not in actions:
            raise errors.NotFoundError(f"the path {path[:200]!r} does not exist")
        description.check_model(self._serving.model_info, unquote(match["name"]), unquote(match["version"] or ""))
        return f"{PREFIX}/models/{{name}}{match['action'] or ''}", *actions[match["action"]]

    @property
    def _serving(self) -> Dispatcher:
        return self.state.serving()

    async def _server(self, _: Request) -> Response:
        return JSONResponse(description.server())

    async def _live(self, _: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, _: Request) -> Response:
        ready = not self.state.reasons()
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def _model(self, _: Request) -> Response:
        return JSONResponse(description.model(self._serving))

    async def _model_ready(self, _: Request) -> Response:
        ready = not self.state.reasons()
        return JSONResponse({"name": self._serving.model_info.name, "ready": ready}, 200 if ready else 503)

    async def _configuration(self, _: Request) -> Response:
        return JSONResponse(description.configuration(self._serving, self.state.settings.max_images))

    async def _statistics(self, request: Request) -> Response:
        """As metrics, only on the admin port if there is one."""
        admin_port = self.state.settings.admin_port
        if admin_port and request.scope["server"][1] != admin_port:
            raise errors.NotFoundError("statistics are on the admin port")
        return JSONResponse({"model_stats": [description.statistics(self._serving, self.exposition.collect())]})

    async def _index(self, _: Request) -> Response:
        return JSONResponse(description.index(self._serving))

    async def _infer(self, request: Request) -> Response:
        reject_unknown("query parameter", request.query_params)
        return await respond(self.state, INFER, request)
