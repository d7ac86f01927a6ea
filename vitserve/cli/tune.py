"""``vitserve tune``: the fastest configuration on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitserve.cli.console import one_line_errors


def tune(
    bundle: Annotated[
        Path | None, typer.Argument(help="Directory of a bundle. Default: the bundled model.", show_default=False)
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch size.")] = 8,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long each configuration is measured.")] = 1.0,
    plot: Annotated[
        Path | None, typer.Option(help="Plot of throughput against latency to write (.svg or .png). Needs matplotlib.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Measure without saving the result.")] = False,
) -> None:
    """Find the fastest configuration on this machine.

    Measures every engine, precision, number of streams and batch size. `vitserve serve` then uses the fastest.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    with one_line_errors():
        from vitserve.bench.tune import Measurement, SkippedEngine, choose, measure
        from vitserve.model.bundle.bundle import MANIFEST, open_bundle, sha256
        from vitserve.service import machine
        from vitserve.service.engine_worker.tuning_cache import save_tuning_result
        from vitserve.service.settings import DEFAULT_BUNDLE

        def report_skipped(engine: SkippedEngine) -> None:
            console.print(f"skipped: {engine.engine} in {engine.precision}: {engine.reason}", highlight=False)

        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("engine", "precision", "streams × threads", "batch", "images/s", "p50 ms"):
            table.add_column(title, justify="left" if title in ("engine", "precision") else "right")
        opened = open_bundle(bundle or DEFAULT_BUNDLE)
        measurements = list[Measurement]()
        with console.status("measuring"):
            for result in measure(opened, machine.cores(), max_batch, seconds, report_skipped):
                measurements.append(result)
                split, size = f"{result.streams} × {result.threads}", str(result.batch_size)
                rate, latency = f"{result.images_per_second:.1f}", f"{1000 * result.p50_seconds:.1f}"
                table.add_row(result.engine, result.precision, split, size, rate, latency)
        fastest = choose(measurements)
        console.print(table)
        if plot is not None:
            from vitserve.bench.plot import draw_tuning

            draw_tuning(measurements, plot)
        saved = "" if dry_run else f" → {save_tuning_result(sha256(opened.path / MANIFEST), fastest)}"
    configuration = f"{fastest.engine} in {fastest.precision}, {fastest.streams} × {fastest.threads} threads"
    typer.echo(f"fastest: {configuration}, {fastest.images_per_second:.1f} images/s{saved}")
