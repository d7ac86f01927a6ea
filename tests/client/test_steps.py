"""Requests of the client and the times at which it sends them again, with a clock of the test and without a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitserve.client import results
from vitserve.client.errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    ImageError,
    InvalidResponseError,
    OverloadedError,
    ProblemError,
    RequestError,
    ServerError,
    UnavailableError,
    VitserveError,
    from_response,
)
from vitserve.client.results import Classification, Model
from vitserve.client.steps import Operation, Reply, Request, Response, Steps, Times, Wait

LIMITS = Model("m", "1", ("a",), "openvino", "fp32", max_images=3, max_body_bytes=10_000, details={})
OVERLOADED = {"status": 429, "code": "overloaded", "title": "Overloaded", "detail": "", "retry_after_seconds": 0.25}
LOST = ConnectionFailedError("reset")

Answer = Callable[[Request], Reply]


class Simulation:
    """Runs the steps of a client. Time passes only while it waits, and 10 ms with each request."""

    def __init__(self, *answers: Answer) -> None:
        """The last answer repeats."""
        self._answers = answers
        self.now = 0.0
        self.requests: list[Request] = []
        self.waits: list[float] = []

    def operation(self, timeout: float = 1.0, deadline: float = 10.0) -> Operation[Classification]:
        times = Times(timeout, deadline, lambda: self.now)
        return Operation("/v1/classify", results.classification, {}, {}, times)

    def run(self, steps: Steps[list[Classification | VitserveError]]) -> list[Classification | VitserveError]:
        reply: Reply = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as stop:
                outcomes: list[Classification | VitserveError] = stop.value
                return outcomes
            reply = self._reply(step)

    def _reply(self, step: Request | Wait) -> Reply:
        if isinstance(step, Wait):
            self.waits.append(step.seconds)
            self.now += step.seconds
            return None
        self.now += 0.01
        self.requests.append(step)
        return self._answers[min(len(self.requests), len(self._answers)) - 1](step)


def predictions(image: bytes) -> dict[str, object]:
    return {"predictions": [{"label": image.decode(), "index": 0, "probability": 1.0}]}


def succeed(request: Request) -> Reply:
    return respond([predictions(image) for image in request.images])


def respond(found: list[dict[str, object]]) -> Response:
    return Response(200, {}, json.dumps({"model": "m", "version": "1", "results": found}).encode())


def failing(status: int, headers: dict[str, str] | None = None, /, **problem: object) -> Answer:
    return lambda _: Response(status, headers or {}, json.dumps(problem).encode())


def labels(outcomes: list[Classification | VitserveError]) -> list[str]:
    return [outcome.predictions[0].label for outcome in outcomes if isinstance(outcome, Classification)]


def images(count: int) -> list[bytes]:
    return [str(index).encode() for index in range(count)]


@given(count=st.integers(0, 40), max_images=st.integers(1, 7), max_bytes=st.integers(1, 9000))
def test_batches_keep_the_order_and_the_limits(count: int, max_images: int, max_bytes: int) -> None:
    limits = Model("m", "1", (), "openvino", "fp32", max_images, max_bytes, {})
    simulation = Simulation(succeed)
    outcomes = simulation.run(simulation.operation().many(iter(images(count)), limits))
    assert labels(outcomes) == [str(index) for index in range(count)]
    assert all(len(request.images) <= max_images for request in simulation.requests)
    assert all(len(request.images) == 1 or len(request.images) * 1024 < max_bytes for request in simulation.requests)


@pytest.mark.parametrize(
    ("answer", "least"),
    [
        (failing(429, **OVERLOADED), 0.25),
        (failing(429, {"retry-after": "2"}), 2.0),
        (failing(503, {"retry-after": "1"}, code="too_many_connections"), 1.0),
        (failing(503, code="not_ready"), 0.05),
        (failing(502), 0.05),
        (lambda _: LOST, 0.05),
    ],
)
def test_what_was_not_admitted_is_sent_again_after_the_given_time(answer: Answer, least: float) -> None:
    simulation = Simulation(answer, answer, succeed)
    assert labels(simulation.run(simulation.operation().many(images(1), LIMITS))) == ["0"]
    assert len(simulation.requests) == 3
    assert all(least <= wait <= max(0.2, 1.1 * least) for wait in simulation.waits)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *[(status, RequestError) for status in (400, 401, 403, 404, 405, 408, 414, 415, 431)],
        (413, ImageError),
        (422, ImageError),
        (500, ServerError),
        (504, DeadlineExceededError),
    ],
)
def test_other_errors_are_not_sent_again(status: int, kind: type[ProblemError]) -> None:
    simulation = Simulation(failing(status, {"retry-after": "1", "x-request-id": "7"}, code="c", title="t", detail="d"))
    with pytest.raises(kind, match="t: d") as raised:
        simulation.run(simulation.operation().one(b"0"))  # type: ignore[arg-type]
    error = raised.value
    assert (error.status, error.code, error.request_id, len(simulation.requests)) == (status, "c", "7", 1)


@pytest.mark.parametrize("answer", [failing(429, **OVERLOADED), failing(503), lambda _: LOST])
@pytest.mark.parametrize("deadline", [0.1, 1.0, 30.0])
def test_retries_end_before_the_deadline(answer: Answer, deadline: float) -> None:
    simulation = Simulation(answer)
    (outcome,) = simulation.run(simulation.operation(deadline=deadline).many(images(1), LIMITS))
    assert isinstance(outcome, (OverloadedError, UnavailableError, ConnectionFailedError))
    assert simulation.now < deadline + 0.01
    assert all(0 < request.timeout_seconds <= 1.0 for request in simulation.requests)
    assert simulation.requests[0].params["timeout_ms"] == str(int(min(1.0, deadline) * 1000))


def test_only_the_images_that_were_not_admitted_are_sent_again() -> None:
    damaged: dict[str, object] = {"error": {"status": 422, "code": "damaged_image", "title": "Damaged", "detail": ""}}
    simulation = Simulation(lambda _: respond([{"error": OVERLOADED}, damaged, predictions(b"2")]), succeed)
    first, second, third = simulation.run(simulation.operation().many(images(3), LIMITS))
    assert labels([first, third]) == ["0", "2"]
    assert isinstance(second, ImageError)
    assert [list(request.images) for request in simulation.requests] == [images(3), [b"0"]]


def test_an_invalid_option_ends_a_batch() -> None:
    simulation = Simulation(failing(400, code="bad_request"))
    with pytest.raises(RequestError):
        simulation.run(simulation.operation().many(images(9), LIMITS))
    assert len(simulation.requests) == 1


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"results": []}', b'{"results": [{}], "model": 1}'])
def test_a_response_of_something_else_is_an_error(body: bytes) -> None:
    simulation = Simulation(lambda _: Response(200, {}, body))
    (outcome,) = simulation.run(simulation.operation().many(images(1), LIMITS))
    assert isinstance(outcome, InvalidResponseError)


def dates() -> Iterator[tuple[str, float | None]]:
    yield from [("3", 3.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", None), ("", None), ("-1", None)]


@pytest.mark.parametrize(("header", "seconds"), list(dates()))
def test_both_forms_of_retry_after_are_read(header: str, seconds: float | None) -> None:
    assert from_response(503, {"retry-after": header}, b"proxy").retry_after_seconds == seconds
