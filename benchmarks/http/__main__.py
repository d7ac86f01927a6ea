"""Measures the HTTP path of vitserve beside Triton, plain FastAPI, and another checkout of vitserve.

    python -m benchmarks.http --old ../vitserve-old

Scenarios:
  throughput   1 KB JPEGs and a network of one block, closed loop: requests/s, latency, CPU time of each process
  decode       36 KB JPEGs to 32 pixels, 64 connections, one or eight images a request: images/s
  overload     the default model and Poisson arrivals above its capacity: goodput, rejections, liveness

All servers of a scenario run during the whole scenario, with default settings. In every round, each load is measured
with one server after the other. The order of the servers reverses from round to round. Results are the median, minimum
and maximum of the rounds. Servers that are not installed are skipped, and the result names them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from benchmarks import document_sections
from benchmarks.before_after import check_checkout
from benchmarks.http import photos, results
from benchmarks.http.models import one_block
from benchmarks.http.results import Row
from benchmarks.http.scenarios import Case, Target, decode_cases, overload_cases, throughput_cases
from benchmarks.http.tools import ToolMissingError
from benchmarks.processes import ServerFailedError
from benchmarks.servers import (
    ENVIRONMENTS_DIR,
    ROOT,
    Server,
    ServerUnavailableError,
    Setup,
    running,
    server_under_test,
    vitserve_server,
)
from vitserve.bench.options import whole_numbers
from vitserve.model.bundle.bundle import open_bundle

CASES = {"throughput": throughput_cases, "decode": decode_cases, "overload": overload_cases}
SERVERS = ("new", "old", "triton", "plain")
DEFAULT_BUNDLE_SCENARIOS = ("overload",)


def servers_of(scenario: str, options: argparse.Namespace, skipped: dict[str, str]) -> Iterator[tuple[str, Server]]:
    """The servers that the scenario compares. Adds those that are not available to ``skipped``."""
    default_model = scenario in DEFAULT_BUNDLE_SCENARIOS
    for name in options.servers:
        try:
            if name in ("new", "old"):
                yield name, _checkout(name, options, [] if default_model else ["--bundle", str(_bundle(options))])
            elif not default_model:
                yield name, _peer(name, options)
        except (ServerUnavailableError, ServerFailedError) as error:
            skipped[name] = str(error)


def _checkout(name: str, options: argparse.Namespace, serve: Sequence[str]) -> Server:
    directory: Path | None = getattr(options, name)
    if directory is None:
        raise ServerUnavailableError(f"no --{name} was given")
    server = vitserve_server(name, directory.resolve(), [*serve, *options.serve.split()])
    check_checkout(server)
    return server


def _bundle(options: argparse.Namespace) -> Path:
    return one_block(options.models)[0]


def _peer(name: str, options: argparse.Namespace) -> Server:
    bundle, graph = one_block(options.models)
    setup = Setup(open_bundle(bundle), graph, 32, peer_threads=1, environments_dir=options.environments.resolve())
    return server_under_test(name, setup)


def measure_scenario(scenario: str, options: argparse.Namespace, console: Console, found: results.Results) -> None:
    cases = list(CASES[scenario](options))
    with ExitStack() as stack:
        targets = []
        for name, server in servers_of(scenario, options, found.skipped):
            try:
                started = stack.enter_context(running(server, photos.thumbnail()))
            except ServerFailedError as error:
                found.skipped[name] = str(error)
            else:
                targets.append(Target(name, server, started))
        for number in range(found.first_round, found.first_round + options.rounds):
            for case in cases:
                for target in targets if number % 2 else targets[::-1]:
                    measure_case(scenario, case, target, number, console, found)


def measure_case(
    scenario: str, case: Case, target: Target, number: int, console: Console, found: results.Results
) -> None:
    if case.vitserve_only and target.name not in ("new", "old"):
        return
    try:
        measured = case.measure(target, number)
    except ServerFailedError as error:
        found.skipped[f"{target.name}, {case.load}, round {number}"] = str(error)
        return
    row = Row(scenario, case.load, target.name, number, measured)
    found.rows.append(row)
    console.print(f"round {number}: {scenario}, {case.load}, {target.name}: {results.one_line(row)}", soft_wrap=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("scenarios", nargs="*", metavar="SCENARIO", help=f"from {' '.join(CASES)} (default: all)")
    add("--old", type=Path, help="directory of another checkout")
    add("--new", type=Path, default=ROOT, help="directory of a checkout (default: this one)")
    add("--servers", nargs="+", default=list(SERVERS), choices=SERVERS, metavar="NAME", help=f"from {SERVERS}")
    add("--environments", type=Path, default=ENVIRONMENTS_DIR, help="directory of the peers' virtual environments")
    add("--models", type=Path, default=ROOT / "runs" / "http", help="directory for the exported one-block network")
    add("--serve", default="", help="additional options of `vitserve serve`, for both checkouts")
    add("--rounds", type=int, default=3)
    add("--seconds", type=int, default=4, help="measured time of each load")
    add("--connections", default="1,64", help="of the scenario throughput")
    add("--multiples", default="1.2,1.5,2,3,5", help="offered load of the scenario overload ÷ capacity")
    add("--arrivals", nargs="+", default=["kept", "new"], choices=["kept", "new"], help="kept or new connections")
    add("--images", nargs="+", default=["77KB", "1KB", "photos"], choices=["77KB", "1KB", "photos"])
    add("--photos", type=Path, default=os.environ.get("TEST_PHOTOS"), help="directory of photos ($TEST_PHOTOS)")
    add("--timeout-ms", type=int, default=500)
    add("--capacity-seconds", type=float, default=1.5)
    add("--json", type=Path, help="JSON file to write, with every round")
    add("--add", action="store_true", help="add the rounds to those in --json")
    options = parser.parse_args(arguments)
    options.scenarios = options.scenarios or list(CASES)
    if unknown := set(options.scenarios) - set(CASES):
        parser.error(f"unknown scenario {', '.join(sorted(unknown))}; the scenarios are {', '.join(CASES)}")
    options.connections = whole_numbers(options.connections, "--connections")
    options.multiples = [float(word) for word in options.multiples.split(",")]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    command = document_sections.command_line(sys.argv[1:] if arguments is None else arguments)
    found = results.load(options.json) if options.add and options.json.exists() else results.Results()
    found.begin(command)
    console = Console(stderr=True, highlight=False)
    try:
        for scenario in options.scenarios:
            measure_scenario(scenario, options, console, found)
    except (ToolMissingError, RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmarks.http: {error}")
    finally:
        if options.json is not None and found.rows:
            results.save(found, options.json)
    results.print_tables(found)


if __name__ == "__main__":
    main()
