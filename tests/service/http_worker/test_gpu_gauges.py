"""What the metrics say of GPUs, of a driver that is not there: its answers are given here, its names are the genuine ones."""

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
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    begun = gpu_gauges._begun
    begun.cache_clear()
    monkeypatch.setattr(machine, "gpus", lambda: ["0", "1"])
    yield
    begun.cache_clear()


def answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's answers, of two devices."""
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


def test_each_device_tells_its_memory_its_use_and_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch)
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


def test_the_documents_name_only_what_is_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the names that test_saturation.py leaves to us."""
    answer(monkeypatch)
    exposed = {name for name, *_ in values()}
    for page in (ROOT / "docs").glob("*.md"):
        assert set(re.findall(r"\bvitserve_gpu_[a-z_]*[a-z]\b", page.read_text())) <= exposed | {"vitserve_gpu"}
