"""Statistics of measurements, such as percentiles and goodput, as tables, CSV and JSON."""

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

from vitserve.bench.load import LoadResult, Sample
from vitserve.service import machine

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from rich.console import Console
    from rich.table import Table

_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class ServiceRow:
    """One load on a server. Percentiles are of responses with status 200."""

    loop: str
    connections: int  # 0 in an open loop
    planned_per_second: float  # 0 in a closed loop
    seconds: float
    requests: int
    successful: int  # with status 200
    rejected: int  # with status 429
    errors: int  # with another status or without a response
    statuses: str
    throughput_per_second: float  # responses with status 200
    goodput_per_second: float  # of them, those within the deadline; all if there is no deadline
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    send_delay_p99_ms: float | None  # by how much requests were sent later than planned; None in a closed loop
    client_cores: float  # CPU cores used by the load generator


@dataclass(frozen=True)
class EngineRow:
    """One engine at one batch size, with all streams busy."""

    engine: str
    precision: str
    streams: int
    threads: int  # per stream
    batch_size: int
    images_per_second: float  # median of the rounds
    min_images_per_second: float
    max_images_per_second: float
    p50_ms: float  # of one batch
    p99_ms: float | None


def percentile(values: Sequence[float], share: float) -> float | None:
    """Returns the smallest value that is at least as large as ``share`` of the values.

    Returns None if there are too few values to distinguish it from the maximum.
    """
    if len(values) * (1 - share) < 1 - 1e-9:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]


def throughput(result: LoadResult, deadline_seconds: float = math.inf) -> float:
    """Responses with status 200 per second, counting only those within the deadline.

    In a closed loop, a response counts in proportion to the part of its latency that lies within the measured time.
    Otherwise the result would depend on chance when responses are few and slow.
    """
    good = [sample for sample in result.samples if sample.outcome == "200"]
    good = [sample for sample in good if sample.latency_seconds <= deadline_seconds]
    if result.loop == "open":
        return sum(0 <= sample.planned < result.seconds for sample in good) / result.seconds
    return sum(_share_within(sample, result.seconds) for sample in good) / result.seconds


def _share_within(sample: Sample, seconds: float) -> float:
    if sample.latency_seconds <= 0:
        return float(0 <= sample.ended < seconds)
    return max(0.0, min(sample.ended, seconds) - max(sample.planned, 0.0)) / sample.latency_seconds


def summarize(result: LoadResult, deadline_seconds: float = math.inf) -> ServiceRow:
    samples = result.measured()
    statuses = Counter(sample.outcome for sample in samples)
    latencies = [sample.latency_seconds for sample in samples if sample.outcome == "200"]
    delays = [sample.sent - sample.planned for sample in samples] if result.loop == "open" else []
    return ServiceRow(
        loop=result.loop,
        connections=result.connections,
        planned_per_second=result.rate,
        seconds=result.seconds,
        requests=len(samples),
        successful=statuses["200"],
        rejected=statuses["429"],
        errors=len(samples) - statuses["200"] - statuses["429"],
        statuses=", ".join(f"{outcome}: {count}" for outcome, count in sorted(statuses.items())),
        throughput_per_second=throughput(result),
        goodput_per_second=throughput(result, deadline_seconds),
        p50_ms=_percentile_ms(latencies, 0.5),
        p90_ms=_percentile_ms(latencies, 0.9),
        p99_ms=_percentile_ms(latencies, 0.99),
        p999_ms=_percentile_ms(latencies, 0.999),
        send_delay_p99_ms=_percentile_ms(delays, 0.99),
        client_cores=result.client_cores,
    )


def _percentile_ms(seconds: Sequence[float], share: float) -> float | None:
    value = percentile(seconds, share)
    return None if value is None else 1000 * value


def write_csv(path: Path, rows: Sequence[DataclassInstance]) -> None:
    """Writes one line for each row. None is written as an empty field."""
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [field.name for field in fields(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_json(path: Path, about: Mapping[str, Any], rows: Sequence[DataclassInstance]) -> None:
    document = {**about, "machine": describe_machine(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def describe_machine() -> dict[str, Any]:
    """Returns the properties of the machine on which the results depend."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:  # not Linux
        first = ""
    properties = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in properties.items()}
    flags = set(cpu.get("flags", "").split())
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cores": machine.cores(),
        "instructions": [name for name in _INSTRUCTION_SETS if name in flags],
        "python": platform.python_version(),
    }


def stdout_console() -> Console:
    """Returns a console for standard output. It is 140 columns wide if that is a file or a pipe."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=140)


def service_table(rows: Sequence[ServiceRow], deadline_ms: float) -> Table:
    goodput = [f"200/s in {deadline_ms:g} ms"] if deadline_ms else []
    latencies = ["p50 ms", "p90", "p99", "p99.9"]
    titles = ["requests", "200/s", *goodput, *latencies, "429", "errors", "send delay p99 ms", "client cores"]
    table = _table(["load"], titles)
    for row in rows:
        within_deadline = [f"{row.goodput_per_second:.1f}"] if goodput else []
        percentiles = (row.p50_ms, row.p90_ms, row.p99_ms, row.p999_ms)
        table.add_row(
            connections(row.connections) if row.loop == "closed" else f"{row.planned_per_second:g} requests/s",
            f"{row.requests}",
            f"{row.throughput_per_second:.1f}",
            *within_deadline,
            *(_milliseconds(value) for value in percentiles),
            f"{row.rejected}",
            _errors(row),
            _milliseconds(row.send_delay_p99_ms),
            f"{row.client_cores:.2f}",
        )
    return table


def engine_table(rows: Sequence[EngineRow]) -> Table:
    figures = ["streams × threads", "batch size", "images/s", "min – max", "p50 ms", "p99"]
    table = _table(["engine", "precision"], figures)
    for row in rows:
        table.add_row(
            row.engine,
            row.precision,
            f"{row.streams} × {row.threads}",
            str(row.batch_size),
            f"{row.images_per_second:.1f}",
            f"{row.min_images_per_second:.1f} – {row.max_images_per_second:.1f}",
            _milliseconds(row.p50_ms),
            _milliseconds(row.p99_ms),
        )
    return table


def connections(count: int) -> str:
    return f"{count} connection{'s' * (count > 1)}"


def _table(texts: Sequence[str], figures: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in texts:
        table.add_column(title, no_wrap=True)
    for title in figures:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _errors(row: ServiceRow) -> str:
    """The number of errors, by kind."""
    kinds = [kind for kind in row.statuses.split(", ") if kind.split(":")[0] not in ("200", "429", "")]
    return f"{row.errors} ({', '.join(kinds)})" if row.errors else "0"


def _milliseconds(value: float | None) -> str:
    """Three significant digits, or a dash if there were too few samples."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
