"""What a measurement comes to: percentiles, goodput, counts; as a table, CSV and JSON."""

from __future__ import annotations

import csv
import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitserve.bench.load import Run, Sample
from vitserve.service import machine

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class ServiceRow:
    """One load on a running service. Latencies are of answers with status 200."""

    loop: str
    connections: int  # 0 in an open loop
    planned_per_second: float  # 0 in a closed loop
    seconds: float
    requests: int
    answered: int  # with status 200
    rejected: int  # with status 429
    errors: int  # all others, and those without an answer
    statuses: str
    answered_per_second: float
    goodput_per_second: float  # answered within the deadline; all answered where there is none
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    client_late_ms: float | None  # p99 of how much later than planned requests left
    client_cores: float  # what the load generator took of the machine


@dataclass(frozen=True)
class EngineRow:
    """One engine at one batch size, all streams busy."""

    engine: str
    precision: str
    streams: int
    threads: int  # per stream
    batch_size: int
    images_per_second: float  # median of the rounds
    least_per_second: float
    most_per_second: float
    p50_ms: float  # of one batch
    p99_ms: float | None


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest of the values that at least ``share`` of them do not exceed. None where there are too few to tell it from the greatest."""
    if len(values) * (1 - share) < 1 - 1e-9:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]


def rate(run: Run, deadline_seconds: float = math.inf) -> float:
    """Answers (status 200) a second, of those that came within the deadline.

    In a closed loop an answer counts by the part of its waiting that lies within the measurement: of slow answers few are whole in it, and whether one
    more ends just before its end would be chance.
    """
    good = (each for each in run.samples if each.outcome == "200" and each.seconds <= deadline_seconds)
    if run.loop == "open":
        return sum(0 <= each.planned < run.seconds for each in good) / run.seconds
    return sum(_within(each, run.seconds) for each in good) / run.seconds


def _within(sample: Sample, seconds: float) -> float:
    if sample.seconds <= 0:
        return float(0 <= sample.ended < seconds)
    return max(0.0, min(sample.ended, seconds) - max(sample.planned, 0.0)) / sample.seconds


def summary(run: Run, deadline_seconds: float = math.inf) -> ServiceRow:
    samples = run.counted()
    statuses = Counter(each.outcome for each in samples)
    latencies = [each.seconds for each in samples if each.outcome == "200"]

    def milliseconds(share: float) -> float | None:
        found = percentile(latencies, share)
        return None if found is None else 1000 * found

    late = percentile([each.sent - each.planned for each in samples], 0.99) if run.loop == "open" else None
    return ServiceRow(
        loop=run.loop,
        connections=run.connections,
        planned_per_second=run.rate,
        seconds=run.seconds,
        requests=len(samples),
        answered=statuses["200"],
        rejected=statuses["429"],
        errors=len(samples) - statuses["200"] - statuses["429"],
        statuses=", ".join(f"{outcome}: {count}" for outcome, count in sorted(statuses.items())),
        answered_per_second=rate(run),
        goodput_per_second=rate(run, deadline_seconds),
        p50_ms=milliseconds(0.5),
        p90_ms=milliseconds(0.9),
        p99_ms=milliseconds(0.99),
        p999_ms=milliseconds(0.999),
        client_late_ms=None if late is None else 1000 * late,
        client_cores=run.client_cores,
    )


def write_csv(path: Path, rows: Sequence[DataclassInstance]) -> None:
    """A line for each row; what is None stays empty."""
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [each.name for each in fields(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_json(path: Path, about: Mapping[str, Any], rows: Sequence[DataclassInstance]) -> None:
    document = {**about, "machine": where(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def where() -> dict[str, Any]:
    """The machine, as far as figures depend on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    named = {name.strip(): value.strip() for name, value in found.items()}
    flags = set(named.get("flags", "").split())
    matter = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
    return {
        "cpu": named.get("model name", platform.processor() or platform.machine()),
        "cores": machine.cores(),
        "instructions": [name for name in matter if name in flags],
        "python": platform.python_version(),
    }


def printer() -> Console:
    """Standard output; a file or pipe gets whole tables, whatever its width."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=140)


def service_table(rows: Sequence[ServiceRow], deadline_ms: float) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    within = f"in {deadline_ms:g} ms" if deadline_ms else ""
    for title in (
        "load",
        "requests",
        "200/s",
        *([within] if within else []),
        "p50 ms",
        "p90",
        "p99",
        "p99.9",
        "429",
        "errors",
        "client late ms",
        "client cores",
    ):
        table.add_column(title, justify="left" if title == "load" else "right", no_wrap=True)
    for row in rows:
        load = (
            f"{row.connections} connection{'s' * (row.connections > 1)}"
            if row.loop == "closed"
            else f"{row.planned_per_second:g} a second"
        )
        within_deadline = [f"{row.goodput_per_second:.1f}/s"] if within else []
        latencies = [_text(each) for each in (row.p50_ms, row.p90_ms, row.p99_ms, row.p999_ms)]
        cells = [
            f"{row.requests}",
            f"{row.answered_per_second:.1f}",
            *within_deadline,
            *latencies,
            f"{row.rejected}",
            _errors(row),
        ]
        table.add_row(load, *cells, _text(row.client_late_ms), f"{row.client_cores:.2f}")
    return table


def engine_table(rows: Sequence[EngineRow]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("engine", "precision", "streams × threads", "batch", "images/s", "rounds", "p50 ms", "p99"):
        table.add_column(title, justify="left" if title in ("engine", "precision") else "right", no_wrap=True)
    for row in rows:
        rates = f"{row.images_per_second:.1f}", f"{row.least_per_second:.1f} – {row.most_per_second:.1f}"
        table.add_row(
            row.engine,
            row.precision,
            f"{row.streams} × {row.threads}",
            str(row.batch_size),
            *rates,
            _text(row.p50_ms),
            _text(row.p99_ms),
        )
    return table


def _errors(row: ServiceRow) -> str:
    """With what they were."""
    kinds = [each for each in row.statuses.split(", ") if each.split(":")[0] not in ("200", "429", "")]
    return f"{row.errors} ({', '.join(kinds)})" if row.errors else "0"


def _text(milliseconds: float | None) -> str:
    """Three figures that mean something; a dash where too few were measured."""
    if milliseconds is None:
        return "–"
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
