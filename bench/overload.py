"""Three times what the service can do, for half a minute: who is answered, who is refused, how soon, and whether Retry-After tells the truth.

    python -m bench.overload --bundle service/default_bundle

The engine gets one thread, so that on two cores the other is left to the front and to these clients. Arrivals are Poisson and do not wait for
answers. What Retry-After says is compared with how long it takes until the same request is admitted when nobody else comes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
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

from bench.door import ROOT, free_port, made_image


class Reply(NamedTuple):
    status: int
    seconds: float
    retry_after_seconds: float


class Client:
    """Keeps connections, and opens one more where all are busy."""

    def __init__(self, host: str, port: int, image: bytes) -> None:
        self._host, self._port, self._image = host, port, image
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, timeout_ms: int, priority: int = 5) -> Reply:
        began = time.monotonic()
        options = f"Content-Type: image/jpeg\r\nVitserve-Priority: {priority}\r\nContent-Length: {len(self._image)}\r\n"
        status, body = await self._ask(f"POST /v1/classify?timeout_ms={timeout_ms}", options, self._image)
        return Reply(status, time.monotonic() - began, json.loads(body)["retry_after_seconds"] if status == 429 else 0.0)

    async def decoded(self) -> int:
        """Images that the service has decoded since its start."""
        _, body = await self._ask("GET /metrics", "", b"")
        return int(float(body.partition(b"\nvitserve_decode_seconds_count ")[2].split(b"\n", 1)[0]))

    async def _ask(self, what: str, options: str, content: bytes) -> tuple[int, bytes]:
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        writer.write(f"{what} HTTP/1.1\r\nHost: x\r\n{options}\r\n".encode() + content)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        body = await reader.readexactly(length)
        self._idle.append((reader, writer))
        return int(answer.split(b" ", 2)[1]), body

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
            await writer.wait_closed()


async def capacity(client: Client, seconds: float, connections: int = 8) -> float:
    """Images a second that are answered in a closed loop."""
    ends, answered = time.monotonic() + seconds, 0

    async def loop() -> None:
        nonlocal answered
        while time.monotonic() < ends:
            reply = await client.post(60_000)  # before the sum is read: others add to it meanwhile
            answered += reply.status == 200

    await asyncio.gather(*(loop() for _ in range(connections)))
    return answered / seconds


async def overload(client: Client, rate: float, seconds: float, timeout_ms: int) -> list[Reply]:
    chance, tasks = random.Random(0), []
    began = due = time.monotonic()
    while due - began < seconds:
        due += chance.expovariate(rate)
        if (ahead := due - time.monotonic()) > 0:
            await asyncio.sleep(ahead)
        tasks.append(asyncio.create_task(client.post(timeout_ms)))
    return await asyncio.gather(*tasks)


class Truth(NamedTuple):
    told: float
    found: float


async def truth(client: Client, images: int, timeout_ms: int, priority: int, probe_timeout_ms: int, probe_priority: int) -> Truth | None:
    """Sends so many images at once, then the same request again and again until it is admitted. None where it was admitted at once."""
    before = await client.decoded()
    crowd = [asyncio.create_task(client.post(timeout_ms, priority)) for _ in range(images)]
    while await client.decoded() < before + images:  # until all of the crowd have been taken in
        await asyncio.sleep(0.01)
    first: tuple[float, float] | None = None
    tasks: list[tuple[float, asyncio.Task[Reply]]] = []
    while True:
        sent = time.monotonic()
        task = asyncio.create_task(client.post(probe_timeout_ms, probe_priority))
        await asyncio.wait([task], timeout=0.01)
        if not task.done() or task.result().status == 200:  # it waits, so it was admitted
            tasks.append((sent, task))
            break
        if first is None:
            first = (sent, task.result().retry_after_seconds)
        await asyncio.sleep(0.001)
    await asyncio.gather(*crowd, *(task for _, task in tasks))
    return Truth(first[1], sent - first[0]) if first is not None else None


class Result(NamedTuple):
    capacity: float
    seconds: float
    timeout_ms: int
    replies: list[Reply]
    truths: list[Truth]

    def chosen(self, status: int) -> list[float]:
        return [reply.seconds for reply in self.replies if reply.status == status]


async def measure(host: str, port: int, image: bytes, times: float, seconds: float, timeout_ms: int, episodes: int) -> Result:
    client = Client(host, port, image)
    await capacity(client, 2)
    able = await capacity(client, max(2.0, seconds / 4))
    replies = await overload(client, times * able, seconds, timeout_ms)
    truths: list[Truth] = []
    for number in range(episodes):
        # Urgent work for one to two seconds, and one that is not urgent and has a quarter of a second.
        found = await truth(client, int(able * (1 + number / episodes)), 60_000, 9, 250, 1)
        truths += [found] if found is not None else []
    await client.close()
    return Result(able, seconds, timeout_ms, replies, truths)


def report(result: Result) -> Table:
    answered, refused = result.chosen(200), result.chosen(429)
    in_time = sum(each <= result.timeout_ms / 1000 for each in answered)
    admitted = len(result.replies) - len(refused)
    ratios = sorted(each.told / each.found for each in result.truths)
    rows: list[tuple[str, Callable[[], str]]] = [
        ("capacity in a closed loop", lambda: f"{result.capacity:.1f} images/s"),
        ("offered", lambda: f"{len(result.replies) / result.seconds:.1f} images/s for {result.seconds:.0f} s, each with {result.timeout_ms} ms"),
        ("statuses", lambda: ", ".join(f"{status}: {count}" for status, count in sorted(Counter(each.status for each in result.replies).items()))),
        ("goodput", lambda: f"{len(answered) / result.seconds:.1f} images/s, {len(answered) / result.seconds / result.capacity:.1%} of the capacity"),
        ("admitted and in time, as the client sees it", lambda: f"{in_time / admitted:.2%}"),
        ("answered, p50 and p99", lambda: f"{statistics.median(answered) * 1e3:.0f} ms, {statistics.quantiles(answered, n=100)[98] * 1e3:.0f} ms"),
        ("refused, p50 and p99", lambda: f"{statistics.median(refused) * 1e3:.2f} ms, {statistics.quantiles(refused, n=100)[98] * 1e3:.2f} ms"),
        ("Retry-After told / found", lambda: f"{', '.join(f'{each:.2f}' for each in ratios)} (waits of {min(t.found for t in result.truths):.2f} s and more)"),
    ]
    table = Table("", "", show_header=False, title=f"{len(result.replies) / result.seconds / result.capacity:.1f} × what it can do")
    for name, text in rows:
        try:
            table.add_row(name, text())
        except (ValueError, statistics.StatisticsError):
            table.add_row(name, "none")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=ROOT / "service" / "default_bundle")
    parser.add_argument("--image", type=Path, help="what is posted; a JPEG made here unless told")
    parser.add_argument("--times", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--timeout-ms", type=int, default=500)
    parser.add_argument("--episodes", type=int, default=8, help="in which Retry-After is put to the test")
    options = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "vitserve", "serve", "--bundle", str(options.bundle.resolve()), "--port", str(port)]
    process = subprocess.Popen([*command, "--threads", "1", "--slots", "1024"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while "service.front: ready" not in process.stderr.readline():
            if process.poll() is not None:
                sys.exit("the service did not start")
        with tempfile.TemporaryDirectory() as folder:
            image = (options.image or made_image(folder)).read_bytes()
        result = asyncio.run(measure("127.0.0.1", port, image, options.times, options.seconds, options.timeout_ms, options.episodes))
    finally:
        process.terminate()
        process.wait()
    Console(width=140).print(report(result))


if __name__ == "__main__":
    main()
