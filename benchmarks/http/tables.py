"""The results as tables, on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table

from benchmarks import document_sections
from benchmarks.comparison import machine_line
from benchmarks.http import idle, overload, retry_after, throughput, vit_b16
from benchmarks.http.idle import Idle
from benchmarks.http.overload import Overload
from benchmarks.http.quantiles import spread
from benchmarks.http.results import Measured, Results, Row
from benchmarks.http.retry_after import RetryAfter
from benchmarks.http.throughput import Throughput
from benchmarks.http.vit_b16 import VitB16

Kind = TypeVar("Kind", bound=Measured)
REFERENCE = "new"  # the server that the others are compared with


class Line(NamedTuple):
    load: str
    server: str  # its title
    cells: dict[str, str]  # by column


def cells(measured: Sequence[Measured]) -> dict[str, str]:
    """The columns for the rounds of one server under one load."""
    columns: dict[str, str] = {}
    if loops := of_kind(measured, Throughput):
        columns |= throughput.cells(loops)
    if turns := of_kind(measured, Overload):
        columns |= overload.cells(turns)
    if probes := of_kind(measured, RetryAfter):
        columns |= retry_after.cells(probes)
    if idles := of_kind(measured, Idle):
        columns |= idle.cells(idles)
    if large := of_kind(measured, VitB16):
        columns |= vit_b16.cells(large)
    return columns


def of_kind(measured: Sequence[Measured], kind: type[Kind]) -> list[Kind]:
    return [each for each in measured if isinstance(each, kind)]


def one_line(row: Row) -> str:
    return ", ".join(f"{column} {cell}" for column, cell in cells([row.measured]).items())


def ratios(rows: Sequence[Row], reference: Sequence[Row]) -> list[float]:
    """Throughput of the reference ÷ that of the server, for each round that both have."""
    rates = {row.round: row.measured.per_second for row in reference if isinstance(row.measured, Throughput)}
    measured = ((row.round, row.measured) for row in rows)
    return [
        rates[number] / each.per_second for number, each in measured if isinstance(each, Throughput) and number in rates
    ]


def lines(found: Results) -> Iterator[tuple[str, list[Line]]]:
    """The lines of each scenario."""
    by_scenario: dict[str, list[Line]] = {}
    for (scenario, load), by_server in found.groups().items():
        for server, rows in by_server.items():
            columns = cells([row.measured for row in rows])
            if server != REFERENCE and (compared := ratios(rows, by_server.get(REFERENCE, []))):
                columns[f"{found.titles[REFERENCE]} ÷ server"] = spread(compared)
            by_scenario.setdefault(scenario, []).append(Line(load, found.titles.get(server, server), columns))
    yield from by_scenario.items()


def print_all(found: Results, console: Console) -> None:
    for scenario, group in lines(found):
        titles, rows = _columns(group)
        table = Table(title=scenario, box=None, pad_edge=False, header_style="bold")
        for number, title in enumerate(titles):
            table.add_column(title, justify="left" if number < 2 else "right", no_wrap=number < 2)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for name, reason in found.skipped.items():
        console.print(f"skipped: {name}: {reason}", highlight=False)


def as_markdown(found: Results) -> str:
    parts = [f"{machine_line()}; {rounds_line(found)}.\n"]
    parts += [f"`python -m benchmarks.http {command}`\n" for command in dict.fromkeys(found.commands)]
    for scenario, group in lines(found):
        parts += [f"Scenario `{scenario}`:\n", document_sections.markdown(*_columns(group))]
    parts += [f"Skipped: {name}: {reason.splitlines()[0]}\n" for name, reason in found.skipped.items()]
    return "\n".join(parts)


def rounds_line(found: Results) -> str:
    counts = sorted({len(rows) for by_server in found.groups().values() for rows in by_server.values()})
    rounds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    return f"median (min – max) of {rounds} rounds"


def _columns(group: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    columns = list(dict.fromkeys(column for line in group for column in line.cells))
    rows = [[line.load, line.server, *(line.cells.get(column, "") for column in columns)] for line in group]
    return ["load", "server", *columns], rows
