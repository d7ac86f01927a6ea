"""Prometheus metrics in base units. Histograms can be aggregated across processes and replicas.

Counters and histograms are stored in files, one set per process (multiprocess mode of prometheus-client). The files are
named after the role of the process instead of its pid, so that a restarted process continues the counters of its
predecessor. Gauges are not stored: each scrape computes them from the slot table and the supervisor's last status, so
that a crashed process leaves none behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from vitserve.service.ipc.control_channel import METRICS_DIR

OTHER_ROUTE = "other"  # of requests for paths that do not exist, and of those that reach no route

# From 50 µs, the time to read and decode a small image, to 30 s. Each bucket is about twice the one before.
_SECONDS = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PROBABILITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters and histograms of HTTP workers and engine workers. Each process updates those that it measures."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(name, documentation, labels, registry=registry)

        def histogram(name: str, documentation: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(name, documentation, labels, registry=registry, buckets=buckets)

        self.registry = registry
        self.requests = counter("vitserve_requests", "HTTP requests by route and status code.", "route", "status")
        self.request_seconds = histogram(
            "vitserve_request_seconds", "Time from receiving the request headers to the response.", "route"
        )
        self.read_seconds = histogram("vitserve_read_seconds", "Time to read a request body.")
        self.decode_seconds = histogram("vitserve_decode_seconds", "Time to decode, resize and crop an image.")
        self.queue_seconds = histogram(
            "vitserve_queue_seconds", "Time an image spends queued before decoding and before inference."
        )
        self.inference_seconds = histogram("vitserve_inference_seconds", "Duration of a batch in the engine.")
        self.batch_size = histogram("vitserve_batch_size", "Number of images in a batch.", buckets=_SIZES)
        self.images = counter("vitserve_images", "Images by outcome: ok, or the code of the error.", "outcome")
        self.images_ok = self.images.labels("ok")
        self.images_shed = counter(
            "vitserve_images_shed",
            "Images rejected by admission control, by reason: deadline, full, large (images), or memory.",
            "reason",
        )
        self.images_retried = counter(
            "vitserve_images_retried", "Images submitted again after their engine worker exited."
        )
        offered_load_seconds = counter(
            "vitserve_offered_load_seconds",
            "Seconds of work of all offered images, admitted or rejected, by stage: decode or inference.",
            "stage",
        )
        self.offered_decode_seconds = offered_load_seconds.labels("decode")
        self.offered_inference_seconds = offered_load_seconds.labels("inference")
        cache_images = counter(
            "vitserve_cache_images",
            "Images by how the response cache answered them: hit, shared (with the same image in flight), or miss.",
            "outcome",
        )
        self.cache_hits, self.cache_shared, self.cache_misses = map(cache_images.labels, ("hit", "shared", "miss"))
        self.predictions = counter(
            "vitserve_predictions",
            "Images by their most probable label. _other: labels beyond the first 50 that an HTTP worker predicted.",
            "head",
            "label",
        )
        self.confidence = histogram(
            "vitserve_confidence", "Probability of the most probable label.", "head", buckets=_PROBABILITIES
        )
        self.engine_failures = counter("vitserve_engine_failures", "Batches that failed in the engine.")
        # Prometheus misses the first increase of a series that did not exist before, and alerts may depend on it.
        for route in ("/v1/classify", "/v1/embed"):
            for status in ("200", "429", "500", "503", "504"):
                self.requests.labels(route, status)
        for status in ("400", "404", "405", "408", "414", "431", "503"):
            self.requests.labels(OTHER_ROUTE, status)
        # Looking up labels takes longer than counting, so those of rejections are looked up once.
        self.images_overloaded = self.images.labels("overloaded")
        reasons = "deadline", "full", "key", "large", "memory"
        self.images_shed_by_reason = {reason: self.images_shed.labels(reason) for reason in reasons}


def in_files(process: str) -> Metrics:
    """Metrics stored in the metrics directory. ``process`` is the role of this process, unique at any one time."""
    values.ValueClass = values.MultiProcessValue(lambda: process)  # type: ignore[no-untyped-call]
    return Metrics(CollectorRegistry())


class Exposition:
    """The counters and histograms of all processes, and the current gauges."""

    def __init__(self, gauges: Callable[[], Iterable[Metric]], metrics: Metrics) -> None:
        self._registry = CollectorRegistry()
        documentation = {metric.name: metric.documentation for metric in metrics.registry.collect()}
        self._registry.register(_StoredMetrics(documentation))
        self._registry.register(_Gauges(gauges))

    def collect(self) -> Iterable[Metric]:
        return self._registry.collect()

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _StoredMetrics(Collector):
    """The metrics of all processes. The files have no help texts, so these are added."""

    def __init__(self, documentation: dict[str, str]) -> None:
        self._files = MultiProcessCollector(None, os.environ[METRICS_DIR])  # type: ignore[no-untyped-call]
        self._documentation = documentation

    def collect(self) -> Iterable[Metric]:
        for metric in self._files.collect():  # type: ignore[no-untyped-call]
            metric.documentation = self._documentation[metric.name]
            yield metric


class _Gauges(Collector):
    def __init__(self, gauges: Callable[[], Iterable[Metric]]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        return self._gauges()
