"""POST /v1/classify: one request from its headers to its response."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from functools import partial

from vitserve.service import errors
from vitserve.service.http_worker.classify.request_parsing import (
    ClassifyRequest,
    Headers,
    RequestHead,
    check_length,
    parse_body,
    parse_head,
)
from vitserve.service.http_worker.classify.response import Outcome, Response, problem
from vitserve.service.http_worker.dispatch.dispatcher import Dispatcher
from vitserve.service.http_worker.dispatch.image_job import ImageJob
from vitserve.service.http_worker.dispatch.image_job import Outcome as JobOutcome
from vitserve.service.http_worker.state import State

log = logging.getLogger(__name__)

ROUTE = "/v1/classify"
# Larger bodies that must be parsed are parsed on a thread: a megabyte of JSON takes milliseconds.
_MAX_PARSED_ON_LOOP = 262_144
_CLIENT_CLOSED_REQUEST = "499"  # nginx's code for a client that disconnects; only the metrics see it


class ClassifyCall:
    """begin() → receive() … → end(). Then ``respond`` is called once, unless cancel() is called first.

    ``respond`` may also be called earlier: by begin() for a request that is rejected from its headers, and by receive()
    for a body that is too large. All methods run on the event loop.
    """

    def __init__(self, state: State, respond: Callable[[Response], None]) -> None:
        self._state, self._respond = state, respond
        self._began = time.monotonic()
        self._arrived = self._began
        self._read_seconds = 0.0
        self._head: RequestHead | None = None
        self._chunks: list[bytes] = []
        self._length = 0
        self._dispatcher: Dispatcher | None = None
        self._request: ClassifyRequest | None = None
        self._jobs: list[ImageJob] = []
        self._outcomes: list[JobOutcome | None] = []
        self._missing = 0  # outcomes that have not arrived
        self.finished = False

    def begin(self, query: bytes, headers: Headers, arrived: float, awaits_continue: bool = False) -> None:
        """``arrived``: the earliest time at which the headers can have arrived, in monotonic seconds.

        ``awaits_continue``: the client sends the body only after a response with status 100.
        """
        self._arrived = arrived
        with _Errors(self):
            self._dispatcher = self._state.serving()
            self._head = parse_head(query, headers, self._state.settings)
            self._reject_early(self._dispatcher, self._head, None if awaits_continue else self._head.content_length)

    def _reject_early(self, dispatcher: Dispatcher, head: RequestHead, body_bytes: int | None) -> None:
        """Rejects a request whose images cannot meet the deadline before its body is read."""
        images = self._state.image_bytes.expected_images(head)
        rejected = dispatcher.admission.reject_early(self._arrived, head.timeout_ms, head.priority, images, body_bytes)
        if rejected is not None:
            self._state.metrics.inc(self._state.metrics.all.images_overloaded, images)
            self.fail(rejected)

    @property
    def timeout_seconds(self) -> float | None:
        """Of the query, or the default. None if the headers were rejected."""
        return None if self._head is None else self._head.timeout_ms / 1000

    def receive(self, chunk: bytes) -> None:
        self._length += len(chunk)
        with _Errors(self):
            check_length(self._length, self._state.settings)
            self._chunks.append(chunk)

    def end(self, arrived: float) -> None:
        """The body is complete. ``arrived``: the time from which the deadline counts, see BodyClock."""
        self._arrived = arrived
        assert self._head is not None
        assert self._dispatcher is not None
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks = []
        self._read_seconds = time.monotonic() - self._began
        self._state.metrics.observe(self._state.metrics.all.read_seconds, self._read_seconds)
        classes = len(self._dispatcher.model_info.labels)
        parse = partial(parse_body, self._head, body, self._state.settings, classes)
        if len(body) <= _MAX_PARSED_ON_LOOP or self._head.media_type.startswith(("image/", "application/octet")):
            with _Errors(self):
                self._submit(parse())
        else:
            parsing = asyncio.get_running_loop().run_in_executor(None, parse)
            parsing.add_done_callback(self._parsed)

    def cancel(self) -> None:
        """The client has disconnected. Its slots become free."""
        if not self.finished:
            self._finish(_CLIENT_CLOSED_REQUEST)
            self._abandon()

    # -- images

    def _parsed(self, parsing: asyncio.Future[ClassifyRequest]) -> None:
        with _Errors(self):
            request = parsing.result()
            if not self.finished:
                self._submit(request)

    def _submit(self, request: ClassifyRequest, admitted: bool = False) -> None:
        """``admitted``: by a model that has been replaced since."""
        assert self._dispatcher is not None
        assert self._head is not None
        self._request = request
        self._state.image_bytes.record(request)
        self._missing = len(request.images)
        self._outcomes = [None] * len(request.images)
        self._jobs = []
        deadline = self._arrived + request.timeout_ms / 1000
        for index, image in enumerate(request.images):
            if isinstance(image, errors.ServiceError):
                self._image_done(index, image)
            else:
                on_done = partial(self._image_done, index)
                job = self._dispatcher.submit(image, deadline, self._head.priority, on_done, admitted)
                self._jobs.append(job)

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
        self._count_images(outcomes)
        first = outcomes[0]
        if isinstance(first, errors.ServiceError) and all(isinstance(outcome, type(first)) for outcome in outcomes):
            if isinstance(first, errors.OverloadedError) and self._head is not None:
                dispatcher.admission.remember(request.timeout_ms, self._head.priority, first)
            raise first
        encoder = self._state.encoder(dispatcher)
        self._send(encoder.classification(outcomes, request.top_k, self._read_seconds))

    # -- the response

    def _send(self, response: Response) -> None:
        self._finish(str(response.status))
        self._respond(response)

    def _finish(self, status: str) -> None:
        self.finished = True
        self._state.count_request(ROUTE, status, time.monotonic() - self._began)

    def _abandon(self) -> None:
        if self._dispatcher is not None:
            for job in self._jobs:
                self._dispatcher.abandon(job)

    def fail(self, error: BaseException) -> None:
        """Responds with a problem, unless the response has been sent."""
        if self.finished:
            if not isinstance(error, errors.ServiceError):
                log.error("unexpected error after a response", exc_info=error)
            return
        if not isinstance(error, errors.ServiceError):
            request_id = uuid.uuid4().hex  # the client receives only this id; the details are in the log
            log.error("request %s failed", request_id, exc_info=error)
            error = errors.ServiceError(f"internal server error (request id {request_id})")
        self._send(problem(error))
        self._abandon()

    def _count_images(self, outcomes: list[Outcome]) -> None:
        metrics = self._state.metrics
        for outcome in outcomes:
            if isinstance(outcome, errors.ServiceError):
                metrics.inc(metrics.all.images.labels(outcome.code))
            else:
                metrics.inc(metrics.all.images_ok)
                metrics.observe(metrics.all.queue_seconds, outcome.queue_seconds)


class _Errors:
    """Turns an exception into the response of the call: nothing else would receive it."""

    __slots__ = ("_call",)

    def __init__(self, call: ClassifyCall) -> None:
        self._call = call

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        if error is None:
            return False
        self._call.fail(error)
        return isinstance(error, Exception)
