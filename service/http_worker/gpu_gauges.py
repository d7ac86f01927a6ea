"""Memory, utilization and clock of the NVIDIA GPUs, read from the driver for each scrape of /metrics.

Uses nvidia-ml-py, the binding of NVML: https://docs.nvidia.com/deploy/nvml-api.
On a machine without a GPU, it is not imported.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from vitserve.service import machine

log = logging.getLogger(__name__)


def gpu_gauges() -> Iterator[Metric]:
    """One sample for each GPU that this process may use. Nothing if NVML is not available."""
    if not machine.gpus() or not nvml_is_available():
        return
    import pynvml

    memory = GaugeMetricFamily(
        "vitserve_gpu_memory_bytes", "GPU memory, used by all processes and in total.", labels=["gpu", "kind"]
    )
    utilization = GaugeMetricFamily(
        "vitserve_gpu_utilization_ratio", "GPU utilization as reported by NVML (0 to 1).", labels=["gpu"]
    )
    clock = GaugeMetricFamily(
        "vitserve_gpu_clock_hertz",
        "Clock of the multiprocessors. Below its maximum when temperature or power limit it.",
        labels=["gpu"],
    )
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle, gpu = pynvml.nvmlDeviceGetHandleByIndex(index), str(index)
            device_memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            memory.add_metric([gpu, "used"], device_memory.used)
            memory.add_metric([gpu, "total"], device_memory.total)
            utilization.add_metric([gpu], pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            clock.add_metric([gpu], pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM) * 1e6)
    except pynvml.NVMLError as error:
        log.warning("cannot query GPUs through NVML: %s", error)
    yield from (memory, utilization, clock)


@cache
def nvml_is_available() -> bool:
    """Initializes NVML. Cached, so that a failure is logged once and not at every scrape."""
    try:
        import pynvml
    except ImportError:
        log.warning("no GPU metrics: nvidia-ml-py is not installed: pip install 'vitserve[gpu]'")
        return False
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.warning("no GPU metrics: %s", error)
        return False
    return True
