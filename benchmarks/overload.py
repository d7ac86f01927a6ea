"""Three times what the service can do: who is answered, who is rejected, how soon, and whether Retry-After tells the truth.

    python -m benchmarks.overload --bundle service/default_bundle

The engine gets one thread, so that on two cores the other is left to the HTTP worker and to these clients. Arrivals are Poisson and do not wait for answers.
A machine's speed drifts, and with it what the service can do: overload comes in turns, each between two measurements of the capacity and compared with
their mean. Goodput is what was answered in time and came within the turn, so no lateness of the client and no answers after its end can raise it.
What Retry-After says is compared with how long it takes until the same request is admitted when nobody else comes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.processes import free_port
from vitserve.bench.client import Client, run
from vitserve.bench.load import Run, Sample, closed_loop, open_loop
from vitserve.bench.report import percentile, rate
from vitserve.bench.request import Picture, get, made_picture, raw
from vitserve.service.settings import DEFAULT_BUNDLE

CONNECTIONS = 32  # of the closed loop: enough that batches fill while others are decoded


class Reply(NamedTuple):
    status: int
    retry_after_seconds: float


class Turn(NamedTuple):
    run: Run
    timeout_seconds: float
    capacity: float  # answers a second, before and after, the mean

    @property
    def sent(self) -> list[Sample]:
        return [each for each in self.run.samples if 0 <= each.sent < self.run.seconds]

    @property
    def offered(self) -> float:
        """What really left, a second: a client that is behind offers less than planned."""
        return len(self.sent) / self.run.seconds

    @property
    def goodput(self) -> float:
        came = [each for each in self.run.samples if 0 <= each.ended < self.run.seconds and each.outcome == "200"]
        return sum(waited(each) <= self.timeout_seconds for each in came) / self.run.seconds


def waited(sample: Sample) -> float:
    """Seconds from when it left, as its timeout counts: that it left late is the client's doing."""
    return sample.ended - sample.sent


class Caller:
    """Posts one image, with any deadline and priority."""

    def __init__(self, client: Client, picture: Picture) -> None:
        self.client, self._picture = client, picture

    def request(self, timeout_ms: int, priority: int = 5) -> bytes:
        return raw(f"/v1/classify?timeout_ms={timeout_ms}", self._picture, f"Vitserve-Priority: {priority}\r\n")

    async def post(self, timeout_ms: int, priority: int = 5) -> Reply:
        answer = await self.client.ask(self.request(timeout_ms, priority))
        return Reply(answer.status, json.loads(answer.body)["retry_after_seconds"] if answer.status == 429 else 0.0)

    async def decoded(self) -> int:
        """Images that the service has decoded since its start."""
        body = (await self.client.ask(get("/metrics"))).body
        return int(float(body.partition(b"\nvitserve_decode_seconds_count ")[2].split(b"\n", 1)[0]))

    async def capacity(self, seconds: float) -> float:
        """Images a second that are answered in a closed loop."""
        return rate(await closed_loop(self.client, [self.request(60_000)], CONNECTIONS, 1.0, seconds))


class Truth(NamedTuple):
    told: float
    found: float


async def truth(
    caller: Caller, images: int, timeout_ms: int, priority: int, probe_timeout_ms: int, probe_priority: int
) -> Truth | None:
    """Sends so many images at once, then the same request again and again until it is admitted. None where it was admitted at once."""
    before = await caller.decoded()
    crowd = [asyncio.create_task(caller.post(timeout_ms, priority)) for _ in range(images)]
    while await caller.decoded() < before + images:  # until all of the crowd have been taken in
        await asyncio.sleep(0.01)
    first: tuple[float, float] | None = None
    while True:
        sent = time.monotonic()
        task = asyncio.create_task(caller.post(probe_timeout_ms, probe_priority))
        await asyncio.wait([task], timeout=0.01)
        if not task.done() or task.result().status == 200:  # it waits, so it was admitted
            break
        if first is None:
            first = (sent, task.result().retry_after_seconds)
        await asyncio.sleep(0.001)
    await asyncio.gather(*crowd, task)
    return Truth(first[1], sent - first[0]) if first is not None else None


class Result(NamedTuple):
    turns: list[Turn]
    truths: list[Truth]


