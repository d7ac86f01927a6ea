"""Measures the HTTP path of vitserve beside Triton, plain FastAPI, and another checkout of vitserve.

    python -m benchmarks.http --old ../vitserve-old --bundle B16

The servers of a scenario run during the whole scenario, with default settings. In every round, each load is measured
with one server after the other. The order of the servers reverses from round to round. Results are the median, minimum
and maximum of the rounds. Servers that are not installed are skipped, and the result names them.

wrk (Debian's package wrk) measures closed loops. load_generator.c is compiled with gcc and measures overload.
benchmarks/peers/README.md describes how to install Triton.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import document_sections
from benchmarks.http import figure, results, tables
from benchmarks.http.load.requests import ToolMissingError
from benchmarks.http.results import Results, Row
from benchmarks.http.scenarios import SCENARIOS, Case, Target
from benchmarks.http.targets import CHECKOUTS, PEERS, running_targets
from benchmarks.processes import ServerFailedError
from benchmarks.servers import ENVIRONMENTS_DIR, ROOT
from vitserve.bench import plot
from vitserve.bench.client import ConnectionGoneError
from vitserve.bench.options import numbers, whole_numbers

SECTION = "http"
_FILE_COLUMNS = 200  # of the tables, if standard output is a file or a pipe


def measure_scenario(name: str, options: argparse.Namespace, found: Results) -> None:
    scenario = SCENARIOS[name]
    cases, first = list(scenario.cases(options)), found.next_round(name)
    with running_targets(scenario, options, found) as targets:
        for number in range(first, first + options.rounds):
            for case in cases:
                for target in targets if number % 2 else targets[::-1]:
                    if target.name in CHECKOUTS or not case.vitserve_only:
                        measure_case(name, case, target, number, found)


def measure_case(scenario: str, case: Case, target: Target, number: int, found: Results) -> None:
    """A failure is recorded, and the other cases follow."""
    title = f"{scenario}, {case.load}, {target.server.title}"
    try:
        row = Row(scenario, case.load, target.name, number, case.measure(target, number))
    except ServerFailedError as error:
        found.skipped[f"{title}, round {number}"] = str(error)
        return
    found.rows.append(row)
    console = Console(stderr=True, highlight=False)
    console.print(f"round {number}, {title}: {tables.one_line(row)}", soft_wrap=True)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    scenarios = "\n".join(f"  {name:<12} {scenario.description}" for name, scenario in SCENARIOS.items())
    description = f"{__doc__}\nscenarios:\n{scenarios}"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("scenarios", nargs="*", metavar="SCENARIO", help="default: all")
    add("--old", type=Path, help="directory of another checkout")
    add("--new", type=Path, default=ROOT, help="directory of a checkout (default: this one)")
    add("--servers", nargs="+", default=[*CHECKOUTS, *PEERS], choices=[*CHECKOUTS, *PEERS], metavar="SERVER")
    add("--environments", type=Path, default=ENVIRONMENTS_DIR, help="directory of the peers' virtual environments")
    add("--models", type=Path, default=ROOT / "runs" / "http", help="directory for the exported one-block network")
    add("--bundle", type=Path, help="bundle of ViT-B/16 with int8, for the scenario vit_b16")
    add("--photos", type=Path, default=os.environ.get("TEST_PHOTOS"), help="directory of photos ($TEST_PHOTOS)")
    add("--serve", default="", help="additional options of `vitserve serve`, for both checkouts")
    add("--old-serve", default="", help="additional options for the old checkout only")
    add("--new-serve", default="", help="additional options for the new checkout only")
    add("--rounds", type=int, default=3, help="0 with --add: only write the files again")
    add("--seconds", type=int, default=4, help="measured time of each load")
    add("--connections", default="1,64", help="of the scenarios throughput and rejections")
    add("--multiples", default="1.2,1.5,2,3,5", help="of the scenario overload: offered load ÷ capacity")
    add("--arrivals", nargs="+", default=["kept", "new"], choices=["kept", "new"], help="kept or new connections")
    add("--payloads", nargs="+", default=["77KB", "1KB", "photos"], choices=["77KB", "1KB", "photos"])
    add("--timeout-ms", type=int, default=500, help="of each request of the scenario overload")
    add("--capacity-seconds", type=float, default=1.5, help="measured time of each closed loop for the capacity")
    add("--probes", type=int, default=8, help="of the scenario retry_after, in each round")
    add("--output", type=Path, default=ROOT / "runs" / "http", help="directory of http.json, http.svg and http.md")
    add("--add", action="store_true", help="add the rounds to those in the directory --output")
    add("--docs", type=Path, help=f"document in which to replace the section {SECTION}")
    options = parser.parse_args(arguments)
    if unknown := set(options.scenarios) - set(SCENARIOS):
        parser.error(f"unknown scenario {', '.join(sorted(unknown))}; the scenarios are {', '.join(SCENARIOS)}")
    try:
        options.connections = whole_numbers(options.connections, "--connections")
        options.multiples = numbers(options.multiples, "--multiples")
    except ValueError as error:
        parser.error(str(error))
    return options


def write_all(found: Results, directory: Path) -> None:
    """Writes http.json, http.svg and http.md."""
    directory.mkdir(parents=True, exist_ok=True)
    found.save(directory / "http.json")
    (directory / "http.md").write_text(tables.as_markdown(found), encoding="utf-8")
    figure.draw(found, directory / "http.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parse_arguments(words)
    plot.load_figure_class()
    if options.docs is not None:
        document_sections.check(options.docs, SECTION)
    saved = options.output / "http.json"
    found = results.read(saved) if options.add and saved.exists() else Results()
    try:
        if options.rounds:
            found.commands.append(document_sections.command_line(words))
            for name in options.scenarios or SCENARIOS:
                measure_scenario(name, options, found)
    except (ToolMissingError, ConnectionGoneError, RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmarks.http: {error}")
    finally:
        if found.rows:
            write_all(found, options.output)
    if options.docs is not None:
        text = (options.output / "http.md").read_text(encoding="utf-8")
        document_sections.publish(options.docs, SECTION, text, options.output / "http.svg")
    console = Console()
    tables.print_all(found, console if console.is_terminal else Console(width=_FILE_COLUMNS))


if __name__ == "__main__":
    main()
