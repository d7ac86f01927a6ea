"""Memory under a constant load: whether it grows.

    python -m benchmarks.soak --photos DIRECTORY

Starts `vitserve serve` with the default model, measures its capacity in a closed loop, and then sends a share of it, at
random times, over connections that stay open. Prints the memory of each process (PSS) and its growth per minute, which
is the slope of a line fitted to all samples after the warm-up. Needs gcc. Sends to 127.0.0.1 only.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil

from benchmarks.http import photos
from benchmarks.http.load.load_generator import Load, started
from benchmarks.http.overload import GIVE_UP_SECONDS, KEPT_CONNECTIONS, classify_requests, measure_capacity
from benchmarks.http.quantiles import quantile
from benchmarks.processes import process_family, role_of
from benchmarks.servers import ROOT, running, vitserve_server
from vitserve.bench.request import read_encoded_images

INTERVAL = 10.0  # seconds between samples of the memory
TIMEOUT_MS = 2000  # the default of the service

Memory = dict[str, float]  # MB, by the role of the process


def sample(supervisor: psutil.Process) -> Memory:
    memory: Memory = defaultdict(float)
    for process in process_family(supervisor):
        memory[role_of(process.cmdline())] += process.memory_full_info().pss / 1e6
    return memory


def growth(minutes: Sequence[float], samples: Sequence[Mapping[str, float]], role: str) -> float:
    """MB per minute."""
    return float(np.polyfit(minutes, [each.get(role, 0.0) for each in samples], 1)[0])


def report(minutes: Sequence[float], samples: Sequence[Memory], warm_up: float) -> str:
    later = [index for index, minute in enumerate(minutes) if minute >= warm_up]
    times, kept = [minutes[index] for index in later], [samples[index] for index in later]
    totals = [{"all": sum(each.values())} for each in kept]
    lines = ["| process | MB first | MB last | MB largest | growth MB per minute |", "|---|---:|---:|---:|---:|"]
    for series in (kept, totals):
        for role in series[0]:
            values = [each.get(role, 0.0) for each in series]
            columns = f"{values[0]:.1f} | {values[-1]:.1f} | {max(values):.1f} | {growth(times, series, role):+.3f}"
            lines.append(f"| {role} | {columns} |")
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> str:
    images = read_encoded_images(options.photos) if options.photos is not None else [photos.large_photo()]
    server = vitserve_server("vitserve", ROOT, [])
    with running(server, images[0]) as process:
        capacity = measure_capacity(server.port, images, seconds=10)
        load = Load(
            classify_requests(images, TIMEOUT_MS),
            60 * options.minutes,
            rate=options.share * capacity,
            connections=KEPT_CONNECTIONS,
            give_up=GIVE_UP_SECONDS,
        )
        minutes: list[float] = []
        samples: list[Memory] = []
        with started(server.port, load) as running_load:
            began = time.monotonic()
            while (elapsed := time.monotonic() - began) < load.seconds:
                minutes.append(elapsed / 60)
                samples.append(sample(process.process))
                time.sleep(INTERVAL)
            result = running_load.result()
    measured = result.measured()
    outcomes = dict(sorted(Counter(each.outcome for each in measured).items()))
    times = [1000 * (each.ended - each.sent) for each in measured]
    load_text = f"{load.rate:.0f} requests/s ({options.share:.0%} of {capacity:.0f}), {options.minutes:g} minutes"
    latency = f"p50 {quantile(times, 0.5):.1f} ms, p99 {quantile(times, 0.99):.1f} ms"
    title = f"{len(images)} images, {load_text}, {KEPT_CONNECTIONS} connections: {outcomes}, {latency}"
    return f"{title}\n\n{report(minutes, samples, options.warm_up)}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--warm-up", type=float, default=5, help="minutes whose samples do not count for the growth")
    parser.add_argument("--share", type=float, default=0.6, help="offered load ÷ capacity")
    parser.add_argument("--photos", type=Path, default=os.environ.get("TEST_PHOTOS"), help="directory ($TEST_PHOTOS)")
    sys.stdout.write(measure(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
