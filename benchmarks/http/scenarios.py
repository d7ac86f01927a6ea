"""The scenarios, and the loads of each. A case measures one server under one load."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.http import idle, overload, photos, retry_after, throughput, vit_b16
from benchmarks.http.load.requests import json_request, multipart_request
from benchmarks.http.overload import Arrivals, classify_requests
from benchmarks.http.results import Measured
from benchmarks.http.throughput import ClosedLoop
from benchmarks.processes import StartedServer
from benchmarks.servers import Server
from vitserve.bench.report import connections
from vitserve.bench.request import EncodedImage, read_encoded_images

IMAGES_IN_FLIGHT = 64  # of the scenario decode, on as many connections or on fewer with several images a request
IMAGES_IN_A_REQUEST = 8  # on 64 connections, they would exceed the slots of the default settings
PRECISION = "int8"  # of the scenario vit_b16


@dataclass(frozen=True)
class Target:
    """A running server."""

    name: str
    server: Server
    started: StartedServer

    @property
    def port(self) -> int:
        return self.server.port


@dataclass(frozen=True)
class Case:
    load: str
    measure: Callable[[Target, int], Measured]  # of a target in a round
    vitserve_only: bool = False


@dataclass(frozen=True)
class Scenario:
    cases: Callable[[argparse.Namespace], Iterable[Case]]
    model: str  # one-block, default or bundle (the one given by --bundle)
    description: str
    serve_options: Sequence[str] = ()

    @property
    def has_peers(self) -> bool:
        return self.model == "one-block"


def _throughput(options: argparse.Namespace) -> Iterator[Case]:
    image = photos.thumbnail()
    for count in options.connections:
        yield Case(f"1 KB, {connections(count)}", partial(_single_images, options, image, count))


def _decode(options: argparse.Namespace) -> Iterator[Case]:
    image = photos.small_photo()
    single = partial(_single_images, options, image, IMAGES_IN_FLIGHT)
    yield Case(f"36 KB, {connections(IMAGES_IN_FLIGHT)}", single)
    clients = IMAGES_IN_FLIGHT // IMAGES_IN_A_REQUEST
    for form, build in (("multipart", multipart_request), ("JSON", json_request)):
        requests = [build("/v1/classify", [image] * IMAGES_IN_A_REQUEST)]
        load = ClosedLoop(requests, clients, options.seconds, IMAGES_IN_A_REQUEST)
        title = f"{IMAGES_IN_A_REQUEST} × 36 KB as {form}, {connections(clients)}"
        yield Case(title, partial(_closed_loop, load), vitserve_only=True)


def _rejections(options: argparse.Namespace) -> Iterator[Case]:
    for size, images in _payloads(options):
        requests = classify_requests(images, timeout_ms=1)
        for count in options.connections:
            load = ClosedLoop(requests, count, options.seconds, rejected=True)
            yield Case(f"{size}, {connections(count)}", partial(_closed_loop, load), vitserve_only=True)


def _overload(options: argparse.Namespace) -> Iterator[Case]:
    for size, images in _payloads(options):
        for arrivals in options.arrivals:
            for multiple in options.multiples:
                measure = partial(_overloaded, options, images, multiple, arrivals == "new")
                yield Case(f"{size}, {arrivals}, {multiple:g} ×", measure, vitserve_only=True)


def _payloads(options: argparse.Namespace) -> Iterator[tuple[str, Sequence[EncodedImage]]]:
    if "77KB" in options.payloads:
        yield "77 KB", [photos.large_photo()]
    if "1KB" in options.payloads:
        yield "1 KB", [photos.thumbnail()]
    if "photos" in options.payloads and options.photos is not None:
        images = read_encoded_images(options.photos)
        yield f"{len(images)} photos", images


def _retry_after(options: argparse.Namespace) -> Iterator[Case]:
    def measure(target: Target, _round: int) -> Measured:
        image = photos.thumbnail()
        capacity = overload.measure_capacity(target.port, [image], options.capacity_seconds)
        return retry_after.measure(target.port, image, capacity, options.probes)

    yield Case("1 KB", measure, vitserve_only=True)


def _idle(options: argparse.Namespace) -> Iterator[Case]:
    yield Case("no requests", lambda target, _: idle.measure(target.started, options.seconds), vitserve_only=True)


def _vit_b16(options: argparse.Namespace) -> Iterator[Case]:
    images = read_encoded_images(options.photos) if options.photos is not None else [photos.large_photo()]

    def measure(target: Target, _round: int) -> Measured:
        return vit_b16.measure(target.server, options.bundle, PRECISION, images, options.seconds)

    yield Case(f"{len(images)} images", measure, vitserve_only=True)


def _single_images(
    options: argparse.Namespace, image: EncodedImage, count: int, target: Target, _round: int
) -> Measured:
    load = ClosedLoop([target.server.request(image)], count, options.seconds)
    return throughput.measure(target.port, target.started, load)


def _closed_loop(load: ClosedLoop, target: Target, _round: int) -> Measured:
    return throughput.measure(target.port, target.started, load)


def _overloaded(
    options: argparse.Namespace,
    images: Sequence[EncodedImage],
    multiple: float,
    reconnect: bool,
    target: Target,
    number: int,
) -> Measured:
    capacity_seconds = options.capacity_seconds
    load = Arrivals(images, multiple, reconnect, options.timeout_ms, options.seconds, capacity_seconds, seed=number)
    return overload.measure(target.port, load)


SCENARIOS = {
    "throughput": Scenario(_throughput, "one-block", "1 KB JPEGs, closed loop: requests/s, latency, CPU time"),
    "decode": Scenario(_decode, "one-block", "36 KB JPEGs, 64 in flight, one or eight in a request: images/s"),
    "rejections": Scenario(_rejections, "default", "timeouts that no image can meet: CPU time of a rejection"),
    "overload": Scenario(_overload, "default", "Poisson arrivals above capacity: goodput, rejections, liveness"),
    "retry_after": Scenario(
        _retry_after, "default", "Retry-After compared with the actual time", retry_after.SERVE_OPTIONS
    ),
    "idle": Scenario(_idle, "default", "memory and CPU time without requests"),
    "vit_b16": Scenario(_vit_b16, "bundle", "ViT-B/16 in int8: the server compared with its engine alone (--bundle)"),
}
