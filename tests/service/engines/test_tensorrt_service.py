"""The service on a GPU that is not there: real processes, in which the double stands for TensorRT and CUDA."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.images import encoded, random_image
from tests.support.server import start_server
from tests.support.waiting import eventually
from vitserve.model.bundle.bundle import Bundle
from vitserve.service import machine
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.selection import NoEngineError, open_engine
from vitserve.service.settings import Settings
from vitserve.service.supervisor.launch import for_this_machine


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of processes that find the double where TensorRT and CUDA would be, and keep their plans apart."""
    for package in ("tensorrt", "cuda"):
        directory = tmp_path / "packages" / package
        directory.mkdir(parents=True)
        (directory / "__init__.py").write_text(
            f"from tests.support import gpu_double\ngpu_double.install()\nimport sys\n__name__ = {package!r}\n"
        )
    return {"PYTHONPATH": str(tmp_path / "packages"), "XDG_CACHE_HOME": str(tmp_path / "cache")}


ARGUMENTS = ("--engine", "tensorrt", "--max-batch", "4", "--timeout-ms", "60000")


def test_the_first_start_builds_the_plan_and_says_so_and_the_second_finds_it(
    bundle: Bundle, tmp_path: Path, environment: dict[str, str]
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    running = start_server(
        "--bundle",
        str(bundle.path),
        *ARGUMENTS,
        until="running on",
        environment=environment | {"DOUBLE_GATE": str(gate)},
    )
    with httpx.Client(base_url=running.url, timeout=60) as client:

        def reasons() -> str:
            return "; ".join(client.get("/readyz").json()["reasons"])

        eventually(lambda: "starting: building the TensorRT plan: timing: 1 of 2" in reasons(), "progress at /readyz")
        gate.write_bytes(b"")
        eventually(lambda: not reasons(), "ready")
        answer = client.post("/v1/classify", content=encoded(random_image()), headers={"content-type": "image/png"})
        assert answer.status_code == 200
        serving = client.get("/v1/model").json()["serving"]
        assert (serving["engine"], serving["precision"]) == ("tensorrt", "bf16")
    assert running.stop() == 0
    (plan,) = (tmp_path / "cache" / "vitserve" / "plans").glob("*.plan")
    made = plan.stat().st_mtime_ns
    running = start_server("--bundle", str(bundle.path), *ARGUMENTS, environment=environment)
    again = httpx.post(
        f"{running.url}/v1/classify", content=encoded(random_image()), headers={"content-type": "image/png"}, timeout=60
    )
    assert again.json()["results"] == answer.json()["results"]
    assert running.stop() == 0
    assert plan.stat().st_mtime_ns == made


def test_a_device_that_answers_no_more_costs_no_image(
    bundle: Bundle, tmp_path: Path, environment: dict[str, str]
) -> None:
    fault = tmp_path / "fault"
    running = start_server(
        "--bundle", str(bundle.path), *ARGUMENTS, environment=environment | {"DOUBLE_FAULT": str(fault)}
    )
    fault.touch()
    answer = httpx.post(
        f"{running.url}/v1/classify", content=encoded(random_image()), headers={"content-type": "image/png"}, timeout=60
    )
    assert answer.status_code == 200
    assert not fault.exists()
    running.wait_for("DeviceLost: cudaErrorIllegalAddress")
    running.wait_for(r"(?s)(vitserve.http_worker: ready.*){2}")
    assert running.stop() == 0


def test_a_missing_plan_is_built_while_the_next_engine_serves_which_then_hands_over(
    bundle: Bundle, tmp_path: Path, environment: dict[str, str]
) -> None:
    there = "from vitserve.service import machine\nmachine.gpus = lambda *_: ['0']\n"  # for auto, in every process
    (tmp_path / "packages" / "sitecustomize.py").write_text(there)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    arguments = ("--engine", "auto", "--while-building", "serve", "--max-batch", "4", "--timeout-ms", "60000")
    running = start_server(
        "--bundle", str(bundle.path), *arguments, environment=environment | {"DOUBLE_GATE": str(gate)}
    )
    with httpx.Client(base_url=running.url, timeout=60) as client:

        def serving() -> dict[str, Any]:
            return dict(client.get("/v1/model").json()["serving"])

        assert serving()["engine"] != "tensorrt"
        assert ("tensorrt", "not_built") in [(each["engine"], each["cause"]) for each in serving()["rejected"]]
        answers = [client.post("/v1/classify", content=encoded(random_image()), headers={"content-type": "image/png"})]
        gate.write_bytes(b"")
        eventually(lambda: serving()["engine"] == "tensorrt", "the plan serves")
        answers.append(
            client.post("/v1/classify", content=encoded(random_image()), headers={"content-type": "image/png"})
        )
        assert [each.status_code for each in answers] == [200, 200]
        assert client.get("/readyz").status_code == 200
    assert running.stop() == 0


def test_without_tensorrt_its_name_gives_the_line_to_run(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(NoEngineError, match=r"tensorrt is not installed \(.*\): pip install 'vitserve\[tensorrt\]'"):
        open_engine(bundle, EngineOptions(engine="tensorrt", plan_dir=str(tmp_path)))


def test_on_a_gpu_it_comes_first_and_what_the_bundle_holds_serves_without_it(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitserve.service.machine.gpus", lambda: ["0"])
    opened = open_engine(bundle, EngineOptions(plan_dir=str(tmp_path)))
    opened.engine.close()
    assert [(each.engine, each.cause) for each in opened.rejected[:2]] == [("tensorrt", "unavailable")] * 2
    assert opened.engine.name in ("openvino", "onnxruntime")


def test_each_gpu_has_an_engine_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bus in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (tmp_path / bus).mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.gpus(tmp_path) == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 0")
    assert machine.gpus(tmp_path) == ["2", "0"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):  # all that a sandbox may show of two
        (tmp_path / name).touch()
    assert machine.gpus(tmp_path / "none", tmp_path) == ["0", "1"]
    monkeypatch.setattr("vitserve.service.machine.gpus", lambda: ["2", "0"])
    assert for_this_machine(Settings(engine="tensorrt"), 8).engines == 2
    assert for_this_machine(Settings(engine="tensorrt", engines=1), 8).engines == 1
    assert for_this_machine(Settings(engine="openvino"), 8).engines == 1
    monkeypatch.setattr("vitserve.service.machine.gpus", lambda: [])
    assert for_this_machine(Settings(engine="tensorrt"), 8).engines == 1
