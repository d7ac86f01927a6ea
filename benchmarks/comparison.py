"""The results of benchmarks.compare over all rounds, as JSON, CSV, a plot and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.document_sections import markdown
from vitserve.bench import plot, report
from vitserve.bench.report import EngineRow, ServiceRow, connections


@dataclass(frozen=True)
class ServerResult:
    """A server in one round, at one number of connections."""

    name: str
    title: str
    start_seconds: float  # until the first response
    same_classes: int  # of the images with known classes
    row: ServiceRow


@dataclass(frozen=True)
class ComparisonRow:
    """All rounds of a server at one number of connections, or of an engine alone at one batch size."""

    name: str
    title: str
    load: str
    rounds: int
    per_second: float  # requests or images, median of the rounds
    min_per_second: float
    max_per_second: float
    p50_ms: float | None  # median of the rounds
    min_p50_ms: float | None
    max_p50_ms: float | None
    p90_ms: float | None  # median of the rounds
    errors: int  # responses with a status other than 200 and requests without a response, in all rounds
    start_seconds: float | None  # until the first response, median of the rounds
    same_classes: int | None  # of the images with known classes, in the worst round
    known_images: int | None
    client_cores: float | None


@dataclass
class Comparison:
    model: str
    command: str  # options of the benchmark
    rounds: int
    seconds: float
    expected_classes: list[int]  # of the images with known classes
    images: str = ""
    servers: list[ServerResult] = field(default_factory=list)
    engines: list[EngineRow] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # reasons, by server or engine

    def server_rows(self) -> list[ComparisonRow]:
        groups: dict[tuple[str, int], list[ServerResult]] = {}
        for result in self.servers:
            groups.setdefault((result.name, result.row.connections), []).append(result)
        return [_server_row(group, len(self.expected_classes)) for group in groups.values()]

    def engine_rows(self) -> list[ComparisonRow]:
        groups: dict[tuple[str, str, int], list[EngineRow]] = {}
        for row in self.engines:
            groups.setdefault((row.engine, row.precision, row.batch_size), []).append(row)
        return [_engine_row(group) for group in groups.values()]


def _server_row(results: Sequence[ServerResult], known_images: int) -> ComparisonRow:
    rows = [result.row for result in results]
    rates = [row.throughput_per_second for row in rows]
    p50s = [row.p50_ms for row in rows if row.p50_ms is not None]
    p90s = [row.p90_ms for row in rows if row.p90_ms is not None]
    return ComparisonRow(
        name=results[0].name,
        title=results[0].title,
        load=connections(rows[0].connections),
        rounds=len(results),
        per_second=statistics.median(rates),
        min_per_second=min(rates),
        max_per_second=max(rates),
        p50_ms=statistics.median(p50s) if p50s else None,
        min_p50_ms=min(p50s, default=None),
        max_p50_ms=max(p50s, default=None),
        p90_ms=statistics.median(p90s) if p90s else None,
        errors=sum(row.rejected + row.errors for row in rows),
        start_seconds=statistics.median(result.start_seconds for result in results),
        same_classes=min(result.same_classes for result in results),
        known_images=known_images,
        client_cores=statistics.median(row.client_cores for row in rows),
    )


def _engine_row(rows: Sequence[EngineRow]) -> ComparisonRow:
    first = rows[0]
    name = f"{first.engine} {first.precision}"
    rates, p50s = [row.images_per_second for row in rows], [row.p50_ms for row in rows]
    split = f"{first.streams} × {first.threads} threads"
    return ComparisonRow(
        name=name,
        title=name if "plain" in first.engine else f"vitserve's graph, {name}, {split}",
        load=f"batch {first.batch_size}",
        rounds=len(rows),
        per_second=statistics.median(rates),
        min_per_second=min(rates),
        max_per_second=max(rates),
        p50_ms=statistics.median(p50s),
        min_p50_ms=min(p50s),
        max_p50_ms=max(p50s),
        p90_ms=None,
        errors=0,
        start_seconds=None,
        same_classes=None,
        known_images=None,
        client_cores=None,
    )


def write_all(comparison: Comparison, directory: Path) -> str:
    """Writes comparison.json, .csv, .svg and .md. Returns the Markdown."""
    directory.mkdir(parents=True, exist_ok=True)
    servers, engines = comparison.server_rows(), comparison.engine_rows()
    details = asdict(comparison)
    every_round = {"servers_every_round": details.pop("servers"), "engines_every_round": details.pop("engines")}
    report.write_json(directory / "comparison.json", details | every_round, [*servers, *engines])
    report.write_csv(directory / "comparison.csv", [*servers, *engines])
    groups: dict[str, list[plot.Bar]] = {}
    for row in servers:
        groups.setdefault(row.load, []).append(_bar(row))
    for row in engines:
        groups.setdefault(f"engine alone, {row.load}", []).append(_bar(row))
    plot.draw_bars(groups, "images/s", directory / "comparison.svg")
    text = as_markdown(comparison)
    (directory / "comparison.md").write_text(text, encoding="utf-8")
    return text


def _bar(row: ComparisonRow) -> plot.Bar:
    return plot.Bar(row.title, row.per_second, row.min_per_second, row.max_per_second)


def as_markdown(comparison: Comparison) -> str:
    rounds = f"median (min – max) of {comparison.rounds} rounds of {comparison.seconds:g} s"
    parts = [
        f"{comparison.model} on {machine_line()}; {comparison.images}; {rounds}.\n"
        f"`python -m benchmarks.compare {comparison.command}`\n"
    ]
    if servers := comparison.server_rows():
        parts.append(_server_table(servers))
    if engines := comparison.engine_rows():
        loads = _loads(engines)
        lines = [[title, *map(_throughput, rows)] for title, rows in _by_title(engines).items()]
        parts.append(markdown(["engine alone, images/s", *loads], lines))
    parts += [f"Skipped: {name}: {reason.splitlines()[0]}\n" for name, reason in comparison.skipped.items()]
    return "\n".join(parts)


def machine_line() -> str:
    machine = report.describe_machine()
    return f"{machine['cores']} cores of {machine['cpu']} ({', '.join(machine['instructions'])})"


def _server_table(rows: Sequence[ComparisonRow]) -> str:
    loads = _loads(rows)
    rates, latencies = [f"requests/s, {load}" for load in loads], [f"p50 ms, {load}" for load in loads]
    titles = ["server", *rates, *latencies, "time to first response", "same class"]
    lines = []
    for title, group in _by_title(rows).items():
        first = group[0]
        start, classes = f"{first.start_seconds:.0f} s", f"{first.same_classes} of {first.known_images}"
        lines.append([title, *map(_throughput, group), *map(_p50, group), start, classes])
    return markdown(titles, lines)


def _loads(rows: Sequence[ComparisonRow]) -> list[str]:
    return list(dict.fromkeys(row.load for row in rows))


def _by_title(rows: Sequence[ComparisonRow]) -> dict[str, list[ComparisonRow]]:
    grouped: dict[str, list[ComparisonRow]] = {}
    for row in rows:
        grouped.setdefault(row.title, []).append(row)
    return grouped


def _throughput(row: ComparisonRow) -> str:
    errors = f" ({row.errors} errors)" if row.errors else ""
    return _spread(row.per_second, row.min_per_second, row.max_per_second) + errors


def _p50(row: ComparisonRow) -> str:
    if row.p50_ms is None or row.min_p50_ms is None or row.max_p50_ms is None:
        return "–"
    return _spread(row.p50_ms, row.min_p50_ms, row.max_p50_ms)


def _spread(median: float, minimum: float, maximum: float) -> str:
    return f"{_short(median)} ({_short(minimum)} – {_short(maximum)})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
