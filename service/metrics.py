"""What Prometheus sees. The registry is injected, so that a test gets a fresh one. Base units; histograms add up across replicas."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# From 50 µs, because that is what reading and decoding a small image take, to 30 s; each about twice the one before.
_SECONDS = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter("vitserve_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "vitserve_request_seconds", "Whole request, from its headers to its answer.", ["route"], registry=registry, buckets=_SECONDS
        )
        self.read_seconds = Histogram("vitserve_read_seconds", "Reading a request's body.", registry=registry, buckets=_SECONDS)
        self.decode_seconds = Histogram("vitserve_decode_seconds", "Decoding, resizing and cropping an image.", registry=registry, buckets=_SECONDS)
        self.queue_seconds = Histogram(
            "vitserve_queue_seconds", "An image's waiting: for a decode thread, then for a lane.", registry=registry, buckets=_SECONDS
        )
        self.run_seconds = Histogram("vitserve_run_seconds", "The engine's run of a batch.", registry=registry, buckets=_SECONDS)
        self.batch_size = Histogram("vitserve_batch_size", "Images in a batch.", registry=registry, buckets=_SIZES)
        self.queue_length = Gauge("vitserve_queue_length", "Decoded images that wait for a lane.", registry=registry)
        self.images_in_flight = Gauge("vitserve_images_in_flight", "Images that hold a slot.", registry=registry)
        self.images = Counter("vitserve_images", "Images by outcome: ok, or the code of the problem.", ["outcome"], registry=registry)
        self.images_shed = Counter("vitserve_images_shed", "Images refused because they could not be answered in time.", ["reason"], registry=registry)
        self.engine_failures = Counter("vitserve_engine_failures", "Batches that the engine failed to run.", registry=registry)
        self.ready = Gauge("vitserve_ready", "1 when the service can answer well now.", registry=registry)
        self.model_info = Gauge("vitserve_model_info", "Which model is served, by what.", ["name", "version", "engine", "precision"], registry=registry)
