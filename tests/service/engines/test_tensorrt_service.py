"""The service on a GPU: real processes, in which the doubles stand for TensorRT and CUDA."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.gpu.fixtures import LIBRARIES
from tests.support.images import encoded, random_image
from tests.support.server import Server, start_server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle
from vitserve.service import machine
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import NoEngineError, open_engine
from vitserve.service.settings import Settings
from vitserve.service.supervisor.launch import for_this_machine

ARGUMENTS = ("--max-batch", "4", "--timeout-ms", "60000")


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A named pipe. A build of a plan waits until something is written to it."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


@contextmanager
def serving(
    bundle: Bundle, environment: dict[str, str], *arguments: str, until: str = "vitserve.http_worker: ready"
) -> Iterator[tuple[Server, httpx.Client]]:
    server = start_server("--bundle", str(bundle.path), *ARGUMENTS, *arguments, until=until, environment=environment)
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            yield server, client
    finally:
        status = server.stop()
    assert status == 0


def classify(client: httpx.Client) -> Any:
    response = client.post("/v1/classify", content=encoded(random_image()), headers={"content-type": "image/png"})
    assert response.status_code == 200
    return response.json()["results"]


def description(client: httpx.Client) -> dict[str, Any]:
    return dict(client.get("/v1/model").json()["serving"])


def test_the_first_start_builds_the_plan_and_the_second_reuses_it(
    bundle: Bundle, tmp_path: Path, environment: dict[str, str], gate: Path
) -> None:
    options = ("--engine", "tensorrt")
    first_environment = environment | {"DOUBLE_GATE": str(gate)}
    with serving(bundle, first_environment, *options, until="running on") as (_, client):

        def reasons() -> str:
            return "; ".join(client.get("/readyz").json()["reasons"])

        eventually(lambda: "starting: building the TensorRT plan: timing: 1 of 2" in reasons(), "progress at /readyz")
        gate.write_bytes(b"")
        eventually(lambda: not reasons(), "ready")
        results = classify(client)
        assert (description(client)["engine"], description(client)["precision"]) == ("tensorrt", "bf16")
    (plan,) = (tmp_path / "cache" / "vitserve" / "plans").glob("*.plan")
    built_at = plan.stat().st_mtime_ns
    with serving(bundle, environment, *options) as (_, client):
        assert classify(client) == results
    assert plan.stat().st_mtime_ns == built_at


def test_a_lost_device_loses_no_image(bundle: Bundle, tmp_path: Path, environment: dict[str, str]) -> None:
    fault = tmp_path / "fault"
    with serving(bundle, environment | {"DOUBLE_FAULT": str(fault)}, "--engine", "tensorrt") as (server, client):
        fault.touch()
        classify(client)
        assert not fault.exists()
        server.wait_for("DeviceLostError: cudaErrorIllegalAddress")
        server.wait_for(r"(?s)(vitserve.http_worker: ready.*){2}")


@pytest.mark.slow
def test_the_next_engine_serves_while_a_plan_is_built(
    bundle: Bundle, tmp_path: Path, environment: dict[str, str], gate: Path
) -> None:
    one_gpu = "from vitserve.service import machine\nmachine.gpus = lambda *_: ['0']\n"  # in every process, for auto
    (tmp_path / "packages" / "sitecustomize.py").write_text(one_gpu)
    gated = environment | {"DOUBLE_GATE": str(gate)}
    with serving(bundle, gated, "--engine", "auto", "--while-building", "serve") as (_, client):
        before = description(client)
        assert before["engine"] != "tensorrt"
        assert ("tensorrt", "not_built") in [(each["engine"], each["cause"]) for each in before["rejected"]]
        classify(client)
        gate.write_bytes(b"")
        eventually(lambda: description(client)["engine"] == "tensorrt", "the plan serves")
        classify(client)
        assert client.get("/readyz").status_code == 200


def test_without_tensorrt_the_reason_is_the_command_to_run(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in LIBRARIES:
        monkeypatch.setitem(sys.modules, library, None)
    message = r"tensorrt is not installed \(.*\): pip install 'vitserve\[tensorrt-rtx\]', or 'vitserve\[tensorrt\]'"
    with pytest.raises(NoEngineError, match=message):
        open_engine(bundle, EngineOptions(engine="tensorrt", plan_dir=str(tmp_path)))


def test_on_a_gpu_tensorrt_comes_first_and_the_cpu_last(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitserve.service.machine.gpus", lambda: ["0"])
    opened = open_engine(bundle, EngineOptions(plan_dir=str(tmp_path)))
    opened.engine.close()
    assert [(each.engine, each.cause) for each in opened.rejected[:2]] == [("tensorrt", "unavailable")] * 2
    assert opened.engine.name in ("openvino", "onnxruntime")


def test_gpus_are_found_as_cuda_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bus in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (tmp_path / bus).mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.gpus(tmp_path) == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 0")
    assert machine.gpus(tmp_path) == ["2", "0"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):  # all that some sandboxes show
        (tmp_path / name).touch()
    assert machine.gpus(tmp_path / "none", tmp_path) == ["0", "1"]


def test_each_gpu_has_its_own_engine_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitserve.service.machine.gpus", lambda: ["2", "0"])
    assert for_this_machine(Settings(engine="tensorrt"), 8).engines == 2
    assert for_this_machine(Settings(engine="tensorrt", engines=1), 8).engines == 1
    assert for_this_machine(Settings(engine="openvino"), 8).engines == 1
    monkeypatch.setattr("vitserve.service.machine.gpus", lambda: [])
    assert for_this_machine(Settings(engine="tensorrt"), 8).engines == 1
