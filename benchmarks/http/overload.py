"""Overload: Poisson arrivals above the capacity, while a probe of liveness runs beside them.

The capacity is measured by a closed loop before and after each turn, because the speed of a machine drifts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.http.load_generator import Load, run, started
from benchmarks.http.quantiles import quantile_ms
from vitserve.bench.load import LoadResult, Sample
from vitserve.bench.report import throughput
from vitserve.bench.request import EncodedImage, raw

CAPACITY_CONNECTIONS = 32  # of the closed loop: enough to fill batches while other images are decoded
KEPT_CONNECTIONS = 64  # opened before the first arrival
NO_TIMEOUT_MS = 60_000
PROBES_PER_SECOND = 10.0
_LIVENESS = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: kube-probe\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Arrivals:
    """The load of one turn."""

    images: Sequence[EncodedImage]
    multiple: float  # of the capacity
    reconnect: bool  # a new connection for each request
    timeout_ms: int
    seconds: float
    capacity_seconds: float
    seed: int


@dataclass(frozen=True)
class Overload:
    """What the clients saw in one turn. Times in ms are None if there is no such response."""

    capacity: float  # responses per second in a closed loop, mean of before and after
    offered: float  # requests sent per second
    goodput: float  # responses with status 200 within the timeout and the interval, per second
    admitted: int  # requests that were not rejected with status 429
    in_time: int  # of them, those with status 200 within the timeout
    outcomes: dict[str, int]
    success_p50_ms: float | None
    success_p99_ms: float | None
    rejected_p50_ms: float | None
    rejected_p99_ms: float | None
    live_ms: list[float]  # latency of each answered liveness probe
    live_failures: int  # probes with another status than 200, or without a response
    lag_p99_ms: float | None  # by how much the generator sent requests later than planned
    generator_cores: float

    @property
    def goodput_share(self) -> float:
        return self.goodput / self.capacity

    @property
    def in_time_share(self) -> float | None:
        return self.in_time / self.admitted if self.admitted else None


def classify_requests(images: Sequence[EncodedImage], timeout_ms: int) -> list[bytes]:
    return [raw(f"/v1/classify?timeout_ms={timeout_ms}", image) for image in images]


def measure_capacity(port: int, images: Sequence[EncodedImage], seconds: float) -> float:
    """Responses with status 200 per second in a closed loop."""
    requests = classify_requests(images, NO_TIMEOUT_MS)
    return throughput(run(port, Load(requests, seconds, warm_up=0.5, connections=CAPACITY_CONNECTIONS)))


def measure_turn(port: int, arrivals: Arrivals) -> Overload:
    """Raises ToolMissingError, and RuntimeError if the load generator failed."""
    before = measure_capacity(port, arrivals.images, arrivals.capacity_seconds)
    timeout_seconds = arrivals.timeout_ms / 1000
    load = Load(
        classify_requests(arrivals.images, arrivals.timeout_ms),
        arrivals.seconds,
        warm_up=2 * timeout_seconds,  # fills the queue
        rate=arrivals.multiple * before,
        connections=KEPT_CONNECTIONS,
        reconnect=arrivals.reconnect,
        seed=arrivals.seed,
    )
    probes = Load([_LIVENESS], load.seconds, load.warm_up, PROBES_PER_SECOND, reconnect=True, uniform=True)
    with started(port, probes) as running_probes:
        result = run(port, load)
        live = running_probes.result().measured()
    after = measure_capacity(port, arrivals.images, arrivals.capacity_seconds)
    return summarize(result, live, timeout_seconds, (before + after) / 2)


def _waited(sample: Sample) -> float:
    """Seconds since the request was sent, which is also when its timeout begins."""
    return sample.ended - sample.sent


def summarize(load: LoadResult, live: Sequence[Sample], timeout_seconds: float, capacity: float) -> Overload:
    sent = [sample for sample in load.samples if 0 <= sample.sent < load.seconds]
    successes = [sample for sample in sent if sample.outcome == "200"]
    rejected = [_waited(sample) for sample in sent if sample.outcome == "429"]
    good = [sample for sample in load.samples if sample.outcome == "200" and _waited(sample) <= timeout_seconds]
    answered = [1000 * _waited(sample) for sample in live if sample.outcome == "200"]
    return Overload(
        capacity=capacity,
        offered=len(sent) / load.seconds,
        goodput=sum(0 <= sample.ended < load.seconds for sample in good) / load.seconds,
        admitted=len(sent) - len(rejected),
        in_time=sum(_waited(sample) <= timeout_seconds for sample in successes),
        outcomes=dict(sorted(Counter(sample.outcome for sample in sent).items())),
        success_p50_ms=quantile_ms([_waited(sample) for sample in successes], 0.5),
        success_p99_ms=quantile_ms([_waited(sample) for sample in successes], 0.99),
        rejected_p50_ms=quantile_ms(rejected, 0.5),
        rejected_p99_ms=quantile_ms(rejected, 0.99),
        live_ms=answered,
        live_failures=len(live) - len(answered),
        lag_p99_ms=quantile_ms([sample.sent - sample.planned for sample in sent], 0.99),
        generator_cores=load.client_cores,
    )
