"""The loads of each scenario: a case measures one server under one load."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.http import overload, photos, throughput
from benchmarks.http.overload import Arrivals, Overload
from benchmarks.http.throughput import Throughput
from benchmarks.processes import StartedServer
from benchmarks.servers import Server
from vitserve.bench.report import connections
from vitserve.bench.request import EncodedImage, read_encoded_images

IMAGES_IN_FLIGHT = 64  # of the scenario decode, on as many connections or on fewer with several images a request
IMAGES_IN_A_REQUEST = 8  # on 64 connections, they would exceed the slots of the default settings

Measured = Throughput | Overload


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


def throughput_cases(options: argparse.Namespace) -> Iterator[Case]:
    image = photos.thumbnail()
    for count in options.connections:
        measure = partial(_single_images, image=image, connections=count, seconds=options.seconds)
        yield Case(f"1 KB, {connections(count)}", measure)


def decode_cases(options: argparse.Namespace) -> Iterator[Case]:
    image = photos.small_photo()
    single = partial(_single_images, image=image, connections=IMAGES_IN_FLIGHT, seconds=options.seconds)
    yield Case(f"36 KB, {connections(IMAGES_IN_FLIGHT)}", single)
    several = [image] * IMAGES_IN_A_REQUEST
    for title, build in (("multipart", photos.multipart_request), ("JSON", photos.json_request)):
        request = build("/v1/classify", several)
        measure = partial(_several_images, request=request, seconds=options.seconds)
        clients = connections(IMAGES_IN_FLIGHT // IMAGES_IN_A_REQUEST)
        yield Case(f"{IMAGES_IN_A_REQUEST} × 36 KB as {title}, {clients}", measure, vitserve_only=True)


def overload_cases(options: argparse.Namespace) -> Iterator[Case]:
    for title, images in _overload_images(options):
        for arrivals in options.arrivals:
            for multiple in options.multiples:
                measure = partial(_overloaded, images=images, multiple=multiple, arrivals=arrivals, options=options)
                yield Case(f"{title}, {arrivals}, {multiple:g} ×", measure, vitserve_only=True)


def _overload_images(options: argparse.Namespace) -> Iterator[tuple[str, Sequence[EncodedImage]]]:
    if "77KB" in options.images:
        yield "77 KB", [photos.large_photo()]
    if "1KB" in options.images:
        yield "1 KB", [photos.thumbnail()]
    if "photos" in options.images and options.photos is not None:
        images = read_encoded_images(options.photos)
        yield f"{len(images)} photos", images


def _single_images(target: Target, _round: int, image: EncodedImage, connections: int, seconds: int) -> Throughput:
    return throughput.measure(target.port, target.started, [target.server.request(image)], 1, connections, seconds)


def _several_images(target: Target, _round: int, request: bytes, seconds: int) -> Throughput:
    count = IMAGES_IN_FLIGHT // IMAGES_IN_A_REQUEST
    return throughput.measure(target.port, target.started, [request], IMAGES_IN_A_REQUEST, count, seconds)


def _overloaded(
    target: Target,
    number: int,
    images: Sequence[EncodedImage],
    multiple: float,
    arrivals: str,
    options: argparse.Namespace,
) -> Overload:
    return overload.measure_turn(
        target.port,
        Arrivals(
            images,
            multiple,
            reconnect=arrivals == "new",
            timeout_ms=options.timeout_ms,
            seconds=options.seconds,
            capacity_seconds=options.capacity_seconds,
            seed=number,
        ),
    )
