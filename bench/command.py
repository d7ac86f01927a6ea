"""What `vitserve bench` does with its options."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vitserve.bench import plot, report
from vitserve.bench.engine import Subject, opened, take_turns
from vitserve.bench.report import EngineRow, ServiceRow
from vitserve.bench.request import made_picture
from vitserve.bench.service import Plan, measure
from vitserve.model.bundle.bundle import open_bundle
from vitserve.service import machine
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.settings import DEFAULT_BUNDLE


@dataclass(frozen=True)
class Wanted:
    """The options of `vitserve bench`, as they were given; vitserve.py says what each is."""

    target: str
    images: Path | None
    connections: str
    rate: str
    deadline_ms: float
    engine: str
    precision: str
    batch_sizes: str
    streams: int
    threads: int
    rounds: int
    seconds: float  # 0: what suits the target
    warm_up_seconds: float
    csv: Path | None
    json: Path | None
    plot: Path | None


def run(wanted: Wanted, version: str) -> None:
    """Raises ValueError, OSError (Gone among them) and ImportError, each with a message for whoever asked."""
    if wanted.plot is not None:
        plot.require()
    console = Console(stderr=True)
    about = {
        "vitserve": version,
        "asked": {name: str(value) for name, value in asdict(wanted).items() if value not in (None, "")},
    }
    rows: Sequence[ServiceRow] | Sequence[EngineRow]
    if "://" in wanted.target:
        with tempfile.TemporaryDirectory() as directory:
            plan = Plan(
                url=wanted.target,
                images=wanted.images or made_picture(directory),
                connections=whole(wanted.connections or ("" if wanted.rate else "1,8"), "--connections"),
                rates=numbers(wanted.rate, "--rate"),
                warm_up_seconds=wanted.warm_up_seconds,
                seconds=wanted.seconds or 10,
                deadline_ms=wanted.deadline_ms,
            )
            rows = bench_service(plan, console)
    else:
        sizes = whole(wanted.batch_sizes, "--batch-sizes")
        options = EngineOptions(
            wanted.engine,
            wanted.precision,
            wanted.streams,
            wanted.threads,
            max(sizes),
            plan_dir=str(machine.plan_dir()),
        )
        rows = bench_engines(
            Path(wanted.target) if wanted.target else DEFAULT_BUNDLE,
            options,
            sizes,
            wanted.seconds or 1,
            wanted.rounds,
            console,
        )
    write(rows, about, csv=wanted.csv, json=wanted.json, picture=wanted.plot)


def numbers(text: str, name: str) -> list[float]:
    """Of "1,8,64". Raises ValueError, naming the option."""
    try:
        found = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{name} is {text!r}; it must be numbers with commas between, such as 1,8,64") from None
    if any(not 0 < each < float("inf") for each in found):
        raise ValueError(f"{name} is {text!r}; each must be above 0")
    return found


def whole(text: str, name: str) -> list[int]:
    found = numbers(text, name)
    if any(each != int(each) for each in found):
        raise ValueError(f"{name} is {text!r}; they must be whole numbers")
    return [int(each) for each in found]


def bench_service(plan: Plan, console: Console) -> list[ServiceRow]:
    """Raises ValueError and Gone."""
    rows: list[ServiceRow] = []
    loads = len(plan.connections) + len(plan.rates)
    if not loads:
        raise ValueError("no load was named: --connections 1,8 or --rate 200")
    with _progress(console) as progress:
        task = progress.add_task(f"{loads} loads of {plan.seconds:g} s", total=loads)
        for row in measure(plan):
            rows.append(row)
            progress.advance(task)
    report.printer().print(report.service_table(rows, plan.deadline_ms))
    return rows


def bench_engines(
    path: Path, options: EngineOptions, sizes: Sequence[int], seconds: float, rounds: int, console: Console
) -> list[EngineRow]:
    """Raises BundleError, and ValueError where nothing can be measured."""
    bundle = open_bundle(path)
    subjects: list[Subject] = []
    reasons: list[str] = []
    try:
        with console.status("opening engines"):
            for _, subject in opened(bundle, options, reasons.append):
                subjects.append(subject)
        for reason in reasons:
            console.print(f"skipped: {reason}", highlight=False)
        if not subjects:
            asked = f"engine {options.engine!r} in precision {options.precision!r}"
            raise ValueError("; ".join(reasons) or f"the bundle has no artifact for {asked}")
        with _progress(console) as progress:
            task = progress.add_task(bundle.manifest.name, total=len(subjects) * len(sizes) * rounds)
            advance: Callable[[], None] = lambda: progress.advance(task)  # noqa: E731
            results = take_turns(subjects, bundle.golden().pixels, sizes, seconds, rounds, advance)
        rows = [results[place, size].row(subject, size) for place, subject in enumerate(subjects) for size in sizes]
    finally:
        for subject in subjects:
            subject.close()
    report.printer().print(report.engine_table(rows))
    return rows


def write(
    rows: Sequence[ServiceRow] | Sequence[EngineRow],
    about: dict[str, Any],
    *,
    csv: Path | None,
    json: Path | None,
    picture: Path | None,
) -> None:
    if csv is not None:
        report.write_csv(csv, rows)
    if json is not None:
        report.write_json(json, about, rows)
    if picture is not None:
        services = [row for row in rows if isinstance(row, ServiceRow)]
        engines = [row for row in rows if isinstance(row, EngineRow)]
        if services:
            plot.draw_service(services, picture)
        else:
            plot.draw_engines(engines, picture)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
