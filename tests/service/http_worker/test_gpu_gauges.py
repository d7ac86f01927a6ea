"""The GPU gauges, with NVML's functions replaced. Their names are checked against the real library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.support.paths import ROOT
from vitserve.service import machine
from vitserve.service.http_worker import gpu_gauges

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cached = gpu_gauges.nvml_is_available
    cached.cache_clear()
    monkeypatch.setattr(machine, "gpus", lambda: ["0", "1"])
    yield
    cached.cache_clear()


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=handle + 1, total=100))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda handle: SimpleNamespace(gpu=50 * handle))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetClockInfo", lambda handle, kind: {pynvml.NVML_CLOCK_SM: 1980}[kind])


def values() -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for metric in gpu_gauges.gpu_gauges()
        for sample in metric.samples
    }


def test_each_gpu_has_memory_utilization_and_clock(nvml: None) -> None:
    samples = values()
    assert samples["vitserve_gpu_memory_bytes", "1", "used"] == 2
    assert samples["vitserve_gpu_memory_bytes", "0", "total"] == 100
    assert samples["vitserve_gpu_utilization_ratio", "1"] == 0.5
    assert samples["vitserve_gpu_clock_hertz", "0"] == 1.98e9


def test_a_missing_driver_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The real library on a machine without the driver. Two scrapes return nothing and log one line."""
    assert [values(), values()] == [{}, {}]
    assert [record.message for record in caplog.records] == ["no GPU metrics: NVML Shared Library Not Found"]


def test_without_a_gpu_nvml_is_not_initialized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [])
    monkeypatch.setattr(gpu_gauges, "nvml_is_available", lambda: pytest.fail("NVML was initialized"))
    assert values() == {}


def test_documents_name_only_gauges_that_exist(nvml: None) -> None:
    """Of the names that test_saturation.py does not check."""
    exposed = {name for name, *_ in values()}
    for page in (ROOT / "docs").glob("*.md"):
        assert set(re.findall(r"\bvitserve_gpu_[a-z_]*[a-z]\b", page.read_text())) <= exposed | {"vitserve_gpu"}
