"""Invalid requests: each has a status, a stable code, and a message that names the problem."""

from __future__ import annotations

import json
import socket
import struct

import httpx
import pytest

from tests.support.http import classify, connect, metric
from tests.support.images import encoded, png_header, random_image
from tests.support.server import Server, start_server
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.http_worker.inference.request_parsing import ImageBytes, parse_head
from vitserve.service.settings import Settings

IMAGE = encoded(random_image())
FORM = "multipart/form-data; boundary=x"


def text_part(name: str, value: str = "1") -> bytes:
    return f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n--x--\r\n'.encode()


# Status, code, body, content type, query.
PROBLEMS: dict[str, tuple[int, str, bytes, str, str]] = {
    "empty": (422, "not_an_image", b"", "image/png", ""),
    "text": (422, "not_an_image", b"hello", "image/png", ""),
    "truncated": (422, "damaged_image", IMAGE[:-40], "image/png", ""),
    "too many pixels in the header": (413, "image_too_large", png_header(20000, 20000), "image/png", ""),
    "unknown type": (415, "unsupported_media_type", b"a=b", "application/x-www-form-urlencoded", ""),
    "not json": (400, "bad_request", b"{", "application/json", ""),
    "deep json": (400, "bad_request", b"[" * 100_000, "application/json", ""),
    "json without images": (400, "bad_request", b'{"image": ""}', "application/json", ""),
    "no images": (400, "bad_request", b'{"images": []}', "application/json", ""),
    "too many images": (400, "bad_request", json.dumps({"images": [""] * 65}).encode(), "application/json", ""),
    "form without a boundary": (400, "bad_request", b"--x\r\n\r\n", "multipart/form-data", ""),
    "broken form": (400, "bad_request", b"garbage", FORM, ""),
    "form without images": (400, "bad_request", text_part("top_k"), FORM, ""),
    "top_k of zero": (400, "bad_request", IMAGE, "image/png", "?top_k=0"),
    "top_k above the number of classes": (400, "bad_request", IMAGE, "image/png", "?top_k=8"),
    "top_k of letters": (400, "bad_request", IMAGE, "image/png", "?top_k=many"),
    "top_k with an underscore": (400, "bad_request", IMAGE, "image/png", "?top_k=0_1"),
    "top_k in other digits": (400, "bad_request", IMAGE, "image/png", "?top_k=%F0%9D%9F%93"),
    "top_k with a tail": (400, "bad_request", text_part("top_k", "1" + " " * 200 + "x"), FORM, ""),
    "timeout of zero": (400, "bad_request", IMAGE, "image/png", "?timeout_ms=0"),
}


def post(client: httpx.Client, body: bytes, content_type: str, query: str = "") -> httpx.Response:
    return client.post(f"/v1/classify{query}", content=body, headers={"content-type": content_type})


@pytest.mark.parametrize(("status", "code", "body", "content_type", "query"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_problems_have_a_status_and_a_stable_code(
    client: httpx.Client, status: int, code: str, body: bytes, content_type: str, query: str
) -> None:
    response = post(client, body, content_type, query)
    problem = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    assert response.headers["content-type"] == "application/problem+json"
    assert problem.keys() >= {"type", "title", "status", "detail"}


@pytest.mark.parametrize(
    ("body", "content_type", "query", "message"),
    [
        (IMAGE, "image/png", "?topk=5", "unknown query parameter 'topk'; allowed: top_k, timeout_ms"),
        (text_part("topk"), FORM, "", "unknown form field 'topk'; allowed: top_k, timeout_ms"),
        (b'{"images": [""], "topk": 5}', "application/json", "", "unknown field 'topk'; allowed: images, top_k, time"),
        (b'{"images": [""]}', "application/json", "?images=x", "unknown query parameter 'images'; allowed: top_k, tim"),
    ],
    ids=["query", "form", "json", "json field in the query"],
)
def test_unknown_names_are_rejected_with_the_allowed_ones(
    client: httpx.Client, body: bytes, content_type: str, query: str, message: str
) -> None:
    response = post(client, body, content_type, query)
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")
    assert message in response.json()["detail"]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_probes_and_metrics_accept_any_query(client: httpx.Client, path: str) -> None:
    assert client.get(path, params={"collect[]": "cpu"}).status_code == 200


def test_any_client_text_can_be_part_of_a_message(client: httpx.Client) -> None:
    """An unpaired surrogate, which UTF-8 cannot encode."""
    response = post(client, b'{"images":[],"\\ud800":1}', "application/json")
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")
    assert metric(client, "vitserve_requests_total", route="/v1/classify", status="400") > 0


def test_messages_have_the_value_and_the_limit(client: httpx.Client) -> None:
    too_large = classify(client, png_header(20000, 20000)).json()["detail"]
    assert "20000 × 20000 pixels; the limit is 50,000,000" in too_large
    assert "top_k is 8; it must be from 1 to 7" in classify(client, IMAGE, top_k=8).json()["detail"]


def test_a_body_over_the_limit_is_rejected_while_it_arrives(bundle: Bundle) -> None:
    """A declared length is rejected at once, an undeclared one at the limit, although the body never ends."""
    running = start_server("--bundle", str(bundle.path), "--max-body-bytes", "100000")
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    declared = b"Content-Length: 100001\r\n\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n" + b"186a1\r\n" + b"x" * 100_001
    try:
        for rest in (declared, chunked):
            with connect(running) as connection:
                connection.sendall(head + rest)
                assert connection.recv(65536).startswith(b"HTTP/1.1 413")
        with httpx.Client(base_url=running.url) as client:
            assert "100,001 bytes; the limit is 100,000" in classify(client, b"x" * 100_001).json()["detail"]
    finally:
        assert running.stop() == 0


def test_clients_that_disconnect_mid_body_leave_nothing_behind(server: Server, client: httpx.Client) -> None:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc"
    for _ in range(20):
        with connect(server) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(head)
    assert classify(client, IMAGE).status_code == 200
    assert metric(client, "vitserve_images_in_flight") == 0


def test_the_expected_number_of_images_is_within_the_limit() -> None:
    """It counts as offered load. Tiny images must not make a large form look like thousands of images."""
    sizes = ImageBytes()
    sizes.record([b"x" * 100] * 20)
    headers = [(b"content-type", FORM.encode()), (b"content-length", b"33554432")]
    head = parse_head(b"", headers, Settings(), ())
    assert sizes.expected_images(head, max_images=64) == 64
