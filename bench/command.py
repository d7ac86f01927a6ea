"""Runs `vitserve bench`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vitserve.bench import plot, report, service
from vitserve.bench.engine import Subject, measure_in_rounds, opened
from vitserve.bench.options import BenchOptions
from vitserve.bench.report import EngineRow, ServiceRow
from vitserve.bench.request import read_encoded_images, write_sample_image
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.service import machine
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.settings import DEFAULT_BUNDLE

ENGINE_SECONDS = 1.0  # for each engine and batch size in a round, by default


def run(options: BenchOptions, version: str) -> None:
    """Measures, prints a table and writes the files that ``options`` name.

    Raises ValueError, OSError (including ConnectionGoneError) and ImportError, each with a message for the user.
    """
    if options.plot is not None:
        plot.load_figure_class()
    console = Console(stderr=True)
    about = {
        "vitserve": version,
        "options": {name: str(value) for name, value in asdict(options).items() if value not in (None, "")},
    }
    if options.is_url:
        service_rows = bench_service(options, console)
        _write(service_rows, about, options)
        if options.plot is not None:
            plot.draw_service(service_rows, options.plot)
    else:
        engine_rows = bench_engines(options, console)
        _write(engine_rows, about, options)
        if options.plot is not None:
            plot.draw_engines(engine_rows, options.plot)


def bench_service(options: BenchOptions, console: Console) -> list[ServiceRow]:
    """Measures a running server and prints the table. Raises ValueError and ConnectionGoneError."""
    loads = len(options.connection_counts()) + len(options.rates())
    if not loads:
        raise ValueError("no load is specified: add --connections 1,8 or --rate 200")
    with tempfile.TemporaryDirectory() as directory:
        images = read_encoded_images(options.images or write_sample_image(directory))
    rows = []
    with _progress(console) as progress:
        task = progress.add_task(f"{loads} loads of {options.seconds or service.SECONDS:g} s", total=loads)
        for row in service.measure(options, images):
            rows.append(row)
            progress.advance(task)
    report.stdout_console().print(report.service_table(rows, options.deadline_ms))
    return rows


def bench_engines(options: BenchOptions, console: Console) -> list[EngineRow]:
    """Measures the engines of a bundle and prints the table. Raises BundleError, and ValueError if no engine runs."""
    sizes = options.sizes()
    bundle = open_bundle(Path(options.target) if options.target else DEFAULT_BUNDLE)
    subjects = _open_engines(bundle, options, max(sizes), console)
    try:
        with _progress(console) as progress:
            task = progress.add_task(bundle.manifest.name, total=len(subjects) * len(sizes) * options.rounds)
            advance: Callable[[], None] = lambda: progress.advance(task)  # noqa: E731
            pixels, seconds = bundle.golden().pixels, options.seconds or ENGINE_SECONDS
            results = measure_in_rounds(subjects, pixels, sizes, seconds, options.rounds, advance)
        rows = [results[index, size].row(subject, size) for index, subject in enumerate(subjects) for size in sizes]
    finally:
        for subject in subjects:
            subject.close()
    report.stdout_console().print(report.engine_table(rows))
    return rows


def _open_engines(bundle: Bundle, options: BenchOptions, max_batch: int, console: Console) -> list[Subject]:
    reasons: list[str] = []
    engine_options = EngineOptions(
        options.engine,
        options.precision,
        options.streams,
        options.threads,
        max_batch,
        plan_dir=str(machine.plan_dir()),
    )
    with console.status("opening engines"):
        subjects = [subject for _, subject in opened(bundle, engine_options, reasons.append)]
    for reason in reasons:
        console.print(f"skipped: {reason}", highlight=False)
    if not subjects:
        wanted = f"engine {options.engine!r} with precision {options.precision!r}"
        raise ValueError("; ".join(reasons) or f"the bundle has no artifact for {wanted}")
    return subjects


def _write(rows: Sequence[ServiceRow] | Sequence[EngineRow], about: dict[str, Any], options: BenchOptions) -> None:
    if options.csv is not None:
        report.write_csv(options.csv, rows)
    if options.json is not None:
        report.write_json(options.json, about, rows)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
