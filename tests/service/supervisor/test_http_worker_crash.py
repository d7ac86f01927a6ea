"""An HTTP worker is killed, or its clients disconnect: only their own requests end, and all slots become free."""

from __future__ import annotations

import socket

import httpx
import numpy as np
import pytest

from tests.support.http import classify, metric
from tests.support.images import encoded, random_image
from tests.support.load import Load
from tests.support.processes import (
    ENGINE_WORKER,
    HTTP_WORKER,
    LONG_TIMEOUT,
    READY,
    kill,
    remote_ports,
    serving,
    slot_table_of,
    wait_for_lines,
)
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.ipc.memory_layout import WAITING


def test_a_killed_http_worker_breaks_only_its_own_connections(
    bundle: Bundle, expected: dict[tuple[str, str], np.ndarray]
) -> None:
    with serving("--bundle", str(bundle.path), *LONG_TIMEOUT, "--workers", "2") as running:
        wait_for_lines(running, READY, 2)
        with Load(running.url, expected) as load:
            load.wait_for(200)
            killed, spared = running.pids(HTTP_WORKER)
            ports_of_killed = remote_ports(killed)
            assert ports_of_killed
            ports_before = set(load.ports.values())
            kill(killed)
            wait_for_lines(running, READY, 3)
            load.wait_for(500)
        running.wait_for(r"http-worker-\d exited \(SIGKILL\); restarting")
        assert set(load.counts) <= {"200", "broken"}, load.complaints[:3]
        assert set(load.broken) <= ports_of_killed, "a connection of the other HTTP worker broke"
        assert ports_before - ports_of_killed <= set(load.ports.values()), "a client had to connect again"
        assert len(load.broken) == len(set(load.broken))
        assert spared in running.pids(HTTP_WORKER)
        assert killed not in running.pids(HTTP_WORKER)
        with httpx.Client(base_url=running.url) as client:
            eventually(lambda: metric(client, "vitserve_images_in_flight") == 0, "all slots free")
            assert metric(client, "vitserve_restarts_total", process="http_worker", cause="exited") == 1
            assert metric(client, "vitserve_ready") == 1, "the gauge has one sample, none of the killed process"
        assert running.stop() == 0


@pytest.mark.slow
def test_clients_that_disconnect_free_their_slots(slow: Bundle) -> None:
    with (
        serving("--bundle", str(slow.path), "--max-batch", "1", *LONG_TIMEOUT) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        host, port = running.url.removeprefix("http://").split(":")
        image = encoded(random_image())
        headers = f"Host: x\r\nContent-Type: image/png\r\nContent-Length: {len(image)}"
        connections = [socket.create_connection((host, int(port))) for _ in range(30)]
        for connection in connections:
            connection.sendall(f"POST /v1/classify HTTP/1.1\r\n{headers}\r\n\r\n".encode() + image)
        slot_table = slot_table_of(running.pids(ENGINE_WORKER)[0])
        eventually(lambda: slot_table.count(WAITING) >= 20, "20 images are decoded and wait")
        for connection in connections:
            connection.close()
        assert classify(client, image).status_code == 200
        eventually(lambda: metric(client, "vitserve_images_in_flight") == 0, "all slots free")
        assert metric(client, "vitserve_requests_total", status="499") > 20
        assert metric(client, "vitserve_batch_size_sum") < 15, "images without a client were run"
        assert running.stop() == 0
