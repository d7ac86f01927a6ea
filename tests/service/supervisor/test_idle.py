"""The CPU time of the processes while no request arrives."""

from __future__ import annotations

import time

import httpx
import psutil
import pytest

from tests.support.http import classify
from tests.support.images import encoded, random_image
from tests.support.processes import ENGINE_WORKER, HTTP_WORKER, serving
from vitserve.model.bundle.bundle import Bundle

INTERVAL_SECONDS = 20.0  # long, because the kernel reports CPU time in steps of 10 ms


def cpu_seconds(pids: list[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(used.user + used.system for used in times))


@pytest.mark.slow
def test_an_idle_service_uses_less_than_a_hundredth_of_a_core(bundle: Bundle) -> None:
    with serving("--bundle", str(bundle.path)) as running, httpx.Client(base_url=running.url) as client:
        assert classify(client, encoded(random_image())).status_code == 200
        pids = [running.process.pid, *running.pids(HTTP_WORKER), *running.pids(ENGINE_WORKER)]
        before = cpu_seconds(pids)
        time.sleep(INTERVAL_SECONDS)  # the measured interval itself
        assert cpu_seconds(pids) - before < INTERVAL_SECONDS / 100
        assert running.stop() == 0
