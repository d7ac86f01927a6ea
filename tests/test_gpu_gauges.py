"""What the metrics say of GPUs, of a driver that is not there: its answers are given here, its names are the genuine ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from service import gpu_gauges, machine

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_gauges._begun.cache_clear()
    monkeypatch.setattr(machine, "gpus", lambda: ["0", "1"])


def values() -> dict[tuple[str, ...], float]:
    return {(sample.name, *sample.labels.values()): sample.value for metric in gpu_gauges.gpu_gauges() for sample in metric.samples}


def test_each_device_tells_its_memory_its_use_and_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=handle + 1, total=100))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda handle: SimpleNamespace(gpu=50 * handle))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetClockInfo", lambda handle, kind: {pynvml.NVML_CLOCK_SM: 1980}[kind])
    told = values()
    assert told["vitserve_gpu_memory_bytes", "1", "used"] == 2
    assert told["vitserve_gpu_memory_bytes", "0", "total"] == 100
    assert told["vitserve_gpu_utilization_ratio", "1"] == 0.5
    assert told["vitserve_gpu_clock_hertz", "0"] == 1.98e9


def test_a_driver_that_does_not_answer_costs_a_line_in_the_log_and_no_scrape(caplog: pytest.LogCaptureFixture) -> None:
    """The genuine library, on a machine without NVIDIA's."""
    assert [values(), values()] == [{}, {}]
    assert [each.message for each in caplog.records] == ["no gauges of the GPUs: NVML Shared Library Not Found"]


def test_without_a_device_the_library_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [])
    monkeypatch.setattr(gpu_gauges, "_begun", lambda: pytest.fail("asked"))
    assert values() == {}
