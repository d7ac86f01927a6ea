"""Measures the latency of classify requests at half load, alone and beside explanations for another client.

    python -m benchmarks.contention.explanations [--bundle BUNDLE] [--rounds 5] [--seconds 10]

The order alternates from round to round. Sends to 127.0.0.1 only.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import httpx

from benchmarks.attacks import small_image
from benchmarks.http.quantiles import quantile
from benchmarks.processes import free_port
from benchmarks.servers import is_ready
from vitserve.bench.client import Client
from vitserve.bench.load import closed_loop, open_loop
from vitserve.bench.report import throughput
from vitserve.bench.request import EncodedImage, raw

CONNECTIONS = 8


def explain(port: int, seconds: float, connection: Connection) -> None:
    """One image after the other, in a process of its own. Sends the number of explanations to ``connection``."""
    count, ends = 0, time.monotonic() + seconds
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        while time.monotonic() < ends:
            count += client.post("/v1/explain", content=small_image()).status_code == 200
    connection.send(count)


async def p99_ms(client: Client, request: bytes, rate: float, seconds: float, port: int | None) -> tuple[float, int]:
    """``port``: for explanations at the same time, whose number is returned too."""
    ours, theirs = multiprocessing.Pipe()
    if port is not None:
        arguments = port, seconds + 3, theirs
        multiprocessing.get_context("spawn").Process(target=explain, args=arguments).start()
    result = await open_loop(client, [request], rate, 2.0, seconds)
    count = 0 if port is None else await asyncio.to_thread(ours.recv)
    return 1000 * quantile([sample.latency_seconds for sample in result.measured()], 0.99), count


async def measure(port: int, rounds: int, seconds: float) -> None:
    client, request = Client("127.0.0.1", port), raw("/v1/classify", EncodedImage(small_image(), "image/jpeg"))
    rate = throughput(await closed_loop(client, [request], CONNECTIONS, 1.0, 3.0)) / 2
    sys.stdout.write(f"{rate:.0f} requests/s, half of the capacity\n\n")
    sys.stdout.write(
        "| round | p99 alone, ms | p99 beside explanations, ms | ratio | explanations/s |\n|---|---|---|---|---|\n"
    )
    ratios = list[float]()
    for number in range(1, rounds + 1):
        results = dict[bool, tuple[float, int]]()
        for explaining in (number % 2 == 0, number % 2 == 1):
            results[explaining] = await p99_ms(client, request, rate, seconds, port if explaining else None)
        alone, beside = results[False][0], results[True][0]
        ratios.append(beside / alone)
        explained = results[True][1] / (seconds + 3)
        sys.stdout.write(f"| {number} | {alone:.1f} | {beside:.1f} | {ratios[-1]:.2f} | {explained:.1f} |\n")
        sys.stdout.flush()
    sys.stdout.write(f"\nmedian ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="", help="default: the demonstration model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    port = free_port()
    bundle = ["--bundle", arguments.bundle] if arguments.bundle else []
    command = [sys.executable, "-m", "vitserve", "serve", "--port", str(port), *bundle]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            while not is_ready(port):
                time.sleep(0.1)
            asyncio.run(measure(port, arguments.rounds, arguments.seconds))
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
