"""``vitserve bench``: a running service under load, or a bundle's engines alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitserve import __version__
from vitserve.cli.console import one_line_errors


def bench(
    target: Annotated[
        str,
        typer.Argument(
            help="URL of a running service, or directory of a bundle. Default: the bundled model.", show_default=False
        ),
    ] = "",
    images: Annotated[
        Path | None, typer.Option(help="Service: image or directory of images to send. Default: one generated JPEG.")
    ] = None,
    connections: Annotated[
        str,
        typer.Option(
            help="Service, closed loop: numbers of connections, each sending its next request after a response. "
            "Default: 1,8, or none with --rate.",
            show_default=False,
        ),
    ] = "",
    rate: Annotated[
        str,
        typer.Option(
            help="Service, open loop: Poisson arrival rates per second, such as 100,200. "
            "Latency counts from the planned arrival.",
            show_default=False,
        ),
    ] = "",
    deadline_ms: Annotated[
        float,
        typer.Option(
            min=0, help="Service: deadline that defines goodput. Sent as timeout_ms unless the URL has a path."
        ),
    ] = 0,
    engine: Annotated[str, typer.Option(help="Bundle: name of an engine; auto measures all.")] = "auto",
    precision: Annotated[str, typer.Option(help="Bundle: name of a precision; auto measures all.")] = "auto",
    batch_sizes: Annotated[str, typer.Option(help="Bundle: batch sizes.")] = "1,2,4,8",
    streams: Annotated[int, typer.Option(min=1, help="Bundle: batches that run at the same time.")] = 1,
    threads: Annotated[
        int, typer.Option(min=0, help="Bundle: threads per stream; 0 divides the cores among the streams.")
    ] = 0,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="Bundle: rounds, in each of which every engine is measured; medians are reported."),
    ] = 3,
    seconds: Annotated[
        float,
        typer.Option(min=0, help="How long each load or engine is measured; 0 takes 10 for a service, 1 for a bundle."),
    ] = 0,
    warm_up_seconds: Annotated[float, typer.Option(min=0, help="Service: load before the measurement.")] = 2,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write.")] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write, with a description of the machine.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot to write (.svg or .png). Needs matplotlib.")] = None,
) -> None:
    """Measure a running service, or the engines of a bundle.

    See docs/benchmarks.md.
    """
    with one_line_errors():
        from vitserve.bench.command import run
        from vitserve.bench.options import BenchOptions

        options = BenchOptions(
            target=target,
            images=images,
            connections=connections,
            rate=rate,
            deadline_ms=deadline_ms,
            engine=engine,
            precision=precision,
            batch_sizes=batch_sizes,
            streams=streams,
            threads=threads,
            rounds=rounds,
            seconds=seconds,
            warm_up_seconds=warm_up_seconds,
            csv=csv,
            json=as_json,
            plot=plot,
        )
        run(options, __version__)
