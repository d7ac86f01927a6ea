"""One request with images, from its headers to its response."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vitserve.service import errors
from vitserve.service.http_worker.dispatch.dispatcher import Dispatcher
from vitserve.service.http_worker.dispatch.image_job import Outcome as JobOutcome
from vitserve.service.http_worker.exchange import request_id
from vitserve.service.http_worker.exchange.clients import UNLIMITED
from vitserve.service.http_worker.inference.body_memory import memory_of
from vitserve.service.http_worker.inference.counting import count_images, count_rejected, rejected_for_memory
from vitserve.service.http_worker.inference.finished_call import FinishedCall
from vitserve.service.http_worker.inference.operations import Operation
from vitserve.service.http_worker.inference.request_parsing import (
    Headers,
    ImageRequest,
    RequestHead,
    check_length,
)
from vitserve.service.http_worker.inference.response import Outcome, Response
from vitserve.service.http_worker.state import State

if TYPE_CHECKING:
    from opentelemetry.context import Context

log = logging.getLogger(__name__)


class InferenceCall:
    """begin() → receive() … → end(). Then ``respond`` is called once, unless cancel() is called first.

    ``respond`` may also be called earlier: by begin() for a request that is rejected from its headers, and by receive()
    for a body that is too large. All methods run on the event loop.
    """

    def __init__(self, state: State, operation: Operation, respond: Callable[[Response], None]) -> None:
        self._state, self._operation, self._respond = state, operation, respond
        self._began = self._arrived = time.monotonic()
        self._read_seconds = 0.0
        self._head: RequestHead | None = None
        self._chunks: list[bytes] = []
        self._length = self._reserved = 0  # bytes that have arrived, and of memory
        self._dispatcher: Dispatcher | None = None
        self._request: ImageRequest | None = None
        self._allowance = UNLIMITED
        self._jobs: list[Any] = []
        self._outcomes: list[JobOutcome | None] = []
        self._missing = 0  # outcomes that have not arrived
        self._client: tuple[str, int] | None = None
        self._parent: Context | None = None  # of its span
        self._request_id, self._cors_headers = b"", list[tuple[bytes, bytes]]()
        self.finished = self.decided = False  # decided: the response does not depend on the rest of the body

    def begin(
        self,
        query: bytes,
        headers: Headers,
        arrived: float,
        client: tuple[str, int] | None,
        awaits_continue: bool = False,
    ) -> None:
        """``arrived``: the earliest time at which the headers can have arrived, in monotonic seconds.

        ``client``: address and port. ``awaits_continue``: the client sends the body only after a response with
        status 100.
        """
        self._arrived, self._client = arrived, client
        self._request_id = request_id.of(headers)
        if self._state.tracing is not None:
            self._parent = self._state.tracing.parent(headers)
        self._cors_headers = self._state.cors.headers(headers)
        with _Errors(self):
            self._allowance = self._state.clients.allowance(headers)
            self._dispatcher = self._state.serving()
            self._head = self._operation.parse_head(query, headers, self._state.settings)
            self._check_memory(
                self._dispatcher, self._head, memory_of(self._head.media_type, self._head.content_length or 0)
            )
            self._reject_early(self._dispatcher, self._head, None if awaits_continue else self._head.content_length)

    def _reject_early(self, dispatcher: Dispatcher, head: RequestHead, body_bytes: int | None) -> None:
        """Rejects a request whose images cannot meet the deadline before its body is read."""
        images = self._expected_images(head)
        arguments = head.timeout_ms, head.priority, images, body_bytes
        rejected = self._allowance.rejection(images, dispatcher)
        rejected = rejected or dispatcher.admission.reject_early(self._arrived, *arguments)
        if rejected is not None:
            count_rejected(self._state.metrics, rejected, images)
            self.fail(rejected)

    def _expected_images(self, head: RequestHead) -> int:
        return self._state.image_bytes.expected_images(head, self._state.settings.max_images)

    @property
    def timeout_seconds(self) -> float | None:
        """Of the query, or the default. None if the headers were rejected."""
        return None if self._head is None else self._head.timeout_ms / 1000

    def receive(self, chunk: bytes) -> None:
        self._length += len(chunk)
        with _Errors(self):
            check_length(self._length, self._state.settings)
            if self.decided:
                return
            assert self._head is not None
            assert self._dispatcher is not None
            self._reserve(self._dispatcher, self._head, memory_of(self._head.media_type, len(chunk)))
            self._chunks.append(chunk)

    def _reserve(self, dispatcher: Dispatcher, head: RequestHead, more: int) -> None:
        self._check_memory(dispatcher, head, more)
        self._state.body_memory.used += more
        self._reserved += more

    def _check_memory(self, dispatcher: Dispatcher, head: RequestHead, more: int) -> None:
        """Raises OverloadedError or BodyTooLargeError if ``more`` bytes of memory are not free."""
        if not self._state.body_memory.fits(self._reserved, more):
            raise rejected_for_memory(self._state.metrics, dispatcher, head.priority, self._expected_images(head))

    def end(self, arrived: float) -> None:
        """The body is complete. ``arrived``: the time from which the deadline counts, see BodyClock."""
        self._arrived = arrived
        if self.decided:
            return
        assert self._head is not None
        assert self._dispatcher is not None
        chunks, self._chunks = self._chunks, []
        self._read_seconds = time.monotonic() - self._began
        self._state.metrics.observe(self._state.metrics.all.read_seconds, self._read_seconds)
        arguments = self._head, chunks, self._state.settings, self._state.encoder(self._dispatcher)
        parse = partial(self._operation.parse_body, *arguments)
        if self._operation.takes_long(self._head, chunks, self._length):
            parsing = asyncio.get_running_loop().run_in_executor(self._state.parsing_threads, parse)
            parsing.add_done_callback(self._parsed)
        else:
            with _Errors(self):
                self._submit(parse())

    def cancel(self) -> None:
        """The client has disconnected. Its slots become free."""
        if not self.finished:
            self._finish(errors.CLIENT_CLOSED_REQUEST)
            self._release()

    # -- images

    def _parsed(self, parsing: asyncio.Future[ImageRequest]) -> None:
        error = parsing.exception()
        if error is not None:  # raising it here would create a cycle, which keeps the body until it is collected
            self.fail(error)
        elif not self.finished:
            with _Errors(self):
                self._submit(parsing.result())

    def _submit(self, request: ImageRequest, admitted: bool = False) -> None:
        """``admitted``: by a model that has been replaced since."""
        assert self._dispatcher is not None
        assert self._head is not None
        self._request = request
        if self._head.coding:  # the decoded images may be much larger than the body
            decoded = sum(len(image) for image in request.images if isinstance(image, bytes))
            self._reserve(self._dispatcher, self._head, max(0, decoded - self._reserved))
        self._state.image_bytes.record(request.images)
        self._missing = len(request.images)
        over_limit = None if admitted else self._allowance.rejection(self._missing, self._dispatcher)
        if over_limit is None and not admitted:
            self._allowance.take(self._missing)
        self._outcomes = [None] * len(request.images)
        jobs = self._jobs = list[Any]()  # an image may be rejected, and the call be finished, in submit()
        deadline = self._arrived + request.timeout_ms / 1000
        for index, image in enumerate(request.images):
            if over_limit is not None:
                self._image_done(index, over_limit)
            elif isinstance(image, errors.ServiceError):
                self._image_done(index, image)
            else:
                options = request.priority, partial(self._image_done, index), admitted, request.embedding
                jobs.append(self._dispatcher.images.submit(image, deadline, *options))

    def _image_done(self, index: int, outcome: JobOutcome) -> None:
        self._outcomes[index] = outcome
        self._missing -= 1
        if not self._missing:
            with _Errors(self):
                self._all_done()

    def _all_done(self) -> None:
        outcomes = [outcome for outcome in self._outcomes if isinstance(outcome, Outcome)]
        request, dispatcher = self._request, self._dispatcher
        assert request is not None
        assert dispatcher is not None
        if len(outcomes) < len(self._outcomes):  # the model was replaced: classify all images again, with one model
            self._dispatcher = self._state.serving()
            self._submit(request, admitted=True)
            return
        count_images(self._state.metrics, outcomes)
        first = outcomes[0]
        if isinstance(first, errors.ServiceError) and all(isinstance(outcome, type(first)) for outcome in outcomes):
            admitted = any(job.ticket is not None for job in self._jobs)
            if isinstance(first, errors.OverloadedError) and first.reason != "key" and not admitted:
                dispatcher.admission.remember(request.timeout_ms, request.priority, first)
            self.fail(first)
            return
        response = request.encode(self._state.encoder(dispatcher), outcomes, self._read_seconds)
        self._send(response, "", outcomes)

    # -- the response

    def _send(self, response: Response, code: str, outcomes: Sequence[Outcome] = ()) -> None:
        self._finish(response.status, code, outcomes)
        self._release()
        response.headers.append((request_id.HEADER, self._request_id))
        response.headers.extend(self._cors_headers)
        self._respond(response)

    def _finish(self, status: int, code: str = "", outcomes: Sequence[Outcome] = ()) -> None:
        self.finished = self.decided = True
        self._allowance.give_back()
        about = self._operation.route, self._request_id, self._client, self._began, self._read_seconds
        call = FinishedCall(*about, len(self._outcomes), self._allowance.fields, self._parent)
        call.record(self._state, status, code, outcomes)

    def _release(self) -> None:
        """Withdraws images that are not finished, and frees memory: the connection keeps its latest call."""
        self._state.body_memory.used -= self._reserved
        self._reserved = 0
        if self._dispatcher is not None and self._missing:
            for job in self._jobs:
                self._dispatcher.images.abandon(job)
        self._chunks, self._request, self._jobs, self._outcomes = [], None, [], []

    def fail(self, error: BaseException) -> None:
        """Responds with a problem, unless the response has been sent. For rejected API keys, see Clients.delay()."""
        if self.finished:
            if not isinstance(error, errors.ServiceError):
                log.error("unexpected error after a response", exc_info=error)
            return
        if not isinstance(error, errors.ServiceError):
            log.error("request %s failed", self._request_id.decode(), exc_info=error)
            error = errors.internal(self._request_id.decode())
        if isinstance(error, errors.OverloadedError) and error.reason == "key" and not self.decided:
            self.decided = self._state.clients.delay(partial(self.fail, error))
            if self.decided:
                self._release()
                return
        self._send(self._operation.problem(error), error.code)


class _Errors:
    """Turns an exception into the response of the call: nothing else would receive it."""

    __slots__ = ("_call",)

    def __init__(self, call: InferenceCall) -> None:
        self._call = call

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        if error is None:
            return False
        self._call.fail(error)
        return isinstance(error, Exception)
