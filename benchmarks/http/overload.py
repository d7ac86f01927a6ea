"""Overload: Poisson arrivals above the capacity, while a probe of liveness runs beside them.

The capacity is measured by a closed loop before and after each turn, because the speed of a machine drifts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.http.load.load_generator import Load, run, started
from benchmarks.http.quantiles import quantile, quantile_ms, short, spread
from vitserve.bench.load import LoadResult, Sample
from vitserve.bench.report import throughput
from vitserve.bench.request import EncodedImage, raw

CAPACITY_CONNECTIONS = 32  # of the closed loop: enough to fill batches while other images are decoded
KEPT_CONNECTIONS = 64  # opened before the first arrival
NO_TIMEOUT_MS = 60_000
PROBES_PER_SECOND = 10.0
GIVE_UP_SECONDS = 5.0  # of a client, and the timeout of the liveness probe in k8s/
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
    seed: int = 1


@dataclass(frozen=True)
class Overload:
    """The responses that the clients got in one turn. Times in ms are None if there is no such response."""

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
    live_ms: list[float]  # time until each liveness probe was answered, or was given up
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


def measure(port: int, arrivals: Arrivals) -> Overload:
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
        give_up=GIVE_UP_SECONDS,
    )
    probes = replace(load, requests=[_LIVENESS], rate=PROBES_PER_SECOND, reconnect=True, uniform=True)
    with started(port, probes) as running_probes:  # a process of its own, which the load does not delay
        result = run(port, load)
        live = running_probes.result().measured()
    after = measure_capacity(port, arrivals.images, arrivals.capacity_seconds)
    return summarize(result, live, timeout_seconds, (before + after) / 2)


def _waited(sample: Sample) -> float:
    """Seconds since the request was sent, which is also when its timeout begins."""
    return sample.ended - sample.sent


def summarize(load: LoadResult, live: Sequence[Sample], timeout_seconds: float, capacity: float) -> Overload:
    sent = [sample for sample in load.samples if 0 <= sample.sent < load.seconds]
    successes = [_waited(sample) for sample in sent if sample.outcome == "200"]
    rejected = [_waited(sample) for sample in sent if sample.outcome == "429"]
    good = [sample for sample in load.samples if sample.outcome == "200" and _waited(sample) <= timeout_seconds]
    return Overload(
        capacity=capacity,
        offered=len(sent) / load.seconds,
        goodput=sum(0 <= sample.ended < load.seconds for sample in good) / load.seconds,
        admitted=len(sent) - len(rejected),
        in_time=sum(seconds <= timeout_seconds for seconds in successes),
        outcomes=dict(sorted(Counter(sample.outcome for sample in sent).items())),
        success_p50_ms=quantile_ms(successes, 0.5),
        success_p99_ms=quantile_ms(successes, 0.99),
        rejected_p50_ms=quantile_ms(rejected, 0.5),
        rejected_p99_ms=quantile_ms(rejected, 0.99),
        live_ms=[round(1000 * _waited(sample), 3) for sample in live],
        live_failures=sum(sample.outcome != "200" for sample in live),
        lag_p99_ms=quantile_ms([sample.sent - sample.planned for sample in sent], 0.99),
        generator_cores=load.client_cores,
    )


def cells(turns: Sequence[Overload]) -> dict[str, str]:
    """The columns of a table: median (minimum – maximum) of the turns. Liveness probes of all turns count together."""

    def over(value: Callable[[Overload], float | None], scale: float = 1.0, digits: int = 3) -> str:
        return spread([scale * number for turn in turns if (number := value(turn)) is not None], digits)

    live = [latency for turn in turns for latency in turn.live_ms]
    failures = sum(turn.live_failures for turn in turns)
    lost = sum(count for turn in turns for outcome, count in turn.outcomes.items() if not outcome.isdecimal())
    errors = sum(count for turn in turns for outcome, count in turn.outcomes.items() if outcome[0] == "5")
    liveness = f"{short(quantile(live, 0.5))} / {short(quantile(live, 0.99))}" if live else "–"
    return {
        "capacity": over(lambda turn: turn.capacity),
        "goodput %": over(lambda turn: turn.goodput_share, 100),
        "in time %": over(lambda turn: turn.in_time_share, 100, digits=4),
        "5xx / lost": f"{errors} / {lost}",
        "200 p50": over(lambda turn: turn.success_p50_ms),
        "429 p50": over(lambda turn: turn.rejected_p50_ms),
        "429 p99": over(lambda turn: turn.rejected_p99_ms),
        "livez p50 / p99": liveness + (f", {failures} failed" if failures else ""),
        "lag p99": over(lambda turn: turn.lag_p99_ms, digits=2),
        "client cores": over(lambda turn: turn.generator_cores, digits=2),
    }
