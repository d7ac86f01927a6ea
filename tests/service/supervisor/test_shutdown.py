"""The service stops: after SIGTERM it answers what it has admitted, and no process or file is left."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from tests.support.images import encoded, random_image
from tests.support.load import Load
from tests.support.processes import (
    ENGINE_WORKER,
    HTTP_WORKER,
    LONG_TIMEOUT,
    has_exited,
    kill,
    serving,
    slot_table_of,
)
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.ipc.control_channel import METRICS_DIR
from vitserve.service.ipc.memory_layout import RUNNING

Expected = dict[tuple[str, str], np.ndarray]


def images(count: int) -> list[tuple[str, bytes]]:
    """The files of a multipart request."""
    return [("image", encoded(random_image(seed=seed))) for seed in range(count)]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_under_load_fails_no_request(bundle: Bundle, expected: Expected, workers: str) -> None:
    with serving("--bundle", str(bundle.path), *LONG_TIMEOUT, "--workers", workers) as running:
        with Load(running.url, expected, stop_at_close=True) as load:
            load.wait_for(200)
            assert running.stop() == 0
            load.join()
        assert set(load.counts) == {"200"}, load.complaints[:3]
        assert "Traceback" not in "".join(running.log)


def test_draining_is_not_ready_and_closes_connections(slow: Bundle) -> None:
    with serving("--bundle", str(slow.path), "--max-batch", "1", *LONG_TIMEOUT) as running:
        with httpx.Client(base_url=running.url, timeout=60) as client, httpx.Client(base_url=running.url) as probe:
            assert probe.get("/readyz").status_code == 200
            responses: list[httpx.Response] = []
            thread = threading.Thread(
                target=lambda: responses.append(client.post("/v1/classify", files=images(20))), daemon=True
            )
            thread.start()
            slot_table = slot_table_of(running.pids(ENGINE_WORKER)[0])
            eventually(lambda: slot_table.count(RUNNING), "an image is running")
            running.process.send_signal(signal.SIGTERM)
            running.wait_for("draining")
            probes = [probe.get("/readyz")]

            def not_ready() -> bool:
                probes.append(probe.get("/readyz"))
                return probes[-1].status_code == 503

            eventually(not_ready, "the HTTP worker has received the drain message")
            assert not responses, "the request is still in flight"
            thread.join(60)
        assert probes[-1].json()["reasons"] == ["draining: the service is stopping"]
        assert probes[-1].headers["connection"] == "close"
        (response,) = responses
        assert response.status_code == 200
        assert response.headers["connection"] == "close"
        assert all("predictions" in result for result in response.json()["results"])
        assert running.process.wait(60) == 0


@pytest.mark.parametrize(
    ("reason", "arguments"), [("second signal", ()), ("drain_seconds=0.2 exceeded", ("--drain-seconds", "0.2"))]
)
def test_a_drain_is_bounded(slow: Bundle, reason: str, arguments: tuple[str, ...]) -> None:
    with (
        serving("--bundle", str(slow.path), "--max-batch", "1", *LONG_TIMEOUT, *arguments) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        failures: list[Exception] = []

        def post() -> None:
            try:
                client.post("/v1/classify", files=images(60))
            except httpx.HTTPError as error:
                failures.append(error)

        thread = threading.Thread(target=post)
        thread.start()
        slot_table = slot_table_of(running.pids(ENGINE_WORKER)[0])
        eventually(lambda: slot_table.count(RUNNING), "an image is running")
        children = running.pids(HTTP_WORKER) + running.pids(ENGINE_WORKER)
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("draining")
        if not arguments:
            running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 1
        thread.join(60)
        assert failures
        running.wait_for(rf"forced shutdown \({reason}\): requests in flight are dropped")
        assert all(has_exited(pid) for pid in children)


def test_nothing_is_left_of_a_killed_supervisor(bundle: Bundle, expected: Expected) -> None:
    """The metrics directory is removed. The kernel frees the slot table, which is unnamed memory."""
    with serving("--bundle", str(bundle.path), *LONG_TIMEOUT, "--workers", "2") as running:
        children = [*running.pids(ENGINE_WORKER), *running.pids(HTTP_WORKER)]
        metrics_directory = Path(psutil.Process(children[0]).environ()[METRICS_DIR])
        assert metrics_directory.is_dir()
        with Load(running.url, expected) as load:
            load.wait_for(100)
            kill(running.process.pid)
            eventually(lambda: all(has_exited(pid) for pid in children), "every child exited")
            load.join()  # every client's next connection is rejected
        assert not metrics_directory.exists()
