"""Requests with images as routes of the ASGI application, for those that the protocol does not handle itself."""

from __future__ import annotations

import asyncio
import time

from starlette import responses
from starlette.requests import ClientDisconnect, Request

from vitserve.service import errors
from vitserve.service.http_worker.exchange.middleware import exchange_of
from vitserve.service.http_worker.inference.call import InferenceCall
from vitserve.service.http_worker.inference.operations import Operation
from vitserve.service.http_worker.inference.response import Response
from vitserve.service.http_worker.state import State


async def respond(state: State, operation: Operation, request: Request) -> responses.Response:
    result: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
    call = InferenceCall(state, operation, result.set_result)
    exchange_of(request.scope).recorded = True  # by the call
    arrived = time.monotonic()
    call.begin(request.scope["query_string"], request.headers.raw, arrived, request.scope["client"])
    try:
        async for chunk in request.stream():
            if call.finished:
                break
            call.receive(chunk)
            arrived = time.monotonic()
        if not call.finished:
            call.end(arrived)
        response = await result
    except (asyncio.CancelledError, ClientDisconnect):
        call.cancel()
        return responses.Response(status_code=errors.CLIENT_CLOSED_REQUEST)  # no client receives it
    headers = {name.decode(): value.decode() for name, value in response.headers}
    if state.draining.is_set():
        headers["connection"] = "close"
    return responses.Response(response.body, response.status, headers)