async def measure(
    port: int, picture: Picture, times: float, seconds: float, timeout_ms: int, turns: int, episodes: int
) -> Result:
    caller = Caller(Client("127.0.0.1", port), picture)
    found, truths = list[Turn](), list[Truth]()
    part = seconds / turns
    able = await caller.capacity(max(2.0, part / 2))
    for number in range(turns):
        # Its warm-up fills the queue.
        run = await open_loop(
            caller.client, [caller.request(timeout_ms)], times * able, 2 * timeout_ms / 1000, part, seed=number
        )
        after = await caller.capacity(max(2.0, part / 2))
        found.append(Turn(run, timeout_ms / 1000, (able + after) / 2))
        able = after
    for number in range(episodes):
        # Urgent work for one to two seconds, and one that is not urgent and has a quarter of a second.
        told = await truth(caller, max(1, int(able * (1 + number / episodes))), 60_000, 9, 250, 1)
        truths += [told] if told is not None else []
    caller.client.close()
    return Result(found, truths)


def report(result: Result) -> Table:
    sent = [each for turn in result.turns for each in turn.sent]
    timeout = result.turns[0].timeout_seconds
    answered = [waited(each) for each in sent if each.outcome == "200"]
    rejected = [waited(each) for each in sent if each.outcome == "429"]
    late = percentile([each.sent - each.planned for each in sent], 0.99)
    admitted = len(sent) - len(rejected)
    ratios = sorted(each.told / each.found for each in result.truths)
    shares = [turn.goodput / turn.capacity for turn in result.turns]
    rows: list[tuple[str, Callable[[], str]]] = [
        ("capacity in a closed loop", lambda: f"{', '.join(f'{turn.capacity:.1f}' for turn in result.turns)} images/s"),
        (
            "offered",
            lambda: (
                f"{', '.join(f'{turn.offered:.1f}' for turn in result.turns)} images/s, each with {1000 * timeout:.0f} ms"
            ),
        ),
        ("the client was late by, p99", lambda: "–" if late is None else f"{1000 * late:.1f} ms"),
        (
            "statuses",
            lambda: ", ".join(
                f"{status}: {count}" for status, count in sorted(Counter(each.outcome for each in sent).items())
            ),
        ),
        ("goodput", lambda: f"{', '.join(f'{turn.goodput:.1f}' for turn in result.turns)} images/s"),
        (
            "of the capacity",
            lambda: f"{statistics.median(shares):.1%} in the median turn, {min(shares):.1%} to {max(shares):.1%}",
        ),
        (
            "admitted and in time, as the client sees it",
            lambda: f"{sum(each <= timeout for each in answered) / admitted:.2%}",
        ),
        (
            "answered, p50 and p99",
            lambda: (
                f"{statistics.median(answered) * 1e3:.0f} ms, {statistics.quantiles(answered, n=100)[98] * 1e3:.0f} ms"
            ),
        ),
        (
            "rejected, p50 and p99",
            lambda: (
                f"{statistics.median(rejected) * 1e3:.2f} ms, {statistics.quantiles(rejected, n=100)[98] * 1e3:.2f} ms"
            ),
        ),
        (
            "Retry-After told / found",
            lambda: (
                f"{', '.join(f'{each:.2f}' for each in ratios)} (waits of {min(t.found for t in result.truths):.2f} s and more)"
            ),
        ),
    ]
    table = Table(
        "",
        "",
        show_header=False,
        title=f"{statistics.median(turn.offered / turn.capacity for turn in result.turns):.1f} × what it can do",
    )
    for name, text in rows:
        try:
            table.add_row(name, text())
        except (ValueError, ZeroDivisionError, statistics.StatisticsError):
            table.add_row(name, "none")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--image", type=Path, help="what is posted; a JPEG made here unless told")
    parser.add_argument("--times", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=30.0, help="of overload, all turns together")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--timeout-ms", type=int, default=500)
    parser.add_argument("--episodes", type=int, default=8, help="in which Retry-After is put to the test")
    options = parser.parse_args()
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "vitserve",
        "serve",
        "--bundle",
        str(options.bundle.resolve()),
        "--port",
        str(port),
    ]
    process = subprocess.Popen([*command, "--threads", "1", "--slots", "1024"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while "vitserve.http_worker: ready" not in process.stderr.readline():
            if process.poll() is not None:
                sys.exit("the service did not start")
        with tempfile.TemporaryDirectory() as directory:
            picture = Picture((options.image or made_picture(directory)).read_bytes(), "image/jpeg")
        result = run(
            measure(port, picture, options.times, options.seconds, options.timeout_ms, options.turns, options.episodes)
        )
    finally:
        process.terminate()
        process.wait()
    Console(width=140).print(report(result))


if __name__ == "__main__":
    main()
