"""``vitserve verify``: one engine opened, verified and measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitserve.cli.console import one_line_errors


def verify(
    bundle: Annotated[
        Path | None, typer.Argument(help="Directory of a bundle. Default: the bundled model.", show_default=False)
    ] = None,
    engine: Annotated[str, typer.Option(help="As for `vitserve serve`.")] = "auto",
    precision: Annotated[str, typer.Option(help="As for `vitserve serve`.")] = "auto",
    images: Annotated[
        Path | None,
        typer.Option(
            help="Directory of images, or a training archive (.npz), to compare with fp32 on the CPU. Directories "
            "named after the labels give the classes."
        ),
    ] = None,
    in_domain: Annotated[
        bool,
        typer.Option(
            help="The images are of the model's domain, although they have no labels: judge the share of changed "
            "predictions."
        ),
    ] = False,
    max_images: Annotated[int, typer.Option(min=1, help="Number of these images to use at most.")] = 1000,
    batch_sizes: Annotated[
        str, typer.Option(help="Batch sizes to measure. The engine is opened for the largest.")
    ] = "1,2,4,8",
    streams: Annotated[int, typer.Option(min=1, help="Batches that run at the same time.")] = 1,
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads per stream; 0 divides the cores among the streams.")
    ] = 0,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long a round measures each batch size.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; medians are reported.")] = 3,
    as_json: Annotated[Path | None, typer.Option("--json", help="File to write the whole report to.")] = None,
) -> None:
    """Check and measure an engine on this machine.

    Compares it with the golden images and a directory of images, and checks that its attention is fused. Exits with
    status 1 if a check fails.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with one_line_errors():
        from vitserve.bench.options import whole_numbers
        from vitserve.bench.verify import show
        from vitserve.bench.verify import verify as run
        from vitserve.model.bundle.bundle import open_bundle
        from vitserve.model.bundle.evaluation import Images, read_images
        from vitserve.service import machine
        from vitserve.service.engines.engine import EngineOptions
        from vitserve.service.settings import DEFAULT_BUNDLE

        opened, sizes = open_bundle(bundle or DEFAULT_BUNDLE), whole_numbers(batch_sizes, "--batch-sizes")
        evaluation: Images | None = None
        if images is not None:
            preprocessing = opened.manifest.preprocessing
            _, evaluation = read_images(images, preprocessing, opened.labels, 1, max_images, console.print)
        plans = str(machine.plan_dir())
        options = EngineOptions(engine, precision, streams, threads, max(sizes), plan_dir=plans)
        with console.status("opening") as status:
            report = run(opened, options, evaluation, sizes, seconds, rounds, status.update, in_domain)
        show(report)
        if as_json is not None:
            as_json.write_text(report.to_json())
    raise typer.Exit(1 if report.failures else 0)
