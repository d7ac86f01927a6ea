"""Metrics and administration on a port of their own."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.support.http import metric
from tests.support.images import encoded, random_image
from tests.support.processes import reload, serving
from tests.support.server import Server
from vitserve.model.bundle.bundle import Bundle

KEY = "a key of this test only"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def both(bundle: Bundle) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Clients of the port for requests and of the admin port. With two HTTP workers, which share both ports."""
    options = ("--admin-port", str(free_port()), "--admin-key", KEY, "--workers", "2")
    with serving("--bundle", str(bundle.path), "--precision", "fp32", *options) as running:
        admin_url = running.wait_for(r"metrics and administration on (http://[\d.:]+)")
        wait_until_ready(running)
        with httpx.Client(base_url=running.url) as client, httpx.Client(base_url=admin_url, timeout=60) as admin:
            yield client, admin
        assert running.stop() == 0


def wait_until_ready(running: Server) -> None:
    running.wait_for(r"(?s)vitserve.http_worker: ready.*vitserve.http_worker: ready")


def test_metrics_and_administration_are_on_the_admin_port_only(both: tuple[httpx.Client, httpx.Client]) -> None:
    client, admin = both
    missing = client.get("/no-such-route")
    assert missing.status_code == 404
    for response in (client.get("/metrics"), client.get("/metrics", headers={"Host": admin.base_url.netloc.decode()})):
        assert response.status_code == 404
        assert response.text == missing.text.replace("/no-such-route", "/metrics")
    assert reload(client, KEY).status_code == 404
    statistics = [each.get("/v2/models/stats").status_code for each in both]
    assert statistics == [404, 200]
    assert metric(admin, "vitserve_ready") == 1
    assert reload(admin, KEY).status_code == 200


def test_both_ports_answer_probes_and_requests(both: tuple[httpx.Client, httpx.Client]) -> None:
    for client in both:
        assert client.get("/livez").status_code == client.get("/readyz").status_code == 200
        assert client.post("/v1/classify", content=encoded(random_image())).status_code == 200
