"""Requests and raw connections to a server."""

from __future__ import annotations

import json
import socket
from http.client import HTTPResponse

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.images import encoded, random_image
from tests.support.server import Server


def classify(client: httpx.Client, image: bytes, **options: int | str) -> httpx.Response:
    return client.post("/v1/classify", content=image, headers={"content-type": "image/png"}, params=options)


def post_jpeg(url: str) -> httpx.Response:
    """Sends one generated image to the server at ``url``."""
    image = encoded(random_image(400, 300), "JPEG")
    return httpx.post(f"{url}/v1/classify", content=image, headers={"Content-Type": "image/jpeg"}, timeout=60)


def metric(client: httpx.Client, sample_name: str, /, **labels: str) -> float:
    """The sum of all samples with this name and these labels."""
    samples = [
        sample for family in text_string_to_metric_families(client.get("/metrics").text) for sample in family.samples
    ]
    return sum(
        sample.value for sample in samples if sample.name == sample_name and labels.items() <= sample.labels.items()
    )


def connect(server: Server) -> socket.socket:
    """A TCP connection to the server's HTTP port."""
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def head(length: int, path: str = "/v1/classify", *headers: str) -> bytes:
    """The head of a classify request whose body has ``length`` bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: image/png", f"Content-Length: {length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def response(connection: socket.socket) -> tuple[int, dict[str, object], HTTPResponse]:
    """Status, body and the response, which has the headers. Reads nothing of the next response."""
    received = HTTPResponse(connection)
    received.begin()
    return received.status, json.loads(received.read()), received
