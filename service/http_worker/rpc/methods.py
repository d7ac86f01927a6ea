"""The methods of the services. Each reads one message, and answers with one message or with an error."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from vitserve.service import errors
from vitserve.service.http_worker.exchange import request_id
from vitserve.service.http_worker.inference.call import InferenceCall
from vitserve.service.http_worker.inference.response import Response
from vitserve.service.http_worker.open_inference import description
from vitserve.service.http_worker.rpc.infer import DEADLINE_HEADER, INFER, error_response
from vitserve.service.http_worker.rpc.messages import (
    HEALTH,
    INFERENCE,
    DecodeError,
    Message,
    message_class,
    request_classes,
)
from vitserve.service.http_worker.rpc.reading import MessageReader
from vitserve.service.http_worker.rpc.status import code_of, trailers
from vitserve.service.http_worker.state import State
from vitserve.service.metrics import Exposition

log = logging.getLogger(__name__)

# The metadata of clients that is read.
_HEADERS = ("authorization", "traceparent", "tracestate", "vitserve-priority", "x-api-key", "x-request-id")
_OPEN = ("ServerLive", "ServerReady", "Check")  # without an API key: probes have none
_SERVING, _NOT_SERVING = 1, 2

# The library calls a handler with the messages of a stream. A single message is the same on the wire, and this way it
# is read after the request has been admitted.
Handler = Callable[[Any, Any], Awaitable[bytes]]
Answer = Callable[[Any], Message]


def headers_of(context: Any) -> list[tuple[bytes, bytes]]:
    metadata = context.invocation_metadata()
    return [(name.encode(), value.encode()) for name, value in metadata if name in _HEADERS]


def client_of(context: Any) -> tuple[str, int] | None:
    """Address and port, from ipv4:127.0.0.1:8000 or ipv6:%5B::1%5D:8000."""
    _, _, peer = unquote(context.peer()).partition(":")
    host, _, port = peer.rpartition(":")
    return (host.strip("[]"), int(port)) if port.isdecimal() else None


async def _finish(context: Any, response: Response) -> bytes:
    if response.status != 200:
        await context.abort(code_of(response.status), response.body.decode(), trailers(response.headers))
    context.set_trailing_metadata(trailers(response.headers))
    return response.body


@dataclass(frozen=True)
class Methods:
    state: State
    exposition: Exposition
    reader: MessageReader

    def handlers(self) -> dict[str, dict[str, Handler]]:
        """By service and method."""
        answers: dict[str, dict[str, Answer]] = {
            INFERENCE: {
                "ServerLive": lambda _: _message("ServerLiveResponse", live=True),
                "ServerReady": lambda _: _message("ServerReadyResponse", ready=not self.state.reasons()),
                "ModelReady": self._model_ready,
                "ServerMetadata": lambda _: _message("ServerMetadataResponse", **description.server()),
                "ModelMetadata": self._model_metadata,
                "ModelConfig": self._model_config,
                "ModelStatistics": self._statistics,
                "RepositoryIndex": self._index,
            },
            HEALTH: {"Check": self._health},
        }
        handlers = {
            service: {name: self._handler(service, name, answer) for name, answer in methods.items()}
            for service, methods in answers.items()
        }
        handlers[INFERENCE]["ModelInfer"] = self._infer
        return handlers

    # -- inference

    async def _infer(self, _: Any, context: Any) -> bytes:
        state = self.state
        result: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

        def respond(response: Response) -> None:
            if not result.done():  # the client may have cancelled it in this turn
                result.set_result(response)

        call = InferenceCall(state, INFER, respond)
        headers, remaining, arrived = headers_of(context), context.time_remaining(), state.turns.arrived()
        if remaining is not None:
            headers.append((DEADLINE_HEADER, b"%d" % (remaining * 1000)))
        try:
            call.begin(b"", headers, arrived, client_of(context) if state.request_log.on else None)
            if not call.decided:
                await self._receive(call, context, arrived if remaining is not None else None)
            response = await result
        except asyncio.CancelledError:
            call.cancel()
            raise
        return await _finish(context, response)

    async def _receive(self, call: InferenceCall, context: Any, arrived: float | None) -> None:
        """``arrived``: of a request with gRPC's deadline, which counts from then. Without one, the message counts."""
        try:
            message = await self.reader.read(context)
        except errors.ServiceError as error:
            call.fail(error)
            return
        call.receive(message)
        if not call.finished:
            call.end(self.state.turns.arrived() if arrived is None else arrived)

    # -- all other methods

    def _handler(self, service: str, name: str, answer: Answer) -> Handler:
        request_class, route = request_classes(service)[name], f"/{service}/{name}"

        async def handle(_: Any, context: Any) -> bytes:
            began, headers = time.monotonic(), headers_of(context)
            identity = request_id.of(headers)
            response, code = Response(errors.CLIENT_CLOSED_REQUEST, [], b""), ""
            try:
                if name not in _OPEN:
                    self.state.clients.check(headers)
                message = request_class.FromString(await self.reader.read(context))
                response = Response(200, [], answer(message).SerializeToString())
            except DecodeError:
                failure = errors.BadRequestError(f"the message is not a {request_class.DESCRIPTOR.name}")
                response, code = error_response(failure), failure.code
            except errors.ServiceError as failure:
                response, code = error_response(failure), failure.code
            except Exception as error:
                log.error("request %s failed", identity.decode(), exc_info=error)
                response, code = error_response(errors.internal(identity.decode())), errors.ServiceError.code
            finally:
                self._record(route, identity, context, response.status, code, time.monotonic() - began)
            response.headers.append((request_id.HEADER, identity))
            return await _finish(context, response)

        return handle

    def _record(self, route: str, identity: bytes, context: Any, status: int, code: str, seconds: float) -> None:
        self.state.count_request(route, str(status), seconds)
        if self.state.request_log.on:
            self.state.request_log.write(identity, client_of(context), "POST", route, status, code, seconds)

    def _check(self, request: Any) -> None:
        description.check_model(self.state.serving().model_info, request.name, request.version)

    def _model_ready(self, request: Any) -> Message:
        self._check(request)
        return _message("ModelReadyResponse", ready=not self.state.reasons())

    def _model_metadata(self, request: Any) -> Message:
        self._check(request)
        return _message("ModelMetadataResponse", **description.model(self.state.serving()))

    def _model_config(self, request: Any) -> Message:
        self._check(request)
        config = description.configuration(self.state.serving(), self.state.settings.max_images)
        return _message("ModelConfigResponse", config=config)

    def _statistics(self, request: Any) -> Message:
        if self.state.settings.admin_port:
            raise errors.NotFoundError("statistics are on the admin port")
        if request.name:
            self._check(request)
        statistics = description.statistics(self.state.serving(), self.exposition.collect())
        return _message("ModelStatisticsResponse", model_stats=[statistics])

    def _index(self, _: Any) -> Message:
        return _message("RepositoryIndexResponse", models=description.index(self.state.serving()))

    def _health(self, request: Any) -> Message:
        if request.service not in ("", INFERENCE):
            raise errors.NotFoundError(f"unknown service {request.service[:200]!r}; known: {INFERENCE}")
        status = _NOT_SERVING if self.state.reasons() else _SERVING
        response: Message = message_class("grpc.health.v1.HealthCheckResponse")(status=status)
        return response


def _message(name: str, /, **fields: Any) -> Message:
    message: Message = message_class(f"inference.{name}")(**fields)
    return message
