"""An engine worker is killed, hangs or crashes under load: no image is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import httpx
import numpy as np
import pytest

from tests.support.http import classify, metric
from tests.support.images import encoded, random_image
from tests.support.load import Load
from tests.support.paths import ROOT
from tests.support.processes import (
    ENGINE_WORKER,
    LONG_TIMEOUT,
    READY,
    has_exited,
    kill,
    serving,
    slot_table_of,
    wait_for_lines,
)
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle
from vitserve.service.ipc.memory_layout import RUNNING
from vitserve.service.ipc.shared_memory import SlotTable

Expected = dict[tuple[str, str], np.ndarray]


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killing_the_engine_worker_under_load_loses_nothing(times: int, bundle: Bundle, expected: Expected) -> None:
    with serving("--bundle", str(bundle.path), *LONG_TIMEOUT) as running:
        with Load(running.url, expected) as load:
            for number in range(times):
                load.wait_for(200)
                (engine,) = running.pids(ENGINE_WORKER)
                kill(engine)
                wait_for_lines(running, READY, number + 2)
            load.wait_for(200)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        with httpx.Client(base_url=running.url) as client:
            assert metric(client, "vitserve_restarts_total", process="engine_worker", cause="exited") == times
            assert metric(client, "vitserve_images_in_flight") == 0
            assert metric(client, "vitserve_images_total", outcome="ok") == load.counts["200"]
            assert metric(client, "vitserve_images_retried_total") > times
        assert running.stop() == 0


@pytest.mark.slow
def test_one_of_two_engine_workers_keeps_serving(bundle: Bundle, expected: Expected) -> None:
    with serving("--bundle", str(bundle.path), *LONG_TIMEOUT, "--engines", "2", "--threads", "1") as running:
        wait_for_lines(running, READY, 2)
        with Load(running.url, expected) as load, httpx.Client(base_url=running.url) as client:
            for number in range(2):  # each of them once
                load.wait_for(200)
                kill(running.pids(ENGINE_WORKER)[0])
                wait_for_lines(running, "; restarting", number + 1)
                assert client.get("/readyz").status_code == 200
                wait_for_lines(running, READY, number + 3)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        assert running.stop() == 0


def test_an_engine_worker_that_hangs_is_replaced(bundle: Bundle, expected: Expected) -> None:
    with serving("--bundle", str(bundle.path), *LONG_TIMEOUT, "--hang-seconds", "1") as running:
        with Load(running.url, expected) as load:
            load.wait_for(100)
            (engine,) = running.pids(ENGINE_WORKER)
            kill(engine, signal.SIGSTOP)
            running.wait_for("engine-worker-0-b has sent no heartbeat for 1.0 s; killing it")
            load.wait_for(100)
        assert has_exited(engine)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        with httpx.Client(base_url=running.url) as client:
            assert metric(client, "vitserve_restarts_total", process="engine_worker", cause="hung") == 1
        assert running.stop() == 0


@pytest.mark.slow
def test_an_image_in_flight_in_two_crashes_is_answered_500(slow: Bundle) -> None:
    with (
        serving("--bundle", str(slow.path), "--max-batch", "1", *LONG_TIMEOUT) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        responses: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: responses.append(classify(client, encoded(random_image()))))
        thread.start()
        (first,) = running.pids(ENGINE_WORKER)
        kill_while_running(first)
        eventually(lambda: has_exited(first) and running.pids(ENGINE_WORKER), "another engine worker")
        wait_for_lines(running, READY, 2)
        (second,) = running.pids(ENGINE_WORKER)
        kill_while_running(second)
        thread.join(60)
        (response,) = responses
        assert (response.status_code, response.json()["code"]) == (500, "engine_failed")
        assert "2 engine" in response.json()["detail"]
        running.wait_for(r"image \d+ .*2 engine")
        wait_for_lines(running, READY, 3)
        assert classify(client, encoded(random_image())).status_code == 200
        assert metric(client, "vitserve_images_total", outcome="engine_failed") == 1
        assert metric(client, "vitserve_images_in_flight") == 0
        assert running.stop() == 0


def kill_while_running(engine_worker: int) -> None:
    slot_table: SlotTable = slot_table_of(engine_worker)
    eventually(lambda: slot_table.count(RUNNING), "an image is running")
    kill(engine_worker)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("hang", "a batch of 1 has been running for"),
        ("exit", "unexpected error in a runner thread"),
        ("device lost", "DeviceLostError: an illegal address"),
    ],
)
def test_an_unanswered_batch_ends_the_engine_worker(failure: str, message: str) -> None:
    """If the process continued, clients would wait for responses that never come."""
    command = [sys.executable, "-m", "tests.support.failing_engine_worker", failure]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == os.EX_SOFTWARE
    assert message in result.stderr
