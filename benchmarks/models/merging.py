"""Token merging through HTTP: bundles of one network with different numbers of merged tokens, beside plain FastAPI.

    python -m benchmarks.models.merging BUNDLE… --graph PLAIN.onnx --photos PHOTOS [--precision int8] [--rounds 3]

BUNDLE are bundles of one network, from `vitserve export … --merge R`. PLAIN.onnx is its graph without merging, from
`python -m benchmarks.plain_graph`. In every round, each server is started, warmed up, measured with 8 connections, and
stopped; the order reverses from round to round. Prints the median, minimum and maximum of the rounds.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from pathlib import Path

from benchmarks.compare import measure_loads
from benchmarks.http.quantiles import spread
from benchmarks.servers import PEERS_DIR, ROOT, Server, Setup, running, server_under_test, vitserve_server
from vitserve.bench.report import ServiceRow
from vitserve.bench.request import read_encoded_images
from vitserve.model.bundle.bundle import open_bundle
from vitserve.model.config import ViTConfig
from vitserve.service import machine

PLAIN = "plain FastAPI + ONNX Runtime fp32"


def servers(options: argparse.Namespace) -> dict[str, Server]:
    found = {}
    for path in options.bundles:
        config = open_bundle(path).manifest.config
        merge = config.merge if isinstance(config, ViTConfig) else 0
        arguments = ["--bundle", str(path.resolve()), "--precision", options.precision, "--timeout-ms", "60000"]
        arguments += shlex.split(options.serve)
        found[f"R = {merge}"] = vitserve_server(f"vitserve {options.precision}", ROOT, arguments)
    first = open_bundle(options.bundles[0])
    size = first.manifest.preprocessing.image_size
    setup = Setup(first, options.graph.resolve(), size, machine.cores(), PEERS_DIR)
    found[PLAIN] = server_under_test("plain", setup)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--graph", type=Path, required=True)
    parser.add_argument("--photos", type=Path, default=os.environ.get("TEST_PHOTOS"))
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--serve", default="", help='more options of `vitserve serve`: "--streams 2 --threads 1"')
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args()
    images = read_encoded_images(options.photos)
    rows: dict[str, list[ServiceRow]] = {}
    for number in range(options.rounds):
        found = list(servers(options).items())
        for name, server in found if number % 2 == 0 else found[::-1]:
            with running(server, images[0]):
                (row,) = measure_loads(server, images, [options.connections], 2.0, options.seconds)
            rows.setdefault(name, []).append(row)
    plain = [row.throughput_per_second for row in rows[PLAIN]]
    sys.stdout.write("| server | images/s | p50 ms | p99 ms | ÷ plain |\n|---|---|---|---|---|\n")
    for name, measured in rows.items():
        rates = [row.throughput_per_second for row in measured]
        ratio = statistics.median(rate / other for rate, other in zip(rates, plain, strict=True))
        latencies = " | ".join(
            spread([value for row in measured if (value := getattr(row, field)) is not None])
            for field in ("p50_ms", "p99_ms")
        )
        sys.stdout.write(f"| {name} | {spread(rates)} | {latencies} | {ratio:.2f} |\n")


if __name__ == "__main__":
    main()
