"""Compares two checkouts of vitserve in one run, to see what a change cost or gained.

    python -m benchmarks.before_after --old ../vitserve-0.1 --new . --connections 1,16,64 --rounds 9 --image photo.jpg

Starts `python -m vitserve serve` in each checkout and keeps both servers running. In every round, each number of
connections is measured with one server and then with the other, with the same client; the order alternates from round
to round. The result is the median of the rounds' ratios (new ÷ old), so that a drift in the machine's speed cancels
out. CPU time per request includes all processes of the server and varies less than throughput on a shared machine.

By default, each checkout serves its own default model.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.processes import ServerFailedError, StartedServer
from benchmarks.servers import Server, check_checkout, running, vitserve_server
from vitserve.bench import report
from vitserve.bench.client import Client, ConnectionGoneError, run
from vitserve.bench.load import LoadResult, closed_loop
from vitserve.bench.options import whole_numbers
from vitserve.bench.report import connections, stdout_console, summarize
from vitserve.bench.request import EncodedImage, read_encoded_images, write_sample_image


@dataclass(frozen=True)
class Measurement:
    """One server in one round, at one number of connections."""

    checkout: str  # old or new
    round: int
    connections: int
    requests_per_second: float
    p50_ms: float
    cpu_ms: float  # CPU time of all processes of the server, per request


@dataclass(frozen=True)
class Pair:
    """Both servers in one round, at one number of connections."""

    old: Measurement
    new: Measurement

    def ratio(self, value: Callable[[Measurement], float]) -> float:
        return value(self.new) / value(self.old) if value(self.old) else float("nan")


def measure(
    server: Server, started: StartedServer, request: bytes, number: int, count: int, warm_up: float, seconds: float
) -> Measurement:
    """Raises ServerFailedError for a status other than 200, and ConnectionGoneError."""

    async def load() -> LoadResult:
        client = Client("127.0.0.1", server.port)
        try:
            return await closed_loop(client, [request], count, warm_up, seconds)
        finally:
            client.close()

    cpu_before = started.cpu_seconds()
    result = run(load())
    cpu_seconds = started.cpu_seconds() - cpu_before
    row = summarize(result)
    if row.successful != row.requests or row.p50_ms is None:
        raise ServerFailedError(f"{server.title}, {connections(count)}: {row.statuses or 'no response'}")
    cpu_ms = 1000 * cpu_seconds / len(result.samples)
    return Measurement(server.title, number, count, row.throughput_per_second, row.p50_ms, cpu_ms)


def compare(
    servers: Sequence[Server], image: EncodedImage, counts: Sequence[int], options: argparse.Namespace
) -> list[Pair]:
    """Measures the old and the new server, in this order. Raises ServerFailedError and ConnectionGoneError."""
    pairs = []
    console = Console(stderr=True, highlight=False)
    old, new = servers
    with running(old, image) as old_started, running(new, image) as new_started:
        targets = [(old, old_started), (new, new_started)]
        for number in range(1, options.rounds + 1):
            for count in counts:
                order = targets if number % 2 else targets[::-1]
                by_title = {
                    server.title: measure(
                        server,
                        started,
                        server.request(image),
                        number,
                        count,
                        options.warm_up_seconds,
                        options.seconds,
                    )
                    for server, started in order
                }
                pair = Pair(by_title[old.title], by_title[new.title])
                pairs.append(pair)
                console.print(round_line(pair), soft_wrap=True)
    return pairs


def round_line(pair: Pair) -> str:
    old, new = pair.old, pair.new
    ratio = pair.ratio(lambda measurement: measurement.requests_per_second)
    return (
        f"round {old.round}, {connections(old.connections)}:"
        f" {old.requests_per_second:.1f} → {new.requests_per_second:.1f} requests/s, ratio {ratio:.3f};"
        f" p50 {old.p50_ms:.2f} → {new.p50_ms:.2f} ms; CPU {old.cpu_ms:.2f} → {new.cpu_ms:.2f} ms per request"
    )


def result_table(pairs: Sequence[Pair]) -> Table:
    """One line for each number of connections. Ratios are new ÷ old: median (min – max) of the rounds."""
    table = Table(box=None, pad_edge=False, header_style="bold", title="ratios are new ÷ old: median (min – max)")
    values: dict[str, Callable[[Measurement], float]] = {
        "requests/s": lambda measurement: measurement.requests_per_second,
        "p50 ms": lambda measurement: measurement.p50_ms,
        "CPU ms per request": lambda measurement: measurement.cpu_ms,
    }
    table.add_column("load", no_wrap=True)
    for title in values:
        table.add_column(title, justify="right", no_wrap=True)
        table.add_column("ratio", justify="right", no_wrap=True)
    for count in dict.fromkeys(pair.old.connections for pair in pairs):
        group = [pair for pair in pairs if pair.old.connections == count]
        cells = []
        for value in values.values():
            old, new = (statistics.median(value(side) for side in sides) for sides in _sides(group))
            ratios = [pair.ratio(value) for pair in group]
            cells.append(f"{old:.4g} → {new:.4g}")
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f} – {max(ratios):.3f})")
        table.add_row(connections(count), *cells)
    return table


def _sides(pairs: Sequence[Pair]) -> tuple[list[Measurement], list[Measurement]]:
    return [pair.old for pair in pairs], [pair.new for pair in pairs]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--old", type=Path, required=True, help="directory of a checkout")
    add("--new", type=Path, required=True, help="directory of a checkout")
    add("--connections", default="1,16,64")
    add("--rounds", type=int, default=9)
    add("--seconds", type=float, default=2.0, help="measured time of each load in a round")
    add("--warm-up-seconds", type=float, default=0.5)
    add("--image", type=Path, help="image file to send (default: a generated JPEG)")
    add("--serve", default="", help="additional options of `vitserve serve`, for both")
    add("--old-serve", default="", help="additional options for the old checkout only")
    add("--new-serve", default="", help="additional options for the new checkout only")
    add("--json", type=Path, help="JSON file to write, with every round")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as directory:
        image = read_encoded_images(options.image or write_sample_image(directory))[0]
    checkouts = {"old": (options.old, options.old_serve), "new": (options.new, options.new_serve)}
    servers = [
        vitserve_server(title, checkout.resolve(), shlex.split(f"{options.serve} {further}"))
        for title, (checkout, further) in checkouts.items()
    ]
    try:
        for server in servers:
            check_checkout(server)
        pairs = compare(servers, image, whole_numbers(options.connections, "--connections"), options)
    except (ServerFailedError, ConnectionGoneError, ValueError) as error:
        sys.exit(f"before_after: {error}")
    stdout_console().print(result_table(pairs))
    if options.json is not None:
        rows = [measurement for side in _sides(pairs) for measurement in side]
        report.write_json(options.json, {"command": shlex.join(arguments or sys.argv[1:])}, rows)


if __name__ == "__main__":
    main()
