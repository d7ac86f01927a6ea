"""Records a request with images when it has ended: in metrics, the request log, and spans."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vitserve.service import errors
from vitserve.service.http_worker.dispatch.image_job import ImageResult
from vitserve.service.http_worker.inference.response import Outcome, stage_milliseconds
from vitserve.service.http_worker.state import State

if TYPE_CHECKING:
    from opentelemetry.context import Context


class FinishedCall(NamedTuple):
    route: str
    request_id: bytes
    client: tuple[str, int] | None  # address and port
    began: float  # monotonic seconds
    read_seconds: float
    images: int
    key: Mapping[str, object]  # the name of the API key, if there is one
    parent: Context | None  # None without tracing

    def record(self, state: State, status: int, code: str, outcomes: Sequence[Outcome]) -> None:
        """``code``: of the error, if the whole request failed."""
        seconds = time.monotonic() - self.began
        state.count_request(self.route, str(status), seconds)
        if not state.request_log.on and self.parent is None:
            return
        failed = {outcome.code for outcome in outcomes if isinstance(outcome, errors.ServiceError)}
        code = code or ",".join(sorted(failed))
        if self.parent is not None:
            self._trace(state, self.parent, status, code, outcomes)
        if state.request_log.on:
            stages = stage_milliseconds(self.read_seconds, outcomes).items()
            details = {**self.key, "images": self.images, **{f"{name}_ms": value for name, value in stages}}
            about = self.request_id, self.client, "POST", self.route
            state.request_log.write(*about, status, code, seconds, details)

    def _trace(self, state: State, parent: Context, status: int, code: str, outcomes: Sequence[Outcome]) -> None:
        from vitserve.service.http_worker.exchange.tracing import TracedRequest

        assert state.tracing is not None
        attributes: dict[str, str | int]
        attributes = {"vitserve.request_id": self.request_id.decode(), "vitserve.images": self.images}
        attributes |= {f"vitserve.{name}": str(value) for name, value in self.key.items()}
        times = self.began, self.read_seconds
        results = [outcome for outcome in outcomes if isinstance(outcome, ImageResult)]
        state.tracing.record(TracedRequest(parent, self.route, status, code, *times, attributes), results)
