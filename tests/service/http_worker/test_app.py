"""The routes for operators, and the life cycle of a server."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import httpx

from tests.support.http import classify, connect, metric
from tests.support.images import encoded, random_image
from tests.support.server import start_server
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.parity import TOLERANCE

IMAGE = encoded(random_image())


def test_metrics_count_requests_images_and_batches(client: httpx.Client) -> None:
    def values() -> list[float]:
        return [
            metric(client, "vitserve_requests_total", route="/v1/classify", status="200"),
            metric(client, "vitserve_requests_total", route="/v1/classify", status="422"),
            metric(client, "vitserve_images_total", outcome="ok"),
            metric(client, "vitserve_images_total", outcome="not_an_image"),
            metric(client, "vitserve_batch_size_sum"),
            metric(client, "vitserve_decode_seconds_count"),
        ]

    before = values()
    classify(client, IMAGE)
    classify(client, b"no")
    client.post("/v1/classify", files=[("a", IMAGE), ("b", IMAGE)])
    assert [after - start for after, start in zip(values(), before, strict=True)] == [2, 1, 3, 1, 3, 4]
    assert metric(client, "vitserve_ready") == 1
    precision = client.get("/v1/model").json()["serving"]["precision"]
    assert metric(client, "vitserve_model_info", name="tiny", engine="openvino", precision=precision) == 1


def test_probes_report_a_ready_server(client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"status": "live"}
    readiness = client.get("/readyz").json()
    assert (readiness["status"], readiness["reasons"]) == ("ready", [])
    causes = {rejection["cause"] for rejection in readiness["rejected"]}
    assert causes <= {"unavailable"}, "bf16, on a CPU that does not support it"


def test_the_model_route_describes_bundle_and_engine(client: httpx.Client, bundle: Bundle) -> None:
    model = client.get("/v1/model").json()
    assert (model["name"], model["version"], model["labels"]) == ("tiny", bundle.manifest.version, list(bundle.labels))
    serving = model["serving"]
    assert serving["engine"] == "openvino"
    assert serving["precision"] == ("fp32" if serving["rejected"] else "bf16")
    assert serving["parity"]["logits"] < TOLERANCE[serving["precision"]]


def test_sigterm_finishes_admitted_requests(bundle: Bundle) -> None:
    """Eight requests whose bodies are incomplete when the server starts to drain."""
    running = start_server("--bundle", str(bundle.path))
    image = encoded(random_image(2000, 1500))
    half_sent, finish = threading.Barrier(9), threading.Event()
    responses: list[bytes] = []

    def send() -> None:
        with connect(running) as connection:
            head = "POST /v1/classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: image/png\r\n"
            connection.sendall(f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image[:1000])
            half_sent.wait()
            finish.wait()
            connection.sendall(image[1000:])
            responses.append(b"".join(iter(lambda: connection.recv(65536), b"")))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    half_sent.wait()
    with httpx.Client(base_url=running.url) as client:
        assert client.get("/readyz").status_code == 200
        running.process.send_signal(signal.SIGTERM)
    running.wait_for("draining")
    finish.set()
    for thread in threads:
        thread.join()
    assert len(responses) == 8
    assert all(response.startswith(b"HTTP/1.1 200") for response in responses)
    assert running.process.wait(60) == 0


def test_a_server_without_a_model_is_live_but_not_ready(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text("{}")
    running = start_server("--bundle", str(tmp_path), until="the bundle cannot be served")
    try:
        with httpx.Client(base_url=running.url) as client:
            assert client.get("/livez").status_code == 200
            readiness = client.get("/readyz")
            assert readiness.status_code == 503
            assert "is not a valid manifest" in readiness.json()["reasons"][0]
            assert classify(client, IMAGE).status_code == 503
            assert metric(client, "vitserve_ready") == 0
    finally:
        assert running.stop() == 0
