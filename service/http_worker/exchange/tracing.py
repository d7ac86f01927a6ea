"""Spans of requests for OpenTelemetry: https://opentelemetry.io/docs/specs/semconv/http/http-spans/.

They are created when a request has ended, from the times that it has noted anyway, so that tracing costs nothing
before. Needs the extra ``otel``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vitserve.service.http_worker.dispatch.image_job import ImageResult

MOST_IMAGES = 16  # of a request, whose stages have spans
_PROPAGATED = (b"traceparent", b"tracestate")
_PROPAGATOR = TraceContextTextMapPropagator()

Stage = tuple[str, float, float]  # name, begin, and end in monotonic seconds


class TracedRequest(NamedTuple):
    parent: Context
    route: str
    status: int
    code: str  # of the error
    began: float  # monotonic seconds
    read_seconds: float
    attributes: Mapping[str, str | int]


class Tracing:
    def __init__(self, endpoint: str, share: float, version: str) -> None:
        """``endpoint``: URL of a collector, without the path. ``share``: of the requests without a traced parent."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        resource = Resource.create({"service.name": "vitserve", "service.version": version})
        self._provider = TracerProvider(sampler=ParentBasedTraceIdRatio(share), resource=resource)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("vitserve", version)

    def parent(self, headers: Iterable[tuple[bytes, bytes]]) -> Context:
        """Of a request with these headers (W3C Trace Context). Empty if it has none."""
        carrier = {name.decode(): value.decode("latin-1") for name, value in headers if name in _PROPAGATED}
        return _PROPAGATOR.extract(carrier, Context())

    def record(self, request: TracedRequest, results: Sequence[ImageResult]) -> None:
        """The request has ended now. ``results``: of its images, without those that failed."""
        ended = time.monotonic()
        epoch = time.time() - ended
        attributes: dict[str, str | int] = {
            "http.request.method": "POST",
            "http.route": request.route,
            "http.response.status_code": request.status,
            **request.attributes,
        }
        if request.code:
            attributes["error.type"] = request.code
        name = f"POST {request.route}"
        begin = _nanoseconds(epoch + request.began)
        span = self._tracer.start_span(name, request.parent, SpanKind.SERVER, attributes, start_time=begin)
        if request.status >= 500:
            span.set_status(Status(StatusCode.ERROR, request.code))
        if span.is_recording():
            self._record_stages(span, epoch, request, results[:MOST_IMAGES], ended)
        span.end(_nanoseconds(epoch + ended))

    def close(self) -> None:
        """Sends the spans that have not been sent."""
        self._provider.shutdown()

    def _record_stages(
        self, span: Span, epoch: float, request: TracedRequest, results: Sequence[ImageResult], ended: float
    ) -> None:
        context = set_span_in_context(span)
        self._record(context, epoch, ("read", request.began, request.began + request.read_seconds), {})
        finished = request.began + request.read_seconds
        for index, result in enumerate(results):
            for stage in stages_of(result):
                self._record(context, epoch, stage, {"vitserve.image": index})
                finished = max(finished, stage[2])
        if results:
            self._record(context, epoch, ("respond", finished, ended), {})

    def _record(self, context: Context, epoch: float, stage: Stage, attributes: Mapping[str, int]) -> None:
        name, begin, end = stage
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=_nanoseconds(epoch + begin))
        span.end(_nanoseconds(epoch + end))


def stages_of(result: ImageResult) -> list[Stage]:
    """None for a result of the response cache. An image is queued for decoding, and then for the engine."""
    moments = result.moments
    if moments is None:
        return []
    decoded = moments.decode_began + result.decode_seconds
    stages = [
        ("queue", moments.received, moments.decode_began),
        ("decode", moments.decode_began, decoded),
        ("queue", decoded, moments.inference_began),
        ("inference", moments.inference_began, moments.inference_began + result.inference_seconds),
    ]
    return [(name, begin, end) for name, begin, end in stages if end > begin]


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
