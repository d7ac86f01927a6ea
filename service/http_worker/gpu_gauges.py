"""What NVIDIA's driver says of its devices, for each scrape.

Calls: NVML's, by nvidia-ml-py, https://docs.nvidia.com/deploy/nvml-api. Without a device nothing is imported and nothing is said.
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
    """Of every device of the machine that we may use. Nothing, and one line in the log, where the driver cannot be asked."""
    if not machine.gpus() or not _begun():
        return
    import pynvml

    memory = GaugeMetricFamily(
        "vitserve_gpu_memory_bytes", "Device memory, by all who use the device.", labels=["gpu", "kind"]
    )
    busy = GaugeMetricFamily(
        "vitserve_gpu_utilization_ratio", "Share of the last moments in which a kernel ran.", labels=["gpu"]
    )
    clock = GaugeMetricFamily(
        "vitserve_gpu_clock_hertz",
        "Clock of the multiprocessors: lower than its peak where heat or power limit it.",
        labels=["gpu"],
    )
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle, gpu = pynvml.nvmlDeviceGetHandleByIndex(index), str(index)
            bytes_of = pynvml.nvmlDeviceGetMemoryInfo(handle)
            memory.add_metric([gpu, "used"], bytes_of.used)
            memory.add_metric([gpu, "total"], bytes_of.total)
            busy.add_metric([gpu], pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            clock.add_metric([gpu], pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM) * 1e6)
    except pynvml.NVMLError as error:
        log.warning("the driver does not tell of its GPUs: %s", error)
    yield from (memory, busy, clock)


@cache
def _begun() -> bool:
    """Once a process, and with it what is to be said of a failure."""
    try:
        import pynvml
    except ImportError:
        log.warning("no gauges of the GPUs: pip install 'vitserve[gpu]'")
        return False
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.warning("no gauges of the GPUs: %s", error)
        return False
    return True
