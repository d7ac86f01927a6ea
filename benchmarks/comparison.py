"""The results of benchmarks/compare.py over its rounds: as JSON, CSV, a picture and Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.document_sections import markdown
from vitserve.bench import plot, report
from vitserve.bench.report import EngineRow, ServiceRow


@dataclass(frozen=True)
class Measured:
    """A server in one round at one number of connections."""

    name: str
    title: str
    start_seconds: float  # until the first answer
    same_classes: int  # of the images whose class is known
    row: ServiceRow


@dataclass(frozen=True)
class ComparedRow:
    """A server at one number of connections, over all rounds, or an engine alone at one batch size."""

    subject: str
    title: str
    load: str
    rounds: int
    per_second: float  # median of the rounds
    least_per_second: float
    most_per_second: float
    p50_ms: float | None  # median of the rounds'
    least_p50_ms: float | None
    most_p50_ms: float | None
    p90_ms: float | None
    errors: int  # of all rounds; all answers but 200
    start_seconds: float | None  # until the first answer, median of the rounds
    same_classes: int | None  # of the known images, in the worst round
    known_images: int | None
    client_cores: float | None


@dataclass
class Compared:
    model: str
    asked: str
    rounds: int
    seconds: float
    right: list[int]  # classes of the known images
    images: str = ""
    services: list[Measured] = field(default_factory=list)
    engines: list[EngineRow] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[ComparedRow]:
        servers = {(each.name, each.row.connections): None for each in self.services}
        alone = {(each.engine, each.precision, each.batch_size): None for each in self.engines}
        return [self._service(*key) for key in servers] + [self._engine(*key) for key in alone]

    def _service(self, name: str, connections: int) -> ComparedRow:
        its = [each for each in self.services if (each.name, each.row.connections) == (name, connections)]
        rates, p50s = [each.row.answered_per_second for each in its], _known(each.row.p50_ms for each in its)
        return ComparedRow(
            subject=name,
            title=its[0].title,
            load=_connections(connections),
            rounds=len(its),
            per_second=statistics.median(rates),
            least_per_second=min(rates),
            most_per_second=max(rates),
            p50_ms=_of(statistics.median, p50s),
            least_p50_ms=_of(min, p50s),
            most_p50_ms=_of(max, p50s),
            p90_ms=_of(statistics.median, _known(each.row.p90_ms for each in its)),
            errors=sum(each.row.rejected + each.row.errors for each in its),
            start_seconds=statistics.median(each.start_seconds for each in its),
            same_classes=min(each.same_classes for each in its),
            known_images=len(self.right),
            client_cores=statistics.median(each.row.client_cores for each in its),
        )

    def _engine(self, engine: str, precision: str, size: int) -> ComparedRow:
        its = [
            each for each in self.engines if (each.engine, each.precision, each.batch_size) == (engine, precision, size)
        ]
        rates, p50s = [each.images_per_second for each in its], [each.p50_ms for each in its]
        return ComparedRow(
            subject=f"{engine} {precision}",
            title=f"{engine} {precision}"
            if "plain" in engine
            else f"vitserve's graph, {engine} {precision}, {its[0].streams} × {its[0].threads} threads",
            load=f"batch {size}",
            rounds=len(its),
            per_second=statistics.median(rates),
            least_per_second=min(rates),
            most_per_second=max(rates),
            p50_ms=statistics.median(p50s),
            least_p50_ms=min(p50s),
            most_p50_ms=max(p50s),
            p90_ms=None,
            errors=0,
            start_seconds=None,
            same_classes=None,
            known_images=None,
            client_cores=None,
        )


def write_all(found: Compared, directory: Path) -> str:
    """comparison.json, .csv, .svg and .md; returns the last."""
    directory.mkdir(parents=True, exist_ok=True)
    rows, text = found.rows(), as_markdown(found)
    about = {
        "model": found.model,
        "asked": found.asked,
        "rounds": found.rounds,
        "seconds": found.seconds,
        "images": found.images,
        "skipped": found.skipped,
    }
    every = [
        {"name": each.name, "start_seconds": each.start_seconds, "same_classes": each.same_classes, **asdict(each.row)}
        for each in found.services
    ]
    report.write_json(
        directory / "comparison.json",
        about | {"every_round": every, "engines_every_round": [asdict(each) for each in found.engines]},
        rows,
    )
    report.write_csv(directory / "comparison.csv", rows)
    groups: dict[str, list[plot.Bar]] = {}
    for row in rows:
        groups.setdefault(row.load if row.known_images is not None else f"engines alone, {row.load}", []).append(
            plot.Bar(row.title, row.per_second, row.least_per_second, row.most_per_second)
        )
    plot.draw_bars(groups, "images/s", directory / "comparison.svg")
    (directory / "comparison.md").write_text(text, encoding="utf-8")
    return text


def as_markdown(found: Compared) -> str:
    where = report.where()
    machine = f"{where['cores']} cores of {where['cpu']} ({', '.join(where['instructions'])})"
    head = f"{found.model} on {machine}; {found.images}; median (least – most) of {found.rounds} rounds of {found.seconds:g} s.\n"
    head += f"`python -m benchmarks.compare {found.asked}`\n"
    parts, rows = [head], found.rows()
    services, engines = (
        [row for row in rows if row.known_images is not None],
        [row for row in rows if row.known_images is None],
    )
    if services:
        loads = list(dict.fromkeys(row.load for row in services))
        titles = [
            "server",
            *(f"requests/s, {load}" for load in loads),
            *(f"p50 ms, {load}" for load in loads),
            "first answer after",
            "same class",
        ]
        lines = [_line(its, loads) for its in _by_title(services)]
        parts.append(markdown(titles, lines))
    if engines:
        loads = list(dict.fromkeys(row.load for row in engines))
        lines = [
            [its[0].title, *(_spread(each.per_second, each.least_per_second, each.most_per_second) for each in its)]
            for its in _by_title(engines)
        ]
        parts.append(markdown(["engine alone, images/s", *loads], lines))
    parts += [f"Left out: {name}: {reason.splitlines()[0]}\n" for name, reason in found.skipped.items()]
    return "\n".join(parts)


def _line(its: Sequence[ComparedRow], loads: Sequence[str]) -> list[str]:
    by_load = {row.load: row for row in its}
    rates, latencies = [], []
    for load in loads:
        row = by_load[load]
        void = f" ({row.errors} errors)" if row.errors else ""
        rates.append(_spread(row.per_second, row.least_per_second, row.most_per_second) + void)
        known = row.p50_ms is not None and row.least_p50_ms is not None and row.most_p50_ms is not None
        latencies.append(_spread(row.p50_ms or 0, row.least_p50_ms or 0, row.most_p50_ms or 0) if known else "–")
    return [
        its[0].title,
        *rates,
        *latencies,
        f"{its[0].start_seconds or 0:.0f} s",
        f"{its[0].same_classes} of {its[0].known_images}",
    ]


def _by_title(rows: Sequence[ComparedRow]) -> list[list[ComparedRow]]:
    grouped: dict[str, list[ComparedRow]] = {}
    for row in rows:
        grouped.setdefault(row.title, []).append(row)
    return list(grouped.values())


def _connections(count: int) -> str:
    return f"{count} connection{'s' * (count > 1)}"


def _spread(median: float, least: float, most: float) -> str:
    def short(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    return f"{short(median)} ({short(least)} – {short(most)})"


def _known(values: Iterable[float | None]) -> list[float]:
    return [each for each in values if each is not None]


def _of(what: Callable[[list[float]], float], values: list[float]) -> float | None:
    return what(values) if values else None
