"""Measures vitserve with a single client: start-up time, memory, and latency besides inference and decoding.

    python -m benchmarks.single_client --images PHOTOS --serve="--bundle BUNDLE --streams 1 --threads 2"

Memory is the proportional set size (PSS) of all processes, which needs Linux. The times of inference and decoding
are from the Server-Timing header of the responses.
"""

from __future__ import annotations

import argparse
import re
import shlex
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.processes import StartedServer, free_port, process_family, process_tree
from benchmarks.servers import ROOT, is_ready, post_classify
from vitserve.bench.client import ResponseReader
from vitserve.bench.report import stdout_console
from vitserve.bench.request import EncodedImage, read_encoded_images

_WARM_UP_REQUESTS = 10
_READY_PAUSE_SECONDS = 0.01
_TIMING = re.compile(rb"(\w+);dur=([\d.]+)")


class Latency(NamedTuple):
    """Of one request, in milliseconds."""

    total: float
    decode: float
    inference: float

    @property
    def overhead(self) -> float:
        return self.total - self.decode - self.inference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="image file, or directory of images")
    parser.add_argument("--serve", default="", help="additional options of `vitserve serve`")
    parser.add_argument("--starts", type=int, default=3, help="how often to start the server")
    parser.add_argument("--requests", type=int, default=140, help="number of requests after each start")
    parser.add_argument(
        "--pause-ms", type=float, default=0.0, help="idle time before each request (cools the CPU caches)"
    )
    options = parser.parse_args()
    images, console = read_encoded_images(options.images), stdout_console()
    for _ in range(options.starts):
        port = free_port()
        command = [sys.executable, "-m", "vitserve", "serve", "--port", str(port), *shlex.split(options.serve)]
        with process_tree(command, ROOT, {}, port, partial(is_ready, port), _READY_PAUSE_SECONDS) as started:
            count = options.requests + _WARM_UP_REQUESTS
            latencies = send_all(port, images, count, options.pause_ms / 1000)[_WARM_UP_REQUESTS:]
            console.print(summary_line(started, latencies), highlight=False)


def summary_line(started: StartedServer, latencies: Sequence[Latency]) -> str:
    memory = sum(process.memory_full_info().pss for process in process_family(started.process))
    total = statistics.median(latency.total for latency in latencies)
    inference = statistics.median(latency.inference for latency in latencies)
    decode = statistics.median(latency.decode for latency in latencies)
    overhead = statistics.median(latency.overhead for latency in latencies)
    return (
        f"ready after {started.start_seconds:.2f} s, {memory / 1e6:.0f} MB; p50 of {len(latencies)} requests:"
        f" {total:.2f} ms = inference {inference:.2f} + decoding {decode:.2f} + other {overhead:.2f}"
    )


def send_all(port: int, images: Sequence[EncodedImage], count: int, pause_seconds: float) -> list[Latency]:
    """Sends the requests one after another on one connection. Raises RuntimeError for a status other than 200."""
    requests = [post_classify(image) for image in images]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return [_send(connection, requests[number % len(requests)], pause_seconds) for number in range(count)]


def _send(connection: socket.socket, request: bytes, pause_seconds: float) -> Latency:
    """Measures until the last byte of the response arrives. Parsing it is not part of the latency."""
    reader, received = ResponseReader(), b""
    time.sleep(pause_seconds)
    began = time.perf_counter()
    connection.sendall(request)
    while True:
        data = connection.recv(65536)
        total_ms = 1000 * (time.perf_counter() - began)
        if not data:
            raise RuntimeError(f"the server closed the connection after {len(received)} bytes of a response")
        received += data
        for response in reader.feed(data):
            if response.status != 200:
                raise RuntimeError(f"the server responded with status {response.status}")
            timing = {name.decode(): float(milliseconds) for name, milliseconds in _TIMING.findall(received)}
            return Latency(total_ms, timing["decode"], timing["inference"])


if __name__ == "__main__":
    main()
