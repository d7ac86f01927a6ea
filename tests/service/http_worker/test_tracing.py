"""Spans of requests, as an OpenTelemetry collector receives them over OTLP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks.processes import free_port
from tests.support.http import metric
from tests.support.images import encoded, random_image
from tests.support.rpc import INFER, rejection
from tests.support.server import Server, start_server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.settings import Settings, SettingsError

IMAGE = encoded(random_image(700, 500), "JPEG")
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Receives spans as a collector does: protobuf over HTTP."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        received = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def spans(self, trace_id: str = "") -> list[Any]:
        """All spans that have arrived."""
        spans = [
            span
            for request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return [span for span in spans if trace_id in ("", span.trace_id.hex())]


class Traced(NamedTuple):
    running: Server
    collector: Collector
    grpc_address: str


@pytest.fixture(scope="module")
def traced(slow_bundle: Bundle) -> Iterator[Traced]:
    """Traces only requests whose parent is traced."""
    collector, port = Collector(), free_port()
    options = "--otlp-endpoint", collector.url, "--trace-share", "0", "--grpc-port", str(port)
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test"}
    running = start_server("--bundle", str(slow_bundle.path), *options, environment=environment)
    yield Traced(running, collector, f"127.0.0.1:{port}")
    assert running.stop() == 0
    collector.server.shutdown()
    collector.server.server_close()


def request_of(trace_id: str, sampled: bool = True) -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-{PARENT}-{'01' if sampled else '00'}", "X-Request-ID": "an-id"}


def spans_of(traced: Traced, trace_id: str) -> tuple[Any, list[Any]]:
    """The span of the request, and its children."""
    eventually(lambda: any(span.kind == 2 for span in traced.collector.spans(trace_id)), "the spans arrive")
    spans = traced.collector.spans(trace_id)
    [request] = [span for span in spans if span.kind == 2]
    return request, [span for span in spans if span.kind != 2]


def values(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.mark.parametrize("route", ["/v1/classify", "/v1/embed"])
def test_stages_cover_a_request_whose_parent_is_traced(traced: Traced, route: str) -> None:
    trace_id = TRACE[:-1] + str(len(route) % 10)
    response = httpx.post(f"{traced.running.url}{route}", content=IMAGE, headers=request_of(trace_id), timeout=60)
    assert response.status_code == 200
    request, children = spans_of(traced, trace_id)
    assert (request.name, request.parent_span_id.hex()) == (f"POST {route}", PARENT)
    expected = {
        "http.route": route,
        "http.response.status_code": 200,
        "vitserve.request_id": "an-id",
        "vitserve.images": 1,
    }
    assert expected.items() <= values(request).items()
    assert {"read", "decode", "inference", "respond"} <= {span.name for span in children}
    assert {span.parent_span_id for span in children} == {request.span_id}
    covered, end = 0, request.start_time_unix_nano
    for span in sorted(children, key=lambda span: span.start_time_unix_nano):
        assert request.start_time_unix_nano - 1000 <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano + 1000  # rounding
        covered += max(0, span.end_time_unix_nano - max(end, span.start_time_unix_nano))
        end = max(end, span.end_time_unix_nano)
    assert covered >= 0.95 * (request.end_time_unix_nano - request.start_time_unix_nano)


def test_each_image_has_its_stages(traced: Traced) -> None:
    trace_id = TRACE[::-1]
    form = [("image", ("name", IMAGE))] * 3
    httpx.post(f"{traced.running.url}/v1/classify", files=form, headers=request_of(trace_id), timeout=60)
    _, children = spans_of(traced, trace_id)
    inferences = [values(span)["vitserve.image"] for span in children if span.name == "inference"]
    assert sorted(inferences) == [0, 1, 2]


def test_a_request_of_grpc_belongs_to_the_trace_of_its_client(traced: Traced) -> None:
    trace_id = "4" * 32
    with grpc.insecure_channel(traced.grpc_address) as channel:
        metadata = tuple((name.lower(), value) for name, value in request_of(trace_id).items())
        assert rejection(channel, INFER, b"", metadata=metadata).code == "NOT_FOUND"
    request, _ = spans_of(traced, trace_id)
    assert request.parent_span_id.hex() == PARENT
    assert values(request)["http.route"] == INFER


def test_a_failed_request_names_its_error(traced: Traced) -> None:
    trace_id = "0" * 31 + "f"
    httpx.post(f"{traced.running.url}/v1/classify", content=b"no image", headers=request_of(trace_id))
    request, children = spans_of(traced, trace_id)
    expected = {"http.response.status_code": 422, "error.type": "not_an_image"}
    assert expected.items() <= values(request).items()
    assert [span.name for span in children] == ["read"]


@pytest.mark.parametrize("headers", [{}, request_of("1" * 32, sampled=False), {"traceparent": "damaged \xff"}])
def test_other_requests_are_not_traced(traced: Traced, headers: dict[str, str]) -> None:
    before = len(traced.collector.spans())
    encoded_headers = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    url = f"{traced.running.url}/v1/classify"
    assert httpx.post(url, content=IMAGE, headers=encoded_headers, timeout=60).status_code == 200
    trace_id = "2" * 31 + str(len(headers))  # a traced request behind it
    httpx.post(url, content=IMAGE, headers=request_of(trace_id), timeout=60)
    spans_of(traced, trace_id)
    assert len(traced.collector.spans()) == before + len(traced.collector.spans(trace_id))


def test_the_service_is_named(traced: Traced) -> None:
    httpx.post(f"{traced.running.url}/v1/classify", content=IMAGE, headers=request_of("3" * 32), timeout=60)
    spans_of(traced, "3" * 32)
    resource = traced.collector.requests[-1].resource_spans[0].resource
    assert {"service.name": "vitserve", "deployment.environment.name": "test"}.items() <= values(resource).items()


@pytest.mark.slow
def test_requests_are_answered_without_a_collector(bundle: Bundle) -> None:
    running = start_server("--bundle", str(bundle.path), "--otlp-endpoint", "http://127.0.0.1:9")
    with httpx.Client(base_url=running.url, timeout=60) as client:
        assert client.post("/v1/classify", content=IMAGE).status_code == 200
        assert metric(client, "vitserve_ready") == 1
    assert running.stop() == 0


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://x", "http://"])
def test_endpoints_are_checked(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="otlp_endpoint is"):
        Settings(otlp_endpoint=endpoint)
