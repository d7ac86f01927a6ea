"""Overloads the server and measures goodput, rejections, their latencies, and the accuracy of Retry-After.

    python -m benchmarks.overload

The engine has one thread. On a machine with two cores, the other core is shared by the HTTP worker and this client.
Arrivals are Poisson and do not wait for responses. Because the speed of a machine drifts, the overload is split into
intervals. The capacity is measured before and after each interval, and goodput is compared with the mean of the two.
Goodput counts only responses that arrive in time and within the interval.

Retry-After is compared with the time until the same request is admitted, without other requests in between.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.processes import free_port, process_tree
from benchmarks.servers import ROOT, is_ready
from vitserve.bench.client import Client, run
from vitserve.bench.load import LoadResult, Sample, closed_loop, open_loop
from vitserve.bench.report import percentile, throughput
from vitserve.bench.request import EncodedImage, get, raw, write_sample_image
from vitserve.service.settings import DEFAULT_BUNDLE

CONNECTIONS = 32  # of the closed loop: enough to fill batches while other images are decoded


class Reply(NamedTuple):
    status: int
    retry_after_seconds: float


class Interval(NamedTuple):
    load: LoadResult
    timeout_seconds: float
    capacity: float  # responses per second, mean of the measurements before and after

    @property
    def sent(self) -> list[Sample]:
        return [sample for sample in self.load.samples if 0 <= sample.sent < self.load.seconds]

    @property
    def offered(self) -> float:
        """Requests sent per second. Lower than planned if the client is behind schedule."""
        return len(self.sent) / self.load.seconds

    @property
    def goodput(self) -> float:
        ended = [sample for sample in self.load.samples if 0 <= sample.ended < self.load.seconds]
        good = [sample for sample in ended if sample.outcome == "200" and waited(sample) <= self.timeout_seconds]
        return len(good) / self.load.seconds


def waited(sample: Sample) -> float:
    """Seconds since the request was sent, which is also when its timeout starts."""
    return sample.ended - sample.sent


class ImageClient:
    """Sends one image with a given timeout and priority."""

    def __init__(self, client: Client, image: EncodedImage) -> None:
        self.client, self._image = client, image

    def request(self, timeout_ms: int, priority: int = 5) -> bytes:
        return raw(f"/v1/classify?timeout_ms={timeout_ms}", self._image, f"Vitserve-Priority: {priority}\r\n")

    async def post(self, timeout_ms: int, priority: int = 5) -> Reply:
        response = await self.client.send(self.request(timeout_ms, priority))
        retry_after = json.loads(response.body)["retry_after_seconds"] if response.status == 429 else 0.0
        return Reply(response.status, retry_after)

    async def decoded(self) -> int:
        """Number of images that the server has decoded since it started."""
        body = (await self.client.send(get("/metrics"))).body
        return int(float(body.partition(b"\nvitserve_decode_seconds_count ")[2].split(b"\n", 1)[0]))

    async def capacity(self, seconds: float) -> float:
        """Responses per second in a closed loop."""
        return throughput(await closed_loop(self.client, [self.request(60_000)], CONNECTIONS, 1.0, seconds))


class RetryAfter(NamedTuple):
    advised_seconds: float  # in the first response with status 429
    actual_seconds: float  # until the request was admitted


async def measure_retry_after(
    client: ImageClient, images: int, timeout_ms: int, priority: int, probe_timeout_ms: int, probe_priority: int
) -> RetryAfter | None:
    """Fills the queue with ``images``, then repeats a request until it is admitted. None if it is admitted at once."""
    before = await client.decoded()
    queued = [asyncio.create_task(client.post(timeout_ms, priority)) for _ in range(images)]
    while await client.decoded() < before + images:
        await asyncio.sleep(0.01)
    first: tuple[float, float] | None = None
    while True:
        sent = time.monotonic()
        task = asyncio.create_task(client.post(probe_timeout_ms, probe_priority))
        await asyncio.wait([task], timeout=0.01)
        if not task.done() or task.result().status == 200:  # a request that waits has been admitted
            break
        if first is None:
            first = (sent, task.result().retry_after_seconds)
        await asyncio.sleep(0.001)
    await asyncio.gather(*queued, task)
    return RetryAfter(first[1], sent - first[0]) if first is not None else None


class Result(NamedTuple):
    intervals: list[Interval]
    retry_after: list[RetryAfter]


async def measure(port: int, image: EncodedImage, options: argparse.Namespace) -> Result:
    client = ImageClient(Client("127.0.0.1", port), image)
    timeout_seconds, seconds = options.timeout_ms / 1000, options.seconds / options.intervals
    intervals, probes = list[Interval](), list[RetryAfter]()
    capacity = await client.capacity(max(2.0, seconds / 2))
    for number in range(options.intervals):
        requests, rate = [client.request(options.timeout_ms)], options.times * capacity
        warm_up = 2 * timeout_seconds  # fills the queue
        load = await open_loop(client.client, requests, rate, warm_up, seconds, seed=number)
        after = await client.capacity(max(2.0, seconds / 2))
        intervals.append(Interval(load, timeout_seconds, (capacity + after) / 2))
        capacity = after
    for number in range(options.probes):
        # The queue holds 1 to 2 seconds of urgent work. The probe has a low priority and a timeout of 250 ms.
        images = max(1, int(capacity * (1 + number / options.probes)))
        probe = await measure_retry_after(client, images, 60_000, 9, 250, 1)
        probes += [probe] if probe is not None else []
    client.client.close()
    return Result(intervals, probes)


def report(result: Result) -> Table:
    intervals = result.intervals
    factor = statistics.median(interval.offered / interval.capacity for interval in intervals)
    table = Table("", "", show_header=False, title=f"offered load: {factor:.1f} × the capacity")
    for name, text in _report_lines(result).items():
        try:
            table.add_row(name, text())
        except (ValueError, ZeroDivisionError, statistics.StatisticsError):  # there are no samples
            table.add_row(name, "–")
    return table


def _report_lines(result: Result) -> dict[str, Callable[[], str]]:
    intervals = result.intervals
    timeout = intervals[0].timeout_seconds
    sent = [sample for interval in intervals for sample in interval.sent]
    successful = [waited(sample) for sample in sent if sample.outcome == "200"]
    rejected = [waited(sample) for sample in sent if sample.outcome == "429"]
    delay = percentile([sample.sent - sample.planned for sample in sent], 0.99)
    statuses = sorted(Counter(sample.outcome for sample in sent).items())
    shares = [interval.goodput / interval.capacity for interval in intervals]
    ratios = sorted(probe.advised_seconds / probe.actual_seconds for probe in result.retry_after)

    def per_second(values: Sequence[float]) -> str:
        return f"{', '.join(f'{value:.1f}' for value in values)} images/s"

    def p50_and_p99(seconds: Sequence[float]) -> str:
        p50, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
        return f"{1000 * p50:.3g} ms, {1000 * p99:.3g} ms"

    def retry_after() -> str:
        shortest = min(probe.actual_seconds for probe in result.retry_after)
        return f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} (the shortest actual time is {shortest:.2f} s)"

    return {
        "capacity, closed loop": lambda: per_second([interval.capacity for interval in intervals]),
        "offered load": lambda: per_second([interval.offered for interval in intervals]),
        "timeout": lambda: f"{1000 * timeout:.0f} ms",
        "client send delay, p99": lambda: "–" if delay is None else f"{1000 * delay:.1f} ms",
        "statuses": lambda: ", ".join(f"{status}: {count}" for status, count in statuses),
        "goodput": lambda: per_second([interval.goodput for interval in intervals]),
        "goodput / capacity": lambda: f"median {statistics.median(shares):.1%} ({min(shares):.1%} – {max(shares):.1%})",
        "admitted requests within the timeout": lambda: (
            f"{sum(seconds <= timeout for seconds in successful) / (len(sent) - len(rejected)):.2%}"
        ),
        "latency of successful requests, p50 and p99": lambda: p50_and_p99(successful),
        "latency of rejections, p50 and p99": lambda: p50_and_p99(rejected),
        "Retry-After / actual time until admission": retry_after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--image", type=Path, help="JPEG to send (default: a generated one)")
    parser.add_argument("--times", type=float, default=3.0, help="offered load, as a multiple of the capacity")
    parser.add_argument("--seconds", type=float, default=30.0, help="of overload, in all intervals together")
    parser.add_argument("--intervals", type=int, default=3)
    parser.add_argument("--timeout-ms", type=int, default=500)
    parser.add_argument("--probes", type=int, default=8, help="number of tests of Retry-After")
    options = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "vitserve", "serve", "--bundle", str(options.bundle.resolve())]
    command += ["--port", str(port), "--threads", "1", "--slots", "1024"]
    with tempfile.TemporaryDirectory() as directory:
        image = EncodedImage((options.image or write_sample_image(directory)).read_bytes(), "image/jpeg")
    with process_tree(command, ROOT, {}, port, partial(is_ready, port)):
        result = run(measure(port, image, options))
    Console(width=140).print(report(result))


if __name__ == "__main__":
    main()
