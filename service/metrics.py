"""What Prometheus sees. Base units; histograms add up across processes and replicas.

Counters and histograms live in files, one set a process (prometheus-client's multiprocess mode). The files are named after the process's role
and not its pid, so that a process that takes over from a dead one goes on counting where it stopped. Gauges are not kept at all: each scrape
computes them from the slots and from what the supervisor said last, so nobody who died leaves one behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from vitserve.service.ipc.control_channel import METRICS_DIR

# From 50 µs, because that is what reading and decoding a small image take, to 30 s; each about twice the one before.
_SECONDS = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Of a HTTP worker and of an engine alike; each counts what it sees."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter("vitserve_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "vitserve_request_seconds",
            "Whole request, from its headers to its answer.",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.read_seconds = Histogram(
            "vitserve_read_seconds", "Reading a request's body.", registry=registry, buckets=_SECONDS
        )
        self.decode_seconds = Histogram(
            "vitserve_decode_seconds", "Decoding, resizing and cropping an image.", registry=registry, buckets=_SECONDS
        )
        self.queue_seconds = Histogram(
            "vitserve_queue_seconds",
            "An image's waiting: for a decode thread, then for a stream.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.inference_seconds = Histogram(
            "vitserve_inference_seconds", "The engine's run of a batch.", registry=registry, buckets=_SECONDS
        )
        self.batch_size = Histogram("vitserve_batch_size", "Images in a batch.", registry=registry, buckets=_SIZES)
        self.images = Counter(
            "vitserve_images", "Images by outcome: ok, or the code of the problem.", ["outcome"], registry=registry
        )
        self.images_shed = Counter(
            "vitserve_images_shed",
            "Images rejected because they could not be answered in time.",
            ["reason"],
            registry=registry,
        )
        self.images_retried = Counter(
            "vitserve_images_retried",
            "Images whose engine died and that were given to the next one.",
            registry=registry,
        )
        offered_load_seconds = Counter(
            "vitserve_offered_load_seconds",
            "Work asked for, admitted or shed, by the stage that would do it: see vitserve_saturation.",
            ["stage"],
            registry=registry,
        )
        self.offered_decode_seconds, self.offered_inference_seconds = (
            offered_load_seconds.labels("decode"),
            offered_load_seconds.labels("inference"),
        )
        self.engine_failures = Counter(
            "vitserve_engine_failures", "Batches that the engine failed to run.", registry=registry
        )
        # From 0 on: Prometheus does not see the first increase of a series that was not there before, and that may be the one to alert of.
        for status in ("200", "429", "500", "503", "504"):
            self.requests.labels("/v1/classify", status)
        for outcome in ("ok", "overloaded"):
            self.images.labels(outcome)
        for reason in ("deadline", "full"):
            self.images_shed.labels(reason)
        self.registry = registry


def in_files(process: str) -> Metrics:
    """The metrics of a process that the supervisor started: ``process`` is unique among those that run at one time."""
    values.ValueClass = values.MultiProcessValue(lambda: process)  # type: ignore[no-untyped-call]
    return Metrics(CollectorRegistry())


class Exposition:
    """All processes' counters and histograms, with the gauges of this moment."""

    def __init__(self, gauges: Callable[[], Iterable[Metric]], metrics: Metrics) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfAll({each.name: each.documentation for each in metrics.registry.collect()}))
        self._registry.register(_Now(gauges))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _OfAll(Collector):
    """What the files hold, explained: the files themselves do not say what a metric means."""

    def __init__(self, documentation: dict[str, str]) -> None:
        self._files = MultiProcessCollector(None, os.environ[METRICS_DIR])  # type: ignore[no-untyped-call]
        self._documentation = documentation

    def collect(self) -> Iterable[Metric]:
        for metric in self._files.collect():  # type: ignore[no-untyped-call]
            metric.documentation = self._documentation[metric.name]
            yield metric


class _Now(Collector):
    def __init__(self, gauges: Callable[[], Iterable[Metric]]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        return self._gauges()
