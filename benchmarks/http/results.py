"""The rows of all rounds: read from and written to JSON, and as tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.http.overload import Overload
from benchmarks.http.quantiles import quantile, short, spread
from benchmarks.http.throughput import Throughput
from vitserve.bench.report import describe_machine, stdout_console

_KINDS: dict[str, type[Throughput] | type[Overload]] = {"Throughput": Throughput, "Overload": Overload}


@dataclass(frozen=True)
class Row:
    """One server in one round under one load."""

    scenario: str
    load: str
    server: str
    round: int
    measured: Throughput | Overload


@dataclass
class Results:
    commands: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # reasons, by server
    first_round: int = 1

    def begin(self, command: str) -> None:
        """Further rows are of this command."""
        self.commands.append(command)
        self.first_round = max((row.round for row in self.rows), default=0) + 1

    def groups(self) -> dict[tuple[str, str], dict[str, list[Row]]]:
        """The rounds by scenario and load, then by server."""
        grouped: dict[tuple[str, str], dict[str, list[Row]]] = {}
        for row in self.rows:
            grouped.setdefault((row.scenario, row.load), {}).setdefault(row.server, []).append(row)
        return grouped


def save(found: Results, path: Path) -> None:
    rows = [asdict(row) | {"kind": type(row.measured).__name__} for row in found.rows]
    document = {"commands": found.commands, "skipped": found.skipped, "machine": describe_machine(), "rows": rows}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load(path: Path) -> Results:
    document = json.loads(path.read_text(encoding="utf-8"))
    return Results(document["commands"], [_row(row) for row in document["rows"]], document["skipped"])


def _row(fields: dict[str, Any]) -> Row:
    kind = _KINDS[fields.pop("kind")]
    return Row(**fields | {"measured": kind(**fields["measured"])})


def one_line(row: Row) -> str:
    return " ".join(f"{title} {cell}," for title, cell in cells([row], [row]).items()).rstrip(",")


def cells(rows: Sequence[Row], reference: Sequence[Row]) -> dict[str, str]:
    """The rounds of one server under one load, compared with the same rounds of the reference server."""
    if isinstance(rows[0].measured, Throughput):
        return _throughput_cells(rows, reference)
    return _overload_cells([row.measured for row in rows if isinstance(row.measured, Overload)])


def _throughput_cells(rows: Sequence[Row], reference: Sequence[Row]) -> dict[str, str]:
    measured = [row.measured for row in rows if isinstance(row.measured, Throughput)]
    roles = dict.fromkeys(role for each in measured for role in each.cpu_ms)
    cpu = {role: statistics.median(each.cpu_ms.get(role, 0.0) for each in measured) for role in roles}
    total = statistics.median(sum(each.cpu_ms.values()) for each in measured)
    parts = ", ".join(f"{role} {short(used)}" for role, used in cpu.items() if used >= 0.001)
    return {
        "images/s": spread([each.images_per_second for each in measured], 4),
        "÷ new": spread(list(ratios(rows, reference)), 3),
        "p50 ms": spread([each.p50_ms for each in measured]),
        "p99 ms": spread([each.p99_ms for each in measured]),
        "CPU ms per image": f"{short(total)} = {parts}",
        "client cores": spread([each.client_cores for each in measured], 2),
    }


def ratios(rows: Sequence[Row], reference: Sequence[Row]) -> Iterator[float]:
    """Images per second ÷ those of the reference, for each round that both have."""
    rates = {row.round: row.measured.images_per_second for row in reference if isinstance(row.measured, Throughput)}
    for row in rows:
        if row.round in rates and isinstance(row.measured, Throughput):
            yield row.measured.images_per_second / rates[row.round]


def _overload_cells(turns: Sequence[Overload]) -> dict[str, str]:
    def over(value: Callable[[Overload], float | None], scale: float = 1.0) -> str:
        return spread([scale * number for turn in turns if (number := value(turn)) is not None])

    live = [latency for turn in turns for latency in turn.live_ms]
    failures = sum(turn.live_failures for turn in turns)
    lost = sum(count for turn in turns for outcome, count in turn.outcomes.items() if not outcome.isdecimal())
    liveness = f"{short(quantile(live, 0.5))} / {short(quantile(live, 0.99))}" if live else "–"
    return {
        "capacity": over(lambda turn: turn.capacity),
        "goodput %": over(lambda turn: turn.goodput_share, 100),
        "in time %": over(lambda turn: turn.in_time_share, 100),
        "504 / lost": f"{sum(turn.outcomes.get('504', 0) for turn in turns)} / {lost}",
        "200 p50": over(lambda turn: turn.success_p50_ms),
        "429 p50": over(lambda turn: turn.rejected_p50_ms),
        "429 p99": over(lambda turn: turn.rejected_p99_ms),
        "livez p50 / p99": f"{liveness} ms" + (f", {failures} failures" if failures else ""),
        "lag p99": over(lambda turn: turn.lag_p99_ms),
        "client cores": over(lambda turn: turn.generator_cores),
    }


def print_tables(found: Results) -> None:
    console = stdout_console()
    tables: dict[str, Table] = {}
    for (scenario, load), by_server in found.groups().items():
        for server, rows in by_server.items():
            line = cells(rows, by_server.get("new", []))
            if scenario not in tables:
                tables[scenario] = _table(scenario, ["load", "server", *line])
            tables[scenario].add_row(load, server, *line.values())
    for table in tables.values():
        console.print(table)
    for name, reason in found.skipped.items():
        console.print(f"skipped: {name}: {reason}", highlight=False)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=number < 2)
    return table
