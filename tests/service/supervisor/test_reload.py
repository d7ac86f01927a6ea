"""The bundle is replaced while the service runs: no request is lost, and a rejected bundle changes nothing."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support.http import classify, metric
from tests.support.images import encoded, random_image
from tests.support.load import Load
from tests.support.processes import (
    ADMIN_KEY,
    ENGINE_WORKER,
    LONG_TIMEOUT,
    BundleLink,
    kill,
    reload,
    serving,
    wait_for_lines,
)
from tests.support.server import Server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle

Expected = dict[tuple[str, str], np.ndarray]


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_reloads_under_load_lose_nothing(
    times: int, tmp_path: Path, bundle: Bundle, other: Bundle, expected: Expected
) -> None:
    link = BundleLink(tmp_path, bundle.path)
    with (
        serving("--bundle", str(link.path), *LONG_TIMEOUT, "--admin-key", ADMIN_KEY) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        with Load(running.url, expected) as load:
            for number in range(times):
                load.wait_for(50)
                target = (other, bundle)[number % 2]
                link.point_to(target.path)
                if number < times - 2:
                    body = reload(client).json()
                    assert body == {"model": target.manifest.name, "version": target.manifest.version}
                else:
                    running.process.send_signal(signal.SIGHUP)
                    wait_for_lines(running, "reload: ok", number + 1)
                    assert classify(client, encoded(random_image())).json()["model"] == target.manifest.name
            load.wait_for(50)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        assert set(load.versions) == set(expected), "both models were served"
        assert metric(client, "vitserve_reloads_total", result="ok") == times
        assert metric(client, "vitserve_restarts_total") == 0
        assert metric(client, "vitserve_images_in_flight") == 0
        eventually(lambda: len(running.pids(ENGINE_WORKER)) == 1, "the earlier engine workers exited")
        assert running.stop() == 0


@dataclass(frozen=True)
class Reloadable:
    server: Server
    client: httpx.Client
    link: BundleLink


@pytest.fixture(scope="module")
def service(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reloadable]:
    """Serves ``bundle`` before and after each test."""
    link = BundleLink(tmp_path_factory.mktemp("link"), bundle.path)
    with (
        serving("--bundle", str(link.path), *LONG_TIMEOUT, "--admin-key", ADMIN_KEY) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        yield Reloadable(running, client, link)
        assert running.stop() == 0


def test_a_rejected_bundle_leaves_the_current_model_serving(
    service: Reloadable, bundle: Bundle, damaged: Path, expected: Expected
) -> None:
    with Load(service.server.url, expected, connections=4) as load:
        load.wait_for(50)
        service.link.point_to(damaged)
        rejected = reload(service.client)
        assert (rejected.status_code, rejected.json()["code"]) == (409, "reload_rejected")
        assert "bad_bundle" in rejected.json()["detail"]
        assert "golden.npz" in rejected.json()["detail"]
        service.server.wait_for(r"the bundle cannot be served \(bad_bundle\): .*golden.npz")
        load.wait_for(50)
    assert set(load.counts) == {"200"}, load.complaints[:3]
    assert metric(service.client, "vitserve_reloads_total", result="bad_bundle") == 1
    assert service.client.get("/readyz").status_code == 200
    service.link.point_to(bundle.path)


def test_an_engine_crash_with_a_damaged_bundle_is_not_ready(tmp_path: Path, bundle: Bundle, damaged: Path) -> None:
    """The engine worker that replaces the crashed one finds a bundle that it cannot serve. A reload repairs that."""
    link = BundleLink(tmp_path, bundle.path)
    with (
        serving("--bundle", str(link.path), *LONG_TIMEOUT, "--admin-key", ADMIN_KEY) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        link.point_to(damaged)
        kill(running.pids(ENGINE_WORKER)[0])
        eventually(
            lambda: any("the bundle cannot be served" in reason for reason in client.get("/readyz").json()["reasons"]),
            "not ready",
        )
        response = classify(client, encoded(random_image()))
        assert (response.status_code, response.json()["code"]) == (503, "not_ready")
        assert "golden.npz" in response.json()["detail"]
        link.point_to(bundle.path)
        assert reload(client).status_code == 200
        assert client.get("/readyz").status_code == 200
        assert classify(client, encoded(random_image())).status_code == 200
        assert running.stop() == 0


@pytest.fixture
def damaged(tmp_path: Path, bundle: Bundle) -> Path:
    """A bundle whose golden images are damaged."""
    path = tmp_path / "damaged"
    shutil.copytree(bundle.path, path)
    with (path / "golden.npz").open("r+b") as file:
        file.seek(1000)
        file.write(b"damaged")
    return path


def test_reload_needs_the_admin_key(service: Reloadable, client: httpx.Client) -> None:
    assert reload(client).status_code == 403
    assert "no admin_key is set" in reload(client).json()["detail"]
    keyed = service.client
    for response in (reload(keyed, "wrong"), keyed.post("/v1/admin/reload"), reload(keyed, ADMIN_KEY[:-1])):
        assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
        assert response.headers["www-authenticate"].startswith('Bearer realm="vitserve"')
    assert reload(keyed).status_code == 200


def test_a_crash_while_reloading_leaves_the_current_model_serving(
    service: Reloadable, bundle: Bundle, other: Bundle, expected: Expected
) -> None:
    running = service.server
    eventually(lambda: len(running.pids(ENGINE_WORKER)) == 1, "earlier engine workers exited")
    with Load(running.url, expected, connections=4) as load:
        load.wait_for(50)
        (current,) = running.pids(ENGINE_WORKER)
        service.link.point_to(other.path)
        running.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(running.pids(ENGINE_WORKER)) == 2, "a second engine worker")
        (starting,) = set(running.pids(ENGINE_WORKER)) - {current}
        kill(starting)
        running.wait_for(r"exited \(SIGKILL\) while loading the bundle")
        load.wait_for(50)
    assert set(load.counts) == {"200"}, load.complaints[:3]
    assert set(load.versions) == {(bundle.manifest.name, bundle.manifest.version)}
    assert running.pids(ENGINE_WORKER) == [current]
    assert metric(service.client, "vitserve_reloads_total", result="exited") == 1
    service.link.point_to(bundle.path)


@pytest.mark.parametrize("times", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_restart_during_a_reload_does_not_return_to_the_old_model(
    times: int, bundle: Bundle, expected: Expected
) -> None:
    """The restarted engine worker and the new one load the bundle at the same time, and either may be ready first."""
    with serving("--bundle", str(bundle.path), *LONG_TIMEOUT) as running:
        with Load(running.url, expected, connections=4) as load:
            for number in range(times):
                load.wait_for(20)
                kill(running.pids(ENGINE_WORKER)[0])
                running.process.send_signal(signal.SIGHUP)
                wait_for_lines(running, "reload: ok", number + 1)
            load.wait_for(20)
            eventually(lambda: len(running.pids(ENGINE_WORKER)) == 1, "one engine worker is left")
            load.wait_for(20)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        assert running.stop() == 0


@pytest.mark.slow
def test_a_bundle_that_changed_before_a_crash_is_reloaded(
    tmp_path: Path, bundle: Bundle, other: Bundle, expected: Expected
) -> None:
    """The images of the crashed engine worker are submitted to the new model."""
    link = BundleLink(tmp_path, bundle.path)
    with serving("--bundle", str(link.path), *LONG_TIMEOUT) as running:
        with Load(running.url, expected) as load:
            load.wait_for(50)
            link.point_to(other.path)
            kill(running.pids(ENGINE_WORKER)[0])
            running.wait_for("is not the one that is being served; loading it as a new model")
            running.wait_for("ready: other")
            load.wait_for(100)
            for number in range(2):  # the generation that ended this way does not disturb later reloads
                running.process.send_signal(signal.SIGHUP)
                wait_for_lines(running, "reload: ok", number + 2)
            load.wait_for(100)
        assert set(load.counts) == {"200"}, load.complaints[:3]
        assert set(load.versions) == set(expected)
        assert running.stop() == 0
