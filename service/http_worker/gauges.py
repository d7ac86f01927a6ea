"""The gauges of one HTTP worker, computed for each scrape of /metrics. metrics.py has the counters and histograms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from vitserve.service.http_worker.dispatch.dispatcher import Dispatcher
from vitserve.service.http_worker.dispatch.offered_load import Rates, saturation
from vitserve.service.http_worker.gpu_gauges import gpu_gauges
from vitserve.service.http_worker.state import State
from vitserve.service.ipc.control_messages import Status
from vitserve.service.ipc.memory_layout import HELD, RUNNING, WAITING


def gauges(state: State) -> Iterable[Metric]:
    ready = GaugeMetricFamily("vitserve_ready", "1 if the service is ready.")
    ready.add_metric([], float(not state.reasons()))
    yield ready
    yield from _load(state)
    yield _rejected(state)
    yield from _supervisor_counters(state.status)
    yield from gpu_gauges()


def _load(state: State) -> Iterator[Metric]:
    """The load, from the slot table, and the model that is served."""
    queue = GaugeMetricFamily("vitserve_queue_length", "Decoded images that wait for inference.")
    in_flight = GaugeMetricFamily("vitserve_images_in_flight", "Images that occupy a slot.")
    capacity = GaugeMetricFamily(
        "vitserve_stage_capacity", "Capacity of each stage in concurrent executions.", labels=["stage"]
    )
    saturated = GaugeMetricFamily(
        "vitserve_saturation", "Offered load divided by capacity, of the stage where that is highest."
    )
    labels = ["name", "version", "engine", "precision"]
    model_info = GaugeMetricFamily("vitserve_model_info", "The model that is served, and its engine.", labels=labels)
    if state.current is not None:
        slot_table, model = state.current.slot_table, state.current.model_info
        available = Rates(state.decode_threads * slot_table.shape.workers, state.current.streams)
        queue.add_metric([], slot_table.count(WAITING))
        in_flight.add_metric([], slot_table.count(HELD, WAITING, RUNNING))
        capacity.add_metric(["decode"], available.decode)
        capacity.add_metric(["inference"], available.inference)
        saturated.add_metric([], _saturation(state.current, available))
        model_info.add_metric([model.name, model.version, model.engine, model.precision], 1)
    yield from (queue, in_flight, capacity, saturated, model_info)


def _saturation(dispatcher: Dispatcher, available: Rates) -> float:
    """While the engine worker restarts, its streams count as available: more replicas would not shorten the restart."""
    streams = available.inference or dispatcher.slot_table.shape.streams
    return saturation(dispatcher.offered_load.rates(), available._replace(inference=streams))


def _rejected(state: State) -> Metric:
    rejected = GaugeMetricFamily(
        "vitserve_engine_rejected",
        "1 for each engine that was preferred to the one that serves but cannot be used, by cause.",
        labels=["engine", "precision", "cause"],
    )
    for engine in state.rejected():
        rejected.add_metric([engine["engine"], engine["precision"], engine["cause"]], 1)
    return rejected


def _supervisor_counters(status: Status) -> Iterator[Metric]:
    restarts = CounterMetricFamily(
        "vitserve_restarts", "Processes that exited or hung and were restarted.", labels=["process", "cause"]
    )
    for process, causes in status.restarts.items():
        for cause, count in causes.items():
            restarts.add_metric([process, cause], count)
    reloads = CounterMetricFamily("vitserve_reloads", "Reloads of the bundle, by result.", labels=["result"])
    for result, count in status.reloads.items():
        reloads.add_metric([result], count)
    yield from (restarts, reloads)
